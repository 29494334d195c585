// Features: AVX-512 F.
// Idea: four keys with four queries, each pair with a register of sums; the sixteen registers are
// added up together, as a matrix is turned, into the sixteen scores. Means of up to four rows keep
// 64 channels in registers. Keys and values are read in the order in which they lie: a decoder's
// step takes as long as its memory. The softmax is attention/loops.h.
#include <immintrin.h>

#include "attention/loops.h"
#include "attention/x86.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

constexpr int kTile = 4;         // keys, queries, registers of a mean
constexpr int64_t kVector = 16;  // numbers of a register

// Numbers where the mask has ones, zeros elsewhere.
SPLITQ_INLINE __m512 Load(__mmask16 mask, const float* values) {
  return _mm512_maskz_loadu_ps(mask, values);
}

SPLITQ_INLINE __m512 Load(__mmask16 mask, const Half* values) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, values));
}

// Of the next `left` numbers, up to 16.
SPLITQ_INLINE __mmask16 MaskOf(int64_t left) {
  return static_cast<__mmask16>(left >= kVector ? 0xFFFF : left > 0 ? (1 << left) - 1 : 0);
}

// Of each 128 bits of a and b: a0 + a2, b0 + b2, a1 + a3, b1 + b3.
SPLITQ_INLINE __m512 AddHalves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

// Of two results of AddHalves: the sums of four registers' 128 bits.
SPLITQ_INLINE __m512 AddPairs(__m512 a, __m512 b) {
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
}

// Even plus odd 128 bits of a, then of b.
SPLITQ_INLINE __m512 AddLanes(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

// The sum of each of sixteen registers.
SPLITQ_INLINE __m512 AddUp(const __m512* sums) {
  __m512 fours[4];
  for (int i = 0; i < 4; ++i) {
    const __m512* four = sums + 4 * i;
    fours[i] = AddPairs(AddHalves(four[0], four[1]), AddHalves(four[2], four[3]));
  }
  return AddLanes(AddLanes(fours[0], fours[1]), AddLanes(fours[2], fours[3]));
}

// Scores of four keys: lane 4 r + i is that of query r and key i.
template <int rows, typename Element>
SPLITQ_INLINE __m512 ScoreKeys(const float* queries, const Element* keys, int64_t width) {
  __m512 sums[kTile * kTile];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += kVector) {
    const __mmask16 mask = MaskOf(width - k);
    __m512 key[kTile];
    for (int i = 0; i < kTile; ++i) key[i] = Load(mask, keys + i * width + k);
    for (int r = 0; r < rows; ++r) {
      const __m512 query = Load(mask, queries + r * width + k);
      for (int i = 0; i < kTile; ++i) {
        sums[r * kTile + i] = _mm512_fmadd_ps(query, key[i], sums[r * kTile + i]);
      }
    }
  }
  return AddUp(sums);
}

template <int rows, typename Element>
SPLITQ_INLINE void ScoreRows(const float* queries, const Element* keys, int64_t width,
                             int64_t count, float* scores, int64_t stride) {
  int64_t key = 0;
  for (; key + kTile <= count; key += kTile) {
    PrefetchAhead(keys + key * width, kTile * width);
    alignas(64) float tile[kVector];
    _mm512_store_ps(tile, ScoreKeys<rows>(queries, keys + key * width, width));
    for (int r = 0; r < rows; ++r) {
      __builtin_memcpy(scores + r * stride + key, tile + r * kTile, kTile * sizeof(float));
    }
  }
  ScoreLoop(queries, rows, keys + key * width, width, count - key, scores + key, stride);
}

