// Root mean square normalization of a residual sum: y = s / sqrt(mean(s^2) + epsilon) * weight with
// s = x + skip.
#pragma once

#include <cstdint>

#include "cpu/features.h"
#include "include/list.h"

namespace splitq {

// A row. All arrays: [width]; sum and y overlap nothing else; no alignment is promised.
struct SkipNormRow {
  const float* x;
  const float* skip;
  const float* weight;
  int64_t width;
  float epsilon;
  float* sum;
  float* y;
};

struct SkipNormKernel {
  const char* name;  // skip_norm_isa
  Isa isa;           // what the processor must have

  // Every form gives the same bits.
  void (*run)(const SkipNormRow& row);
};

// All kernels of this build, the fastest instruction set first.
List<SkipNormKernel> AllSkipNormKernels();

// The first of the list that needs no more than `isa`.
const SkipNormKernel& FindSkipNormKernel(Isa isa);

}  // namespace splitq
