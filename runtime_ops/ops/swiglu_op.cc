#include "ops/swiglu_op.h"

#include "ops/weight_input.h"

namespace splitq::ops {
SwiGluOp::SwiGluOp(const Node& node)
    : name_(node.name()),
      width_(node.Int("N", 1, kMaxChannelsOut / 2)),
      kernel_(FindSwiGluKernel(ChooseIsa().isa)) {}

void SwiGluOp::Compute(Call& call) const {
  const Tensor x = call.Rows(0, 2 * width_);
  const auto* in = x.as<float>();
  auto* out = call.Output<float>(0, WithLast(x.shape, width_));
  ForRows(call, LeadingSize(x.shape), width_, [&](int64_t row) {
    const float* gate = in + 2 * row * width_;
    kernel_.run(gate, gate + width_, width_, out + row * width_);
  });
}

void SwiGluOp::InferShapes(const ShapeInference& shapes) {
  shapes.SetLike(0, kFloat, shapes.Int("N"));
}

}  // namespace splitq::ops
