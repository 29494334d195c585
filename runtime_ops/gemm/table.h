// The list of micro-kernels.
#pragma once

#include "gemm/kernel.h"

namespace splitq {

// The first kernel of the list for this bit width. bits: 2, 3, 4 or 8.
const GemmKernel& FindKernel(int bits);

}  // namespace splitq
