// The list of micro-kernels.
#pragma once

#include "gemm/kernel.h"
#include "gemm/terms.h"
#include "include/list.h"

namespace splitq {

// All kernels of this build, the fastest instruction set first.
List<GemmKernel> AllKernels();
List<TermKernels> AllTermKernels();

// The first kernel of the list for this bit width that needs no more than `isa`.
// bits: 2, 3, 4, 6 or 8.
const GemmKernel& FindKernel(int bits, Isa isa);

// The term kernels of this instruction set or the best one below it.
const TermKernels& FindTermKernels(Isa isa);

}  // namespace splitq
