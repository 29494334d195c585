#include "linear/activation.h"

namespace splitq {
namespace {

// The transformed values of the group that begins at this channel, in the first part of workspace
// or in x itself.
const float* TransformGroup(const ActivationPlan& plan, const ChannelGroup& group, int64_t begin,
                            const float* x, ReadAhead* ahead, float* workspace) {
  if (group.factors.p1 != nullptr) {
    ApplyKronecker(*plan.kernels, group.factors, {plan.gather, x, begin}, ahead,
                   workspace + plan.gather.channels, workspace);
    return workspace;
  }
  if (plan.gather.order == nullptr && plan.gather.scale == nullptr) return x + begin;
  plan.kernels->gather(plan.gather, x, begin, group.width, workspace);
  return workspace;
}

}  // namespace

void QuantizeRow(const ActivationPlan& plan, const float* x, ReadAhead* ahead, float* workspace,
                 const RowTarget& target) {
  int64_t begin = 0;
  for (int g = 0; g < kGroups; begin += plan.groups[g++].width) {
    const ChannelGroup& group = plan.groups[g];
    if (group.width == 0 || target.groups[g].codes == nullptr) continue;
    const float* values = TransformGroup(plan, group, begin, x, ahead, workspace);
    if (g == kMain && target.residual.codes != nullptr) {
      QuantizeWithResidual(*plan.kernels, group.quantization, plan.residual_bits, values,
                           group.width, workspace + plan.gather.channels, target.groups[g],
                           target.residual);
    } else {
      QuantizeRowValues(*plan.kernels, group.quantization, values, group.width, target.groups[g]);
    }
  }
}

}  // namespace splitq
