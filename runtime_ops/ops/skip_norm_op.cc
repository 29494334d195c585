#include "ops/skip_norm_op.h"

#include "ops/weight_input.h"

namespace splitq::ops {
SkipNormOp::SkipNormOp(const Node& node)
    : name_(node.name()),
      width_(node.Int("N", 1, kMaxChannelsIn)),
      epsilon_(node.Float("epsilon")),
      kernel_(FindSkipNormKernel(ChooseIsa().isa)) {
  if (epsilon_ < 0.0f) {
    node.Fail("attribute 'epsilon' of at least 0", std::to_string(epsilon_),
              "export the model again");
  }
}

void SkipNormOp::Compute(Call& call) const {
  const Tensor x = call.Rows(0, width_);
  const auto* values = x.as<float>();
  const auto* skip = call.Input(1, x.shape).as<float>();
  const auto* weight = call.Input(2, {width_}).as<float>();
  auto* y = call.Output<float>(0, x.shape);
  auto* sum = call.Output<float>(1, x.shape);
  ForRows(call, LeadingSize(x.shape), width_, [&](int64_t row) {
    const int64_t at = row * width_;
    kernel_.run({values + at, skip + at, weight, width_, epsilon_, sum + at, y + at});
  });
}

void SkipNormOp::InferShapes(const ShapeInference& shapes) {
  for (const size_t output : {0, 1}) shapes.SetLike(output, kFloat, shapes.Int("N"));
}

}  // namespace splitq::ops
