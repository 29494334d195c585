// Reads: float rows. Tile: 8 values, 32 for codes; the values left over one by one. Features: AVX2,
// no FMA: the contract rounds product and difference one after the other.
// Exactness: the bits of the scalar form, because each lane does the same operations and extremes
// do not depend on their order. vmaxps and vminps return their second operand when one is a NaN.
// Idea: the scalar loops, 8 lanes at a time.
//
// Everything here has internal linkage, as in gemm/avx2_low_bits.cc.
#include <immintrin.h>

#include "quantize/avx2.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

constexpr int64_t kLanes = 8;

struct Lanes {
  __m256 low, high;
};

SPLITQ_INLINE void Include(__m256 values, Lanes& lanes) {
  lanes.low = _mm256_min_ps(values, lanes.low);
  lanes.high = _mm256_max_ps(values, lanes.high);
}

// Lowest and highest of 8 lanes, none a NaN.
SPLITQ_INLINE Extremes Reduce(const Lanes& lanes) {
  __m128 low = _mm_min_ps(_mm256_castps256_ps128(lanes.low), _mm256_extractf128_ps(lanes.low, 1));
  __m128 high =
      _mm_max_ps(_mm256_castps256_ps128(lanes.high), _mm256_extractf128_ps(lanes.high, 1));
  low = _mm_min_ps(low, _mm_movehl_ps(low, low));
  high = _mm_max_ps(high, _mm_movehl_ps(high, high));
  low = _mm_min_ss(low, _mm_movehdup_ps(low));
  high = _mm_max_ss(high, _mm_movehdup_ps(high));
  return {_mm_cvtss_f32(low), _mm_cvtss_f32(high)};
}

struct Encoder {
  __m256 inverse, low, high;
};

// Clamped first, so that what is rounded is small; vcvtps2dq rounds half to even.
SPLITQ_INLINE __m256i EncodeLanes(__m256 values, const Encoder& encoder) {
  const __m256 raised = _mm256_max_ps(_mm256_mul_ps(values, encoder.inverse), encoder.low);
  return _mm256_cvtps_epi32(_mm256_min_ps(raised, encoder.high));
}

SPLITQ_INLINE __m128i EncodeOne(const float* value, const Encoder& encoder) {
  const __m128 scaled = _mm_mul_ss(_mm_load_ss(value), _mm256_castps256_ps128(encoder.inverse));
  const __m128 raised = _mm_max_ss(scaled, _mm256_castps256_ps128(encoder.low));
  return _mm_cvtps_epi32(_mm_min_ss(raised, _mm256_castps256_ps128(encoder.high)));
}

// 32 integers to bytes; the packs work on halves, the permutation puts the bytes in order.
SPLITQ_INLINE __m256i Pack(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

SPLITQ_INLINE __m256 WidenCodes(const int8_t* codes) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

}  // namespace

Extremes FindExtremesAvx2(const float* values, int64_t width) {
  Lanes even{_mm256_setzero_ps(), _mm256_setzero_ps()}, odd = even;
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    Include(_mm256_loadu_ps(values + i), even);
    Include(_mm256_loadu_ps(values + i + kLanes), odd);
  }
  for (; i + kLanes <= width; i += kLanes) Include(_mm256_loadu_ps(values + i), even);
  for (; i < width; ++i) Include(_mm256_set1_ps(values[i]), odd);
  return Reduce({_mm256_min_ps(even.low, odd.low), _mm256_max_ps(even.high, odd.high)});
}

void EncodeAvx2(const float* values, int64_t width, Encoding encoding, int8_t* codes) {
  const Encoder encoder{_mm256_set1_ps(encoding.inverse), _mm256_set1_ps(encoding.low),
                        _mm256_set1_ps(encoding.high)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    __m256i parts[4];
    for (int part = 0; part < 4; ++part) {
      parts[part] = EncodeLanes(_mm256_loadu_ps(values + i + part * kLanes), encoder);
    }
    const __m256i bytes = Pack(parts[0], parts[1], parts[2], parts[3]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), bytes);
  }
  for (; i + kLanes <= width; i += kLanes) {
    const __m256i part = EncodeLanes(_mm256_loadu_ps(values + i), encoder);
    const __m128i bytes = _mm256_castsi256_si128(Pack(part, part, part, part));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), bytes);
  }
  for (; i < width; ++i) {
    codes[i] = static_cast<int8_t>(_mm_cvtsi128_si32(EncodeOne(values + i, encoder)));
  }
}

int32_t SumCodesAvx2(const int8_t* codes, int64_t width) {
  __m256i total = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= width; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
    total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  int32_t sum = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
  for (; i < width; ++i) sum += codes[i];
  return sum;
}

void SubtractCodesAvx2(const float* values, const int8_t* codes, float scale, int64_t width,
                       float* out) {
  const __m256 scales = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const __m256 quantized = _mm256_mul_ps(WidenCodes(codes + i), scales);
    _mm256_storeu_ps(out + i, _mm256_sub_ps(_mm256_loadu_ps(values + i), quantized));
  }
  for (; i < width; ++i) {
    const float quantized = static_cast<float>(codes[i]) * scale;
    out[i] = values[i] - quantized;
  }
}

}  // namespace splitq
