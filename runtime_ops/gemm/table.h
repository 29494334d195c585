// The list of micro-kernels.
#pragma once

#include <cstddef>

#include "gemm/kernel.h"
#include "gemm/terms.h"

namespace splitq {

// All kernels of this build, the fastest instruction set first.
struct GemmKernels {
  const GemmKernel* first;
  size_t count;

  const GemmKernel* begin() const { return first; }
  const GemmKernel* end() const { return first + count; }
};
GemmKernels AllKernels();

// The first kernel of the list for this bit width that needs no more than `isa`.
// bits: 2, 3, 4 or 8.
const GemmKernel& FindKernel(int bits, Isa isa);

// The term kernels of this instruction set or the best one below it.
const TermKernels& FindTermKernels(Isa isa);

}  // namespace splitq
