// A matrix product for any vector type: tiles stay in registers while k runs over a row of the
// right matrix and broadcasts from the left one. The last columns of a row are full registers that
// overlap those before: the same elements come out the same. Each element is summed in order of k
// with fused multiply-adds.
//
// The files that include this are compiled for different processors: everything here has internal
// linkage, lest the linker keep a copy for a newer one.
#pragma once

#include "quantize/kernel.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

// A vector type V has
//   Register, kCount   its register and floats
//   kRows, kVectors    its tile in rows and registers
//   Zero, Load, Broadcast, Store, MultiplyAdd

// One float, for matrices narrower than the narrowest register.
struct One {
  using Register = float;
  static constexpr int kCount = 1, kRows = 1, kVectors = 1;
  static SPLITQ_INLINE float Zero() { return 0.0f; }
  static SPLITQ_INLINE float Load(const float* p) { return *p; }
  static SPLITQ_INLINE float Broadcast(const float* p) { return *p; }
  static SPLITQ_INLINE void Store(float* p, float v) { *p = v; }
  static SPLITQ_INLINE float MultiplyAdd(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
  }
};

// Asks for a cache line at each call, until all were.
SPLITQ_INLINE void Step(MemoryRange& range) {
  constexpr int64_t kLine = 64;
  if (range.bytes <= 0) return;
  __builtin_prefetch(range.data);
  range.data = static_cast<const char*>(range.data) + kLine;
  range.bytes -= kLine;
}

// Rows i .. i + rows, `vectors` registers of columns from column j on.
template <typename V, int rows, int vectors>
SPLITQ_INLINE void ProductTile(const MatrixProduct& p, int64_t i, int64_t j) {
  typename V::Register sums[rows][vectors];
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) sums[r][v] = V::Zero();
  }
  const float* left = p.left + i * p.row_step;
  const float* right = p.right + j;
  MemoryRange ahead = {};
  if (p.ahead != nullptr) ahead = p.ahead->now;
  for (int64_t k = 0; k < p.depth; ++k, left += p.k_step, right += p.columns) {
    Step(ahead);
    typename V::Register values[vectors];
    for (int v = 0; v < vectors; ++v) values[v] = V::Load(right + v * V::kCount);
    for (int r = 0; r < rows; ++r) {
      const typename V::Register factor = V::Broadcast(left + r * p.row_step);
      for (int v = 0; v < vectors; ++v) {
        sums[r][v] = V::MultiplyAdd(factor, values[v], sums[r][v]);
      }
    }
  }
  if (p.ahead != nullptr) {
    if (ahead.bytes > 0) {
      p.ahead->now = ahead;
    } else {
      *p.ahead = {p.ahead->then, {}};
    }
  }
  float* out = p.out + i * p.columns + j;
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) V::Store(out + r * p.columns + v * V::kCount, sums[r][v]);
  }
}

// Rows i .. i + count of these columns, 1 <= count <= rows.
template <typename V, int rows, int vectors>
SPLITQ_INLINE void ProductRows(const MatrixProduct& p, int64_t i, int64_t count, int64_t j) {
  if (count == rows) return ProductTile<V, rows, vectors>(p, i, j);
  if constexpr (rows > 1) ProductRows<V, rows - 1, vectors>(p, i, count, j);
}

// All rows of these columns. The last ones, when they are more than a tile, make two of nearly the
// same size: the sums of a tile of few rows would wait for themselves.
template <typename V, int vectors>
SPLITQ_INLINE void ProductColumns(const MatrixProduct& p, int64_t j) {
  int64_t i = 0;
  for (; p.rows - i >= 2 * V::kRows; i += V::kRows) ProductTile<V, V::kRows, vectors>(p, i, j);
  const int64_t last = p.rows - i;
  const int64_t first = last <= V::kRows ? last : (last + 1) / 2;
  ProductRows<V, V::kRows, vectors>(p, i, first, j);
  if (first < last) ProductRows<V, V::kRows, vectors>(p, i + first, last - first, j);
}

// Columns outside, so that those of the right matrix stay in the L1 cache. At least V::kCount.
template <typename V>
SPLITQ_INLINE void MultiplyBy(const MatrixProduct& p) {
  constexpr int64_t kWide = V::kVectors * V::kCount;
  int64_t j = 0;
  for (; j + kWide <= p.columns; j += kWide) ProductColumns<V, V::kVectors>(p, j);
  if (j + V::kCount < p.columns && kWide <= p.columns) {
    return ProductColumns<V, V::kVectors>(p, p.columns - kWide);
  }
  for (; j + V::kCount <= p.columns; j += V::kCount) ProductColumns<V, 1>(p, j);
  if (j < p.columns) ProductColumns<V, 1>(p, p.columns - V::kCount);
}

// By the first vector type that is not wider than the matrices.
template <typename V, typename... Narrower>
SPLITQ_INLINE void Multiply(const MatrixProduct& p) {
  if constexpr (sizeof...(Narrower) > 0) {
    if (p.columns < V::kCount) return Multiply<Narrower...>(p);
  }
  MultiplyBy<V>(p);
}

}  // namespace
}  // namespace splitq
