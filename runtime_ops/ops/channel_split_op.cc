#include "ops/channel_split_op.h"

#include <algorithm>

#include "include/sizes.h"

namespace splitq::ops {
namespace {

constexpr int kResidual = kGroups;  // its place in the list of outputs
constexpr int64_t kTaskRows = 16;
constexpr int64_t kSerialFloats = 1 << 14;  // less is done before another thread wakes up

struct OutputRows {
  int64_t width = 0;
  int8_t* codes = nullptr;  // [rows, width], null if not wanted
  float* scale = nullptr;   // [rows]
};

CodeTarget RowOf(const OutputRows& output, int64_t row) {
  return {output.codes + row * output.width, output.scale + row};
}

RowTarget TargetOf(const OutputRows (&outputs)[kGroups + 1], int64_t row) {
  RowTarget target;
  for (int g = 0; g < kGroups; ++g) {
    if (outputs[g].codes != nullptr) target.groups[g] = RowOf(outputs[g], row);
  }
  if (outputs[kResidual].codes != nullptr) target.residual = RowOf(outputs[kResidual], row);
  return target;
}

}  // namespace

ChannelSplitKernel::ChannelSplitKernel(const Node& node)
    : name_(node.name()), groups_(node, 1), arena_(node.api(), node.info()) {
  for (int i = 0; i <= kResidual; ++i) {
    const size_t output = 2 * static_cast<size_t>(i);
    const std::string codes = std::string("'") + kOutputs[output].name + "'";
    wanted_[i] = node.HasOutput(output);
    if (wanted_[i] != node.HasOutput(output + 1)) {
      node.Fail("both or neither of output " + codes + " and its scale", "one",
                "export the model again");
    }
    if (wanted_[i] && i < kGroups && groups_.width(i) == 0) {
      node.Fail("no output " + codes + " because " + kGroupNames[i] + " is 0", "one",
                "omit the output");
    }
  }
}

void ChannelSplitKernel::Compute(Call& call) const {
  const ActivationPlan& plan = groups_.plan();
  const Tensor x = call.Rows(0, plan.gather.channels);
  const int64_t rows = LeadingSize(x.shape);
  OutputRows outputs[kGroups + 1];
  for (int i = 0; i <= kResidual; ++i) {
    if (!wanted_[i]) continue;
    const size_t output = 2 * static_cast<size_t>(i);
    outputs[i].width = groups_.width(i == kResidual ? kMain : i);
    outputs[i].codes = call.Output<int8_t>(output, WithLast(x.shape, outputs[i].width));
    outputs[i].scale = call.Output<float>(output + 1, WithLast(x.shape, 1));
  }
  if (rows == 0) return;
  const int64_t tasks = CeilDiv(rows, kTaskRows), task_floats = RowWorkspace(plan);
  const Arena::Block scratch =
      arena_.Allocate(tasks * task_floats * static_cast<int64_t>(sizeof(float)));
  float* const floats = static_cast<float*>(scratch.data());
  const bool serial = plan.gather.channels < kSerialFloats / rows;
  call.Parallel()(tasks, serial, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * kTaskRows);
    for (int64_t m = task * kTaskRows; m < end; ++m) {
      QuantizeRow(plan, x.as<float>() + m * plan.gather.channels, nullptr,
                  floats + task * task_floats, TargetOf(outputs, m));
    }
  });
}

// Only of the required outputs: nothing here tells which others the node has.
void ChannelSplitKernel::InferShapes(const ShapeInference& shapes) {
  shapes.SetLike(0, kInt8, shapes.Ints("group_widths", kGroups)[kMain]);
  shapes.SetLike(1, kFloat, 1);
}

}  // namespace splitq::ops
