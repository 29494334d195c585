// Reads: row-major float matrices of any size. Tile: 4 rows x 16 columns, smaller at the edges.
// Features: AVX2, FMA.
// Exactness: float, each element summed in order of k with fused multiply-adds; whole numbers that
// stay below 2^24 are exact.
// Idea: two matrix products; a tile of the result stays in registers while k runs over a row of the
// right matrix and broadcasts from the left one. The last columns of a row are a full register that
// overlaps the one before: the same elements come out the same.
//
// Everything here has internal linkage, as in gemm/avx2_low_bits.cc.
#include <immintrin.h>

#include "quantize/avx2.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

// out[i][j] = sum over k < depth of left[i * row_step + k * k_step] * right[k][j]; right and out
// have `columns` columns.
struct Product {
  const float* left;
  int64_t row_step, k_step;
  const float* right;
  int64_t depth, columns;
  float* out;
};

// 8 floats and 4 floats with one set of names.
struct Eight {
  using Register = __m256;
  static constexpr int kCount = 8;
  static SPLITQ_INLINE __m256 Zero() { return _mm256_setzero_ps(); }
  static SPLITQ_INLINE __m256 Load(const float* p) { return _mm256_loadu_ps(p); }
  static SPLITQ_INLINE __m256 Broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static SPLITQ_INLINE void Store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
  static SPLITQ_INLINE __m256 MultiplyAdd(__m256 a, __m256 b, __m256 c) {
    return _mm256_fmadd_ps(a, b, c);
  }
};

struct Four {
  using Register = __m128;
  static constexpr int kCount = 4;
  static SPLITQ_INLINE __m128 Zero() { return _mm_setzero_ps(); }
  static SPLITQ_INLINE __m128 Load(const float* p) { return _mm_loadu_ps(p); }
  static SPLITQ_INLINE __m128 Broadcast(const float* p) { return _mm_broadcast_ss(p); }
  static SPLITQ_INLINE void Store(float* p, __m128 v) { _mm_storeu_ps(p, v); }
  static SPLITQ_INLINE __m128 MultiplyAdd(__m128 a, __m128 b, __m128 c) {
    return _mm_fmadd_ps(a, b, c);
  }
};

// Rows i .. i + rows, `vectors` registers of columns from column j on.
template <typename V, int rows, int vectors>
SPLITQ_INLINE void Tile(const Product& p, int64_t i, int64_t j) {
  typename V::Register sums[rows][vectors];
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) sums[r][v] = V::Zero();
  }
  const float* left = p.left + i * p.row_step;
  const float* right = p.right + j;
  for (int64_t k = 0; k < p.depth; ++k, left += p.k_step, right += p.columns) {
    typename V::Register values[vectors];
    for (int v = 0; v < vectors; ++v) values[v] = V::Load(right + v * V::kCount);
    for (int r = 0; r < rows; ++r) {
      const typename V::Register factor = V::Broadcast(left + r * p.row_step);
      for (int v = 0; v < vectors; ++v) {
        sums[r][v] = V::MultiplyAdd(factor, values[v], sums[r][v]);
      }
    }
  }
  float* out = p.out + i * p.columns + j;
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) V::Store(out + r * p.columns + v * V::kCount, sums[r][v]);
  }
}

// All columns of these rows; at least V::kCount columns.
template <typename V, int rows>
SPLITQ_INLINE void Rows(const Product& p, int64_t i) {
  int64_t j = 0;
  for (; j + 2 * V::kCount <= p.columns; j += 2 * V::kCount) Tile<V, rows, 2>(p, i, j);
  if (j + V::kCount <= p.columns) {
    Tile<V, rows, 1>(p, i, j);
    j += V::kCount;
  }
  if (j < p.columns) Tile<V, rows, 1>(p, i, p.columns - V::kCount);
}

template <typename V>
SPLITQ_INLINE void AllRows(const Product& p, int64_t count) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) Rows<V, 4>(p, i);
  for (; i + 2 <= count; i += 2) Rows<V, 2>(p, i);
  if (i < count) Rows<V, 1>(p, i);
}

void FewColumns(const Product& p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < p.columns; ++j) {
      __m128 sum = _mm_setzero_ps();
      for (int64_t k = 0; k < p.depth; ++k) {
        sum = _mm_fmadd_ss(_mm_load_ss(p.left + i * p.row_step + k * p.k_step),
                           _mm_load_ss(p.right + k * p.columns + j), sum);
      }
      _mm_store_ss(p.out + i * p.columns + j, sum);
    }
  }
}

void Multiply(const Product& p, int64_t count) {
  if (p.columns >= Eight::kCount) {
    AllRows<Eight>(p, count);
  } else if (p.columns >= Four::kCount) {
    AllRows<Four>(p, count);
  } else {
    FewColumns(p, count);
  }
}

}  // namespace

void ApplyKroneckerAvx2(const KroneckerFactors& factors, const float* g, float* work, float* out) {
  const int64_t a = factors.a, b = factors.b;
  Multiply({g, b, 1, factors.p2, b, b, work}, a);    // work = g P2, [a, b]
  Multiply({factors.p1, 1, a, work, a, b, out}, a);  // out = P1^T work, [a, b]
}

}  // namespace splitq
