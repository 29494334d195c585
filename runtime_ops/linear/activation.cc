#include "linear/activation.h"

namespace splitq {
namespace {

// e = a - code * scale, quantized in turn (eq. 18).
void QuantizeResidual(const ActivationPlan& plan, const float* values, float* workspace,
                      const RowTarget& target) {
  const int64_t width = plan.groups[kMain].width;
  plan.kernels->subtract_codes(values, target.codes[kMain], *target.scale[kMain], width, workspace);
  *target.residual_scale =
      QuantizeRowValues(*plan.kernels, {plan.residual_bits}, workspace, width, target.residual);
}

// The transformed values of the group that begins at this channel, in the first part of workspace
// or in x itself.
const float* TransformGroup(const ActivationPlan& plan, const ChannelGroup& group, int64_t begin,
                            const float* x, ReadAhead* ahead, float* workspace) {
  if (group.factors.p1 != nullptr) {
    float* work = workspace + plan.gather.channels;
    ApplyKronecker(*plan.kernels, group.factors, {plan.gather, x, begin}, ahead, work, workspace);
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
    if (group.width == 0 || target.codes[g] == nullptr) continue;
    const float* values = TransformGroup(plan, group, begin, x, ahead, workspace);
    *target.scale[g] =
        QuantizeRowValues(*plan.kernels, group.quantization, values, group.width, target.codes[g]);
    if (g == kMain && target.residual != nullptr) {
      QuantizeResidual(plan, values, workspace + plan.gather.channels, target);
    }
  }
}

}  // namespace splitq
