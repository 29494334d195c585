// Reads: float rows. Tile: 16 values, 64 for codes; those left over under a mask, gathered ones one
// by one. Features: AVX-512 F, BW.
// Exactness: the bits of the scalar form, because each lane does the same operations and extremes
// do not depend on their order. vmaxps and vminps return their second operand when one is a NaN.
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

// Of the channels from i on, a whole block.
SPLITQ_INLINE __m512 GatherBlock(const ChannelGather& gather, const float* x, size_t i) {
  const GatherWindow& window = gather.windows[i / kGatherBlock];
  if (window.first < 0) {
    const int32_t* order = gather.order + i;
    float values[kGatherBlock];
    for (int64_t j = 0; j < kGatherBlock; ++j) values[j] = x[order[j]];
    return _mm512_loadu_ps(values);
  }
  const __m128i places = _mm_loadu_si128(reinterpret_cast<const __m128i*>(window.places));
  const float* from = x + window.first;
  return _mm512_permutex2var_ps(_mm512_loadu_ps(from), _mm512_cvtepu8_epi32(places),
                                _mm512_loadu_ps(from + kGatherBlock));
}

SPLITQ_INLINE float LoadOne(const ChannelGather& gather, const float* x, int64_t i) {
  const float value = x[gather.order != nullptr ? gather.order[i] : i];
  return gather.scale != nullptr ? value * gather.scale[i] : value;
}

constexpr int64_t kLanes = 16;

// The first `count` lanes, at most all.
SPLITQ_INLINE __mmask16 FirstLanes(int64_t count) {
  return count >= kLanes ? __mmask16{0xFFFF} : static_cast<__mmask16>((1U << count) - 1U);
}

struct Lanes {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
};

SPLITQ_INLINE void Include(__m512 values, Lanes& lanes) {
  lanes.low = _mm512_min_ps(values, lanes.low);
  lanes.high = _mm512_max_ps(values, lanes.high);
}

struct Encoder {
  __m512 inverse, low, high;
};

// Clamped first, so that what is rounded is small; vcvtps2dq rounds half to even.
SPLITQ_INLINE __m512i EncodeLanes(__m512 values, const Encoder& encoder) {
  const __m512 raised = _mm512_max_ps(_mm512_mul_ps(values, encoder.inverse), encoder.low);
  return _mm512_cvtps_epi32(_mm512_min_ps(raised, encoder.high));
}

// 64 integers to bytes; the packs work on quarters, the permutation puts the bytes in order.
SPLITQ_INLINE __m512i Pack(const __m512i* parts) {
  const __m512i low = _mm512_packs_epi32(parts[0], parts[1]);
  const __m512i bytes = _mm512_packs_epi16(low, _mm512_packs_epi32(parts[2], parts[3]));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, bytes);
}

// Extremes of all lanes.
SPLITQ_INLINE Extremes Across(const Lanes& a, const Lanes& b) {
  return {_mm512_reduce_min_ps(_mm512_min_ps(a.low, b.low)),
          _mm512_reduce_max_ps(_mm512_max_ps(a.high, b.high))};
}

// Codes of 16 values of a row, as integers; with_rest: and what they leave.
template <bool with_rest>
SPLITQ_INLINE __m512i Take(__m512 values, __mmask16 lanes, const Encoder& encoder, __m512 scale,
                           float* rest, __m512i& sums, Lanes& extremes) {
  const __m512i codes = EncodeLanes(values, encoder);
  sums = _mm512_mask_add_epi32(sums, lanes, sums, codes);
  if (with_rest) {
    const __m512 left = _mm512_sub_ps(values, _mm512_mul_ps(_mm512_cvtepi32_ps(codes), scale));
    _mm512_mask_storeu_ps(rest, lanes, left);
    Include(_mm512_maskz_mov_ps(lanes, left), extremes);
  }
  return codes;
}

template <bool with_rest>
SPLITQ_INLINE Encoded EncodeRow(const float* values, int64_t width, const Encoding& encoding,
                                float scale, int8_t* codes, float* rest) {
  const Encoder encoder{_mm512_set1_ps(encoding.inverse), _mm512_set1_ps(encoding.low),
                        _mm512_set1_ps(encoding.high)};
  const __m512 scales = _mm512_set1_ps(scale);
  __m512i sums = _mm512_setzero_si512();
  Lanes extremes[2];
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    __m512i parts[4];
    for (int part = 0; part < 4; ++part) {
      const int64_t at = i + part * kLanes;
      parts[part] =
          Take<with_rest>(_mm512_loadu_ps(values + at), FirstLanes(kLanes), encoder, scales,
                          with_rest ? rest + at : nullptr, sums, extremes[part % 2]);
    }
    _mm512_storeu_si512(codes + i, Pack(parts));
  }
  for (; i < width; i += kLanes) {
    const __mmask16 lanes = FirstLanes(width - i);
    const __m512i part = Take<with_rest>(_mm512_maskz_loadu_ps(lanes, values + i), lanes, encoder,
                                         scales, with_rest ? rest + i : nullptr, sums, extremes[0]);
    _mm512_mask_cvtepi32_storeu_epi8(codes + i, lanes, part);
  }
  return {_mm512_reduce_add_epi32(sums), Across(extremes[0], extremes[1])};
}

}  // namespace

Extremes FindExtremesAvx512Vnni(const float* values, int64_t width) {
  Lanes even, odd;
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    Include(_mm512_loadu_ps(values + i), even);
    Include(_mm512_loadu_ps(values + i + kLanes), odd);
  }
  for (; i < width; i += kLanes) {
    Include(_mm512_maskz_loadu_ps(FirstLanes(width - i), values + i), even);
  }
  return Across(even, odd);
}

int32_t EncodeAvx512Vnni(const float* values, int64_t width, Encoding encoding, int8_t* codes) {
  return EncodeRow<false>(values, width, encoding, 0.0f, codes, nullptr).sum;
}

Encoded EncodeWithRestAvx512Vnni(const float* values, int64_t width, Encoding encoding, float scale,
                                 int8_t* codes, float* rest) {
  return EncodeRow<true>(values, width, encoding, scale, codes, rest);
}

namespace {

// Whole blocks of channels [i, end).
template <bool ordered, bool scaled>
void GatherBlocks(const ChannelGather& all, const float* x, size_t i, size_t end, float* out) {
  const ChannelGather gather = all;  // a copy: stores through `out` cannot change it
  for (; i < end; i += kGatherBlock, out += kGatherBlock) {
    __m512 values = ordered ? GatherBlock(gather, x, i) : _mm512_loadu_ps(x + i);
    if (scaled) values = _mm512_mul_ps(values, _mm512_loadu_ps(gather.scale + i));
    _mm512_storeu_ps(out, values);
  }
}

}  // namespace

void GatherAvx512Vnni(const ChannelGather& gather, const float* x, int64_t begin, int64_t count,
                      float* out) {
  const bool ordered = gather.order != nullptr, scaled = gather.scale != nullptr;
  const auto run = ordered ? (scaled ? GatherBlocks<true, true> : GatherBlocks<true, false>)
                           : (scaled ? GatherBlocks<false, true> : GatherBlocks<false, false>);
  const int64_t end = begin + count;
  int64_t i = begin;
  for (; i < end && i % kGatherBlock != 0; ++i) *out++ = LoadOne(gather, x, i);
  const int64_t whole = (end - i) / kGatherBlock * kGatherBlock;
  run(gather, x, static_cast<size_t>(i), static_cast<size_t>(i + whole), out);
  out += whole;
  for (i += whole; i < end; ++i) *out++ = LoadOne(gather, x, i);
}

}  // namespace splitq
