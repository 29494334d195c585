#include "ops/correction_op.h"

#include "linear/apply_correction.h"
#include "pack/layout.h"

namespace splitq::ops {
namespace {

enum Input : size_t { kMainCodes, kMainScale, kResidualCodes, kResidualScale, kModality, kU };

}  // namespace

CorrectionKernel::CorrectionKernel(const Node& node)
    : name_(node.name()), correction_(node), arena_(node.api(), node.info()) {
  if (!correction_.present()) {
    node.Fail("cws_rank or mac_rank above 0", "0 and 0", "remove the node");
  }
  const int64_t main = node.Int("K", 1, kMaxChannelsIn);
  const int64_t outputs = node.Int("N", 1, kMaxChannelsOut);
  WeightForm form = WeightForm::kUnknown;
  correction_.Read(node, kU, main, outputs, node.BitWidth("bits"), &form);
  if (correction_.correction().mac_rank > 0) {
    node.CheckPresence(kResidualCodes, true, "mac_rank is above 0");
    node.CheckPresence(kResidualScale, true, "mac_rank is above 0");
  }
  if (correction_.needs_modality()) {
    node.CheckPresence(kModality, true, "mac_rows is \"text\" and mac_rank is above 0");
  }
}

void CorrectionKernel::Compute(Call& call) const {
  const Correction& correction = correction_.correction();
  const Tensor main = call.Rows(kMainCodes, correction.u.channels_in);
  const Shape scale_shape = WithLast(main.shape, 1);
  CorrectionRows data;
  data.rows = LeadingSize(main.shape);
  data.main_codes = main.as<int8_t>();
  data.main_scale = call.Input(kMainScale, scale_shape).as<float>();
  if (correction.mac_rank > 0) {
    data.residual_codes = call.Input(kResidualCodes, main.shape).as<int8_t>();
    data.residual_scale = call.Input(kResidualScale, scale_shape).as<float>();
  }
  if (correction_.needs_modality()) {
    const Shape tokens(main.shape.begin(), main.shape.end() - 1);
    data.modality = call.Input(kModality, tokens).as<int8_t>();
  }
  data.output = call.Output<float>(0, WithLast(main.shape, correction.v.channels_out));
  if (data.rows == 0) return;
  const Arena::Block scratch = arena_.Allocate(ScratchBytes(correction, data.rows));
  ApplyCorrection(correction, data, scratch.data(), call.Parallel());
}

void CorrectionKernel::InferShapes(const ShapeInference& shapes) {
  shapes.SetLike(0, kFloat, shapes.Int("N"));
}

}  // namespace splitq::ops
