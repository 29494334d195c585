// Reads: row-major float matrices of any size. Tile: 4 rows x 16 columns, smaller at the edges.
// Features: NEON.
// Exactness: float, each element summed in order of k with fused multiply-adds; whole numbers that
// stay below 2^24 are exact.
// Idea: two matrix products; a tile of the result stays in registers while k runs over a row of the
// right matrix and broadcasts from the left one. The last columns of a row are a full register that
// overlaps the one before: the same elements come out the same.
#include <arm_neon.h>

#include "quantize/neon.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

constexpr int64_t kLanes = 4;

// out[i][j] = sum over k < depth of left[i * row_step + k * k_step] * right[k][j]; right and out
// have `columns` columns.
struct Product {
  const float* left;
  int64_t row_step, k_step;
  const float* right;
  int64_t depth, columns;
  float* out;
};

// Rows i .. i + rows, `vectors` registers of columns from column j on.
template <int rows, int vectors>
SPLITQ_INLINE void Tile(const Product& p, int64_t i, int64_t j) {
  float32x4_t sums[rows][vectors] = {};
  const float* left = p.left + i * p.row_step;
  const float* right = p.right + j;
  for (int64_t k = 0; k < p.depth; ++k, left += p.k_step, right += p.columns) {
    float32x4_t values[vectors];
    for (int v = 0; v < vectors; ++v) values[v] = vld1q_f32(right + v * kLanes);
    for (int r = 0; r < rows; ++r) {
      const float factor = left[r * p.row_step];
      for (int v = 0; v < vectors; ++v) sums[r][v] = vfmaq_n_f32(sums[r][v], values[v], factor);
    }
  }
  float* out = p.out + i * p.columns + j;
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) vst1q_f32(out + r * p.columns + v * kLanes, sums[r][v]);
  }
}

// All columns of these rows; at least kLanes columns.
template <int rows>
SPLITQ_INLINE void Rows(const Product& p, int64_t i) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= p.columns; j += 4 * kLanes) Tile<rows, 4>(p, i, j);
  for (; j + kLanes <= p.columns; j += kLanes) Tile<rows, 1>(p, i, j);
  if (j < p.columns) Tile<rows, 1>(p, i, p.columns - kLanes);
}

void FewColumns(const Product& p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < p.columns; ++j) {
      float sum = 0.0f;
      for (int64_t k = 0; k < p.depth; ++k) {
        sum =
            __builtin_fmaf(p.left[i * p.row_step + k * p.k_step], p.right[k * p.columns + j], sum);
      }
      p.out[i * p.columns + j] = sum;
    }
  }
}

void Multiply(const Product& p, int64_t count) {
  if (p.columns < kLanes) return FewColumns(p, count);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) Rows<4>(p, i);
  for (; i + 2 <= count; i += 2) Rows<2>(p, i);
  if (i < count) Rows<1>(p, i);
}

}  // namespace

void ApplyKroneckerNeon(const KroneckerFactors& factors, const float* g, float* work, float* out) {
  const int64_t a = factors.a, b = factors.b;
  Multiply({g, b, 1, factors.p2, b, b, work}, a);    // work = g P2, [a, b]
  Multiply({factors.p1, 1, a, work, a, b, out}, a);  // out = P1^T work, [a, b]
}

}  // namespace splitq
