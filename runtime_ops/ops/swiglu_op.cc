#include "ops/swiglu_op.h"

#include <algorithm>

#include "include/sizes.h"
#include "ops/weight_input.h"

namespace splitq::ops {
namespace {

constexpr int64_t kTaskElements = int64_t{1} << 14;  // below that waking a thread costs more

}  // namespace

SwiGluOp::SwiGluOp(const Node& node)
    : name_(node.name()),
      width_(node.Int("N", 1, kMaxChannelsOut / 2)),
      kernel_(FindSwiGluKernel(ChooseIsa().isa)) {}

void SwiGluOp::Compute(Call& call) const {
  const Tensor x = call.Rows(0, 2 * width_);
  const int64_t rows = LeadingSize(x.shape);
  const auto* in = x.as<float>();
  auto* out = call.Output<float>(0, WithLast(x.shape, width_));
  const int64_t task_rows = std::max<int64_t>(1, kTaskElements / width_);
  call.Parallel()(CeilDiv(rows, task_rows), rows <= task_rows, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * task_rows);
    for (int64_t row = task * task_rows; row < end; ++row) {
      const float* gate = in + 2 * row * width_;
      kernel_.run(gate, gate + width_, width_, out + row * width_);
    }
  });
}

void SwiGluOp::InferShapes(const ShapeInference& shapes) {
  shapes.SetLike(0, kFloat, shapes.Int("N"));
}

}  // namespace splitq::ops
