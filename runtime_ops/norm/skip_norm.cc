#include "norm/skip_norm.h"

#include <iterator>

#include "norm/avx2.h"
#include "norm/skip_norm_loop.h"

namespace splitq {
namespace {

void SkipNormPlain(const SkipNormRow& row) { SkipNormLoop(row); }

constexpr SkipNormKernel kKernels[] = {
#if defined(SPLITQ_AVX2)
    {"skip_norm_avx2", Isa::kAvx2, SkipNormAvx2},
#endif
    {"skip_norm_plain", Isa::kScalar, SkipNormPlain},
};

}  // namespace

List<SkipNormKernel> AllSkipNormKernels() { return {kKernels, std::size(kKernels)}; }

const SkipNormKernel& FindSkipNormKernel(Isa isa) {
  const SkipNormKernel* kernel = kKernels;
  while (kernel->isa > isa) ++kernel;
  return *kernel;
}

}  // namespace splitq
