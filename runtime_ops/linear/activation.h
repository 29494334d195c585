// One activation row to the integer codes of its channel groups: gather, transform, quantize.
#pragma once

#include <array>
#include <cstdint>

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
  int64_t channels = 0;
  const int32_t* order = nullptr;  // [channels], null for the identity
  const float* scale = nullptr;    // [channels], null for ones
  std::array<ChannelGroup, kGroups> groups;
  int residual_bits = 8;
};

// Where the codes of one row go; null codes skip a group, null residual skips the residual.
struct RowTarget {
  std::array<int8_t*, kGroups> codes{};
  std::array<float*, kGroups> scale{};
  int8_t* residual = nullptr;
  float* residual_scale = nullptr;
};

// Floats of working memory that QuantizeRow needs.
inline int64_t RowWorkspace(const ActivationPlan& plan) { return 3 * plan.channels; }

// x: [channels]; workspace: [RowWorkspace(plan)]. The residual needs the main codes.
void QuantizeRow(const ActivationPlan& plan, const float* x, float* workspace,
                 const RowTarget& target);

}  // namespace splitq
