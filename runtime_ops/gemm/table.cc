#include "gemm/table.h"

#include "gemm/scalar.h"

namespace splitq {
namespace {

// Fastest first; the scalar kernels run everywhere and end the list.
constexpr GemmKernel kKernels[] = {
    {"qd8_qc2w_1x16c4_scalar", 2, RunScalar2},
    {"qd8_qc3w_1x16c4_scalar", 3, RunScalar3},
    {"qd8_qc4w_1x16c4_scalar", 4, RunScalar4},
    {"qd8_qc8w_1x16c4_scalar", 8, RunScalar8},
};

}  // namespace

const GemmKernel& FindKernel(int bits) {
  const GemmKernel* kernel = kKernels;
  while (kernel->bits != bits) ++kernel;
  return *kernel;
}

}  // namespace splitq
