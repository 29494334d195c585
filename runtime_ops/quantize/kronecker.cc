// A block g of P's is computed as P1^T (g P2), with g seen as a row-major matrix [a, b]. g lies
// where the result will: the less memory is touched, the more of it stays in the L1 cache.
#include "quantize/kronecker.h"

namespace splitq {

void ApplyKronecker(const RowKernels& kernels, const KroneckerFactors& factors,
                    const GatheredGroup& group, ReadAhead* ahead, float* product, float* out) {
  const int64_t a = factors.a, b = factors.b, width = a * b;
  kernels.gather(group.gather, group.x, group.begin, factors.blocks * width, out);
  const float* p1 = factors.p1;
  for (int64_t block = 0; block < factors.blocks; ++block, p1 += a * a, out += width) {
    kernels.multiply({out, b, 1, factors.p2, a, b, b, product, ahead});
    kernels.multiply({p1, 1, a, product, a, a, b, out, ahead});
  }
}

}  // namespace splitq
