// One activation row to the integer codes of its channel groups: gather, transform, quantize.
#pragma once

#include <array>
#include <cstdint>

#include "quantize/kronecker.h"
#include "quantize/rows.h"

namespace splitq {

inline constexpr int kGroups = 3;  // main, text, vision
inline constexpr int kMain = 0;

struct ChannelGroup {
  int64_t width = 0;
  KroneckerFactors factors;
  RowQuantization quantization;
};

struct ActivationPlan {
  const RowKernels* kernels = nullptr;
  ChannelGather gather;  // of all channels
  std::array<ChannelGroup, kGroups> groups;
  int residual_bits = 8;
};

// Where the codes of one row go; null codes skip a group or the residual.
struct RowTarget {
  std::array<CodeTarget, kGroups> groups;
  CodeTarget residual;  // of the main group, which must not be skipped then
};

// Floats of working memory that QuantizeRow needs.
inline int64_t RowWorkspace(const ActivationPlan& plan) { return 2 * plan.gather.channels; }

// x: [gather.channels]; workspace: [RowWorkspace(plan)]; ahead: may be null.
void QuantizeRow(const ActivationPlan& plan, const float* x, ReadAhead* ahead, float* workspace,
                 const RowTarget& target);

}  // namespace splitq
