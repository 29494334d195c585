// Features: AVX-512 F.
// Idea: four keys with up to six queries, each pair with a register of sums; eight or sixteen
// registers are added up together, as a matrix is turned, into as many scores. Means of up to six
// rows keep 64 channels in registers. Keys and values are read in the order in which they lie: a
// decoder's step takes as long as its memory. The softmax is attention/loops.h.
#include <immintrin.h>

#include "attention/loops.h"
#include "attention/x86.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

constexpr int kTile = 4;         // keys, registers of a mean
constexpr int64_t kRows = 6;     // queries of a tile, at most
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

// Of each of four registers, the sums of every fourth number.
SPLITQ_INLINE __m512 AddFour(const __m512* sums) {
  return AddPairs(AddHalves(sums[0], sums[1]), AddHalves(sums[2], sums[3]));
}

// The sum of each of sixteen registers.
SPLITQ_INLINE __m512 AddSixteen(const __m512* sums) {
  return AddLanes(AddLanes(AddFour(sums), AddFour(sums + 4)),
                  AddLanes(AddFour(sums + 8), AddFour(sums + 12)));
}

// The sum of each of eight registers.
SPLITQ_INLINE __m256 AddEight(const __m512* sums) {
  const __m512 lanes = AddLanes(AddFour(sums), AddFour(sums + 4));
  return _mm512_castps512_ps256(AddLanes(lanes, lanes));
}

// Scores of four keys: scores[4 r + i] is that of query r and key i. Those of rows up to the next
// even number are written.
template <int rows, typename Element>
SPLITQ_INLINE void ScoreKeys(const float* queries, const Element* keys, int64_t width,
                             float* scores) {
  constexpr int kSums = (rows + 1) / 2 * 2 * kTile;
  __m512 sums[kSums];
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
  if constexpr (kSums >= 16) _mm512_storeu_ps(scores, AddSixteen(sums));
  if constexpr (kSums % 16 != 0) {
    _mm256_storeu_ps(scores + kSums - 8, AddEight(sums + kSums - 8));
  }
}

template <int rows, typename Element>
SPLITQ_INLINE void ScoreRows(const float* queries, const Element* keys, int64_t width,
                             int64_t count, float* scores, int64_t stride) {
  int64_t key = 0;
  for (; key + kTile <= count; key += kTile) {
    PrefetchAhead(keys + key * width, kTile * width);
    float tile[kRows * kTile];
    ScoreKeys<rows>(queries, keys + key * width, width, tile);
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
#pragma GCC unroll 6
  for (auto& row : sums) {
    for (auto& sum : row) sum = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < count; ++i, values += width) {
    PrefetchAhead(values, kTile * kVector);
    __m512 value[kTile];
    for (int v = 0; v < kTile; ++v) value[v] = Load(masks[v], values + v * kVector);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const __m512 weight = _mm512_set1_ps(weights[r * stride + i]);
      for (int v = 0; v < kTile; ++v) sums[r][v] = _mm512_fmadd_ps(weight, value[v], sums[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < kTile; ++v) {
      _mm512_mask_storeu_ps(means + r * width + v * kVector, masks[v], sums[r][v]);
    }
  }
}

SPLITQ_INLINE int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of each tile but the last, of as many rows: the fewest tiles, of nearly the same size.
SPLITQ_INLINE int64_t TileRows(int64_t rows) {
  const int64_t tiles = (rows + kRows - 1) / kRows;
  return tiles == 0 ? 1 : (rows + tiles - 1) / tiles;
}

template <int number>
struct Rows {
  static constexpr int kCount = number;
};

// body(Rows<rows>()), rows from 1 to kRows.
template <typename Body>
SPLITQ_INLINE void WithRows(int64_t rows, const Body& body) {
  switch (rows) {
    case 1:
      return body(Rows<1>());
    case 2:
      return body(Rows<2>());
    case 3:
      return body(Rows<3>());
    case 4:
      return body(Rows<4>());
    case 5:
      return body(Rows<5>());
    default:
      return body(Rows<6>());
  }
}

template <typename Element>
SPLITQ_INLINE void ScoreAll(const float* queries, int64_t rows, const Element* keys, int64_t width,
                            int64_t count, float* scores, int64_t stride) {
  const int64_t tile = TileRows(rows);
  for (int64_t row = 0; row < rows; row += tile) {
    WithRows(Least(tile, rows - row), [&](auto some) {
      ScoreRows<some.kCount>(queries + row * width, keys, width, count, scores + row * stride,
                             stride);
    });
  }
}

template <typename Element>
SPLITQ_INLINE void MeanAll(const float* weights, int64_t stride, int64_t rows,
                           const Element* values, int64_t width, int64_t count, float* means) {
  constexpr int64_t kChannels = kTile * kVector;
  const int64_t tile = TileRows(rows);
  for (int64_t row = 0; row < rows; row += tile) {
    for (int64_t k = 0; k < width; k += kChannels) {
      WithRows(Least(tile, rows - row), [&](auto some) {
        MeanRows<some.kCount>(weights + row * stride, stride, values + k, width,
                              Least(kChannels, width - k), count, means + row * width + k);
      });
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
