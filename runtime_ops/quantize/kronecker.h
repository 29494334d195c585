// The transform of a group of channels (eq. 2).
#pragma once

#include <cstdint>

#include "quantize/kernel.h"

namespace splitq {

// P = P1 (x) P2 of a group of width blocks * a * b, where P1 has `blocks` matrices on its diagonal
// and zeros elsewhere; p1 == nullptr is the identity.
struct KroneckerFactors {
  const float* p1 = nullptr;  // [blocks, a, a]
  const float* p2 = nullptr;  // [b, b]
  int64_t a = 0;
  int64_t b = 0;
  int64_t blocks = 1;
};

// A group of a row that is to be gathered.
struct GatheredGroup {
  const ChannelGather& gather;
  const float* x;  // [gather.channels]
  int64_t begin;   // of the group in the gathered order
};

// out = g P of a group g, p1 and p2 given. product: [a * b], working memory
// out: [blocks * a * b]
void ApplyKronecker(const RowKernels& kernels, const KroneckerFactors& factors,
                    const GatheredGroup& group, ReadAhead* ahead, float* product, float* out);

}  // namespace splitq
