// The whole quantized layer on raw pointers (SplitQLinear of docs/ops.md).
#pragma once

#include <array>
#include <cstdint>

#include "include/parallel_for.h"
#include "linear/activation.h"
#include "linear/correction.h"
#include "linear/weight.h"

namespace splitq {

struct SplitLinear {
  ActivationPlan activation;
  std::array<PackedWeight, kGroups> weights;  // of the groups with channels
  bool corrected = false;
  Correction correction;        // if corrected
  const float* bias = nullptr;  // [N] or null

  int64_t channels_out() const { return weights[kMain].channels_out; }
};

struct SplitLinearRows {
  const float* x = nullptr;          // [rows, K]
  const int8_t* modality = nullptr;  // [rows], null unless MAC looks at it
  int64_t rows = 0;                  // > 0
  float* y = nullptr;                // [rows, N]
};

// Bytes of scratch memory for this many rows.
int64_t ScratchBytes(const SplitLinear& layer, int64_t rows);

// scratch: [ScratchBytes(layer, data.rows)], any alignment.
void RunSplitLinear(const SplitLinear& layer, const SplitLinearRows& data, void* scratch,
                    const ParallelFor& parallel);

}  // namespace splitq
