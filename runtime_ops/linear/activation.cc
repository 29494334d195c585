#include "linear/activation.h"

#include "quantize/gather.h"

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

}  // namespace

void QuantizeRow(const ActivationPlan& plan, const float* x, float* workspace,
                 const RowTarget& target) {
  float* gathered = workspace;
  float* product = workspace + plan.channels;
  float* transformed = product + plan.channels;
  GatherChannels(x, plan.order, plan.scale, plan.channels, gathered);
  for (int g = 0; g < kGroups; ++g) {
    const ChannelGroup& group = plan.groups[g];
    if (group.width > 0 && target.codes[g] != nullptr) {
      const float* values = gathered;
      if (group.factors.p1 != nullptr) {
        plan.kernels->apply_kronecker(group.factors, gathered, product, transformed);
        values = transformed;
      }
      *target.scale[g] = QuantizeRowValues(*plan.kernels, group.quantization, values, group.width,
                                           target.codes[g]);
      if (g == kMain && target.residual != nullptr) {
        QuantizeResidual(plan, values, product, target);
      }
    }
    gathered += group.width;
  }
}

}  // namespace splitq
