#include "gate/swiglu.h"

#include <iterator>

#include "gate/avx2.h"
#include "gate/swiglu_loop.h"

namespace splitq {
namespace {

// For every processor that the compiler is told nothing about; on ARM64 that has NEON.
void SwiGluPlain(const float* gate, const float* up, int64_t width, float* out) {
  SwiGluLoop(gate, up, width, out);
}

constexpr SwiGluKernel kKernels[] = {
#if defined(SPLITQ_AVX2)
    {"swiglu_avx2", Isa::kAvx2, SwiGluAvx2},
#endif
    {"swiglu_plain", Isa::kScalar, SwiGluPlain},
};

}  // namespace

List<SwiGluKernel> AllSwiGluKernels() { return {kKernels, std::size(kKernels)}; }

const SwiGluKernel& FindSwiGluKernel(Isa isa) {
  const SwiGluKernel* kernel = kKernels;
  while (kernel->isa > isa) ++kernel;
  return *kernel;
}

}  // namespace splitq