// Up to 64 channels of the means of a few rows.
template <int rows, typename Element>
SPLITQ_INLINE void MeanRows(const float* weights, int64_t stride, const Element* values,
                            int64_t width, int64_t channels, int64_t count, float* means) {
  __mmask16 masks[kTile];
  for (int v = 0; v < kTile; ++v) masks[v] = MaskOf(channels - v * kVector);
  __m512 sums[rows][kTile];
  for (auto& row : sums) {
    for (auto& sum : row) sum = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < count; ++i, values += width) {
    PrefetchAhead(values, kTile * kVector);
    __m512 value[kTile];
    for (int v = 0; v < kTile; ++v) value[v] = Load(masks[v], values + v * kVector);
    for (int r = 0; r < rows; ++r) {
      const __m512 weight = _mm512_set1_ps(weights[r * stride + i]);
      for (int v = 0; v < kTile; ++v) sums[r][v] = _mm512_fmadd_ps(weight, value[v], sums[r][v]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < kTile; ++v) {
      _mm512_mask_storeu_ps(means + r * width + v * kVector, masks[v], sums[r][v]);
    }
  }
}

template <typename Element>
SPLITQ_INLINE void ScoreAll(const float* queries, int64_t rows, const Element* keys, int64_t width,
                            int64_t count, float* scores, int64_t stride) {
  for (; rows > 0; rows -= kTile, queries += kTile * width, scores += kTile * stride) {
    switch (rows) {
      case 1:
        return ScoreRows<1>(queries, keys, width, count, scores, stride);
      case 2:
        return ScoreRows<2>(queries, keys, width, count, scores, stride);
      case 3:
        return ScoreRows<3>(queries, keys, width, count, scores, stride);
      default:
        ScoreRows<kTile>(queries, keys, width, count, scores, stride);
    }
  }
}

template <typename Element>
SPLITQ_INLINE void MeanAll(const float* weights, int64_t stride, int64_t rows,
                           const Element* values, int64_t width, int64_t count, float* means) {
  constexpr int64_t kChannels = kTile * kVector;
  for (; rows > 0; rows -= kTile, weights += kTile * stride, means += kTile * width) {
    for (int64_t k = 0; k < width; k += kChannels) {
      const int64_t channels = width - k < kChannels ? width - k : kChannels;
      const Element* from = values + k;
      float* to = means + k;
      switch (rows) {
        case 1:
          MeanRows<1>(weights, stride, from, width, channels, count, to);
          break;
        case 2:
          MeanRows<2>(weights, stride, from, width, channels, count, to);
          break;
        case 3:
          MeanRows<3>(weights, stride, from, width, channels, count, to);
          break;
        default:
          MeanRows<kTile>(weights, stride, from, width, channels, count, to);
      }
    }
  }
}

}  // namespace

void ScoreAvx512Vnni(const float* queries, int64_t rows, const float* keys, int64_t width,
                     int64_t count, float* scores, int64_t stride) {
  ScoreAll(queries, rows, keys, width, count, scores, stride);
}

void MeanAvx512Vnni(const float* weights, int64_t stride, int64_t rows, const float* values,
                    int64_t width, int64_t count, float* means) {
  MeanAll(weights, stride, rows, values, width, count, means);
}

void ScoreHalfAvx512Vnni(const float* queries, int64_t rows, const Half* keys, int64_t width,
                         int64_t count, float* scores, int64_t stride) {
  ScoreAll(queries, rows, keys, width, count, scores, stride);
}

void MeanHalfAvx512Vnni(const float* weights, int64_t stride, int64_t rows, const Half* values,
                        int64_t width, int64_t count, float* means) {
  MeanAll(weights, stride, rows, values, width, count, means);
}

void WidenAvx512Vnni(const Half* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kVector) {
    const __mmask16 mask = MaskOf(count - i);
    _mm512_mask_storeu_ps(out + i, mask, Load(mask, values + i));
  }
}

void NarrowAvx512Vnni(const float* values, int64_t count, Half* out) {
  for (int64_t i = 0; i < count; i += kVector) {
    const __mmask16 mask = MaskOf(count - i);
    const __m256i halves = _mm512_cvtps_ph(Load(mask, values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16(out + i, mask, halves);
  }
}

void SoftmaxAvx512Vnni(float* row, const float* bias, int64_t count) {
  SoftmaxLoop(row, bias, count);
}

}  // namespace splitq
