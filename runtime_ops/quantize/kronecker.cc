// g P is computed as P1^T (g P2), with g seen as a row-major matrix [a, b]. A few rows of g at a
// time are gathered and multiplied, so that they stay in the L1 cache.
#include "quantize/kronecker.h"

#include <algorithm>

#include "include/sizes.h"

namespace splitq {
namespace {

constexpr int64_t kMostRows = 16;

}  // namespace

void ApplyKronecker(const RowKernels& kernels, const KroneckerFactors& factors,
                    const GatheredGroup& group, ReadAhead* ahead, float* work, float* out) {
  const int64_t a = factors.a, b = factors.b;
  float* product = work;
  float* g = work + a * b;
  const int64_t step = CeilDiv(a, CeilDiv(a, kMostRows));  // no part much smaller than the others
  for (int64_t i = 0; i < a; i += step) {
    const int64_t rows = std::min(a - i, step);
    kernels.gather(group.gather, group.x, group.begin + i * b, rows * b, g);
    kernels.multiply({g, b, 1, factors.p2, rows, b, b, product + i * b, ahead});
  }
  kernels.multiply({factors.p1, 1, a, product, a, a, b, out, ahead});
}

}  // namespace splitq
