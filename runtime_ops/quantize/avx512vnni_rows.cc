// Reads: float rows. Tile: 16 values; the values left over one by one. Features: AVX-512 F.
// Exactness: the bits of the scalar form, which does the same one product.
// Idea: 16 channels whose sources lie among 32 are permuted out of two registers, because loads of
// single values, gathered by one instruction or by 16, take several times as long.
//
// Everything here has internal linkage, as in gemm/avx2_low_bits.cc.
#include <immintrin.h>

#include "quantize/avx512vnni.h"
#include "quantize/gather.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

SPLITQ_INLINE __m512 LoadBlock(const ChannelGather& gather, const float* x, int64_t i) {
  if (gather.order == nullptr) return _mm512_loadu_ps(x + i);
  const int32_t* order = gather.order + i;
  const int32_t first = gather.windows[i / kGatherBlock];
  if (first < 0) {
    float values[kGatherBlock];
    for (int64_t j = 0; j < kGatherBlock; ++j) values[j] = x[order[j]];
    return _mm512_loadu_ps(values);
  }
  const __m512i places = _mm512_sub_epi32(_mm512_loadu_si512(order), _mm512_set1_epi32(first));
  const float* window = x + first;
  return _mm512_permutex2var_ps(_mm512_loadu_ps(window), places,
                                _mm512_loadu_ps(window + kGatherBlock));
}

SPLITQ_INLINE float LoadOne(const ChannelGather& gather, const float* x, int64_t i) {
  const float value = x[gather.order != nullptr ? gather.order[i] : i];
  return gather.scale != nullptr ? value * gather.scale[i] : value;
}

}  // namespace

void GatherAvx512Vnni(const ChannelGather& gather, const float* x, int64_t begin, int64_t count,
                      float* out) {
  const int64_t end = begin + count;
  int64_t i = begin;
  for (; i < end && i % kGatherBlock != 0; ++i) *out++ = LoadOne(gather, x, i);
  for (; i + kGatherBlock <= end; i += kGatherBlock, out += kGatherBlock) {
    __m512 values = LoadBlock(gather, x, i);
    if (gather.scale != nullptr) values = _mm512_mul_ps(values, _mm512_loadu_ps(gather.scale + i));
    _mm512_storeu_ps(out, values);
  }
  for (; i < end; ++i) *out++ = LoadOne(gather, x, i);
}

}  // namespace splitq
