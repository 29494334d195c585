// The loops of the norm, plain C++ that compilers turn into vectors: 16 sums of squares side by
// side.
//
// The files that include this are compiled for different processors: everything here has internal
// linkage, lest the linker keep a copy for a newer one.
#pragma once

#include <math.h>  // sqrtf, which is no template

#include <cstdint>

#include "include/restrict.h"
#include "norm/skip_norm.h"

namespace splitq {
namespace {

constexpr int64_t kLanes = 16;

// sum = x + skip; returns the sum of its squares.
inline float AddRow(const float* SPLITQ_RESTRICT x, const float* SPLITQ_RESTRICT skip,
                    int64_t width, float* SPLITQ_RESTRICT sum) {
  const int64_t whole = width / kLanes * kLanes;
  float squares[kLanes] = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = x[i + lane] + skip[i + lane];
      sum[i + lane] = value;
      squares[lane] += value * value;
    }
  }
  for (int64_t i = whole; i < width; ++i) {
    sum[i] = x[i] + skip[i];
    squares[i - whole] += sum[i] * sum[i];
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) squares[lane] += squares[lane + half];
  }
  return squares[0];
}

inline void ScaleRow(const float* SPLITQ_RESTRICT sum, const float* SPLITQ_RESTRICT weight,
                     float factor, int64_t width, float* SPLITQ_RESTRICT y) {
  for (int64_t i = 0; i < width; ++i) y[i] = sum[i] * factor * weight[i];
}

inline void SkipNormLoop(const SkipNormRow& row) {
  const float squares = AddRow(row.x, row.skip, row.width, row.sum);
  const float mean = squares / static_cast<float>(row.width);
  ScaleRow(row.sum, row.weight, 1.0f / sqrtf(mean + row.epsilon), row.width, row.y);
}

}  // namespace
}  // namespace splitq
