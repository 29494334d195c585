// The loops of attention, plain C++ that compilers turn into vectors.
//
// The files that include this are compiled for different processors: everything here has internal
// linkage, lest the linker keep a copy for a newer one.
#pragma once

#include <cstdint>

#include "include/exponential.h"
#include "include/half.h"
#include "include/prefetch.h"

namespace splitq {
namespace {

constexpr int64_t kLanes = 16;  // numbers that are worked on side by side

// Asks for what is read a while after these numbers.
template <typename Element>
SPLITQ_PREFETCH void PrefetchAhead(const Element* values, int64_t count) {
  Prefetch(reinterpret_cast<const char*>(values) + kPrefetchAhead,
           count * static_cast<int64_t>(sizeof(Element)));
}

template <typename Element>
inline float Score(const float* SPLITQ_RESTRICT query, const Element* SPLITQ_RESTRICT key,
                   int64_t width) {
  const int64_t whole = width / kLanes * kLanes;
  float sums[kLanes] = {};
  for (int64_t k = 0; k < whole; k += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums[lane] += query[k + lane] * Widen(key[k + lane]);
    }
  }
  for (int64_t k = whole; k < width; ++k) sums[k - whole] += query[k] * Widen(key[k]);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <typename Element>
inline void ScoreLoop(const float* queries, int64_t rows, const Element* keys, int64_t width,
                      int64_t count, float* scores, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    PrefetchAhead(keys + i * width, width);
    for (int64_t row = 0; row < rows; ++row) {
      scores[row * stride + i] = Score(queries + row * width, keys + i * width, width);
    }
  }
}

template <typename Element>
inline void AddScaled(float weight, const Element* SPLITQ_RESTRICT values, int64_t width,
                      float* SPLITQ_RESTRICT mean) {
  for (int64_t k = 0; k < width; ++k) mean[k] += weight * Widen(values[k]);
}

template <typename Element>
inline void MeanLoop(const float* weights, int64_t stride, int64_t rows, const Element* values,
                     int64_t width, int64_t count, float* means) {
  for (int64_t k = 0; k < rows * width; ++k) means[k] = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    PrefetchAhead(values + i * width, width);
    for (int64_t row = 0; row < rows; ++row) {
      AddScaled(weights[row * stride + i], values + i * width, width, means + row * width);
    }
  }
}

inline void WidenLoop(const Half* SPLITQ_RESTRICT values, int64_t count,
                      float* SPLITQ_RESTRICT out) {
  for (int64_t i = 0; i < count; ++i) out[i] = Widen(values[i]);
}

inline void NarrowLoop(const float* SPLITQ_RESTRICT values, int64_t count,
                       Half* SPLITQ_RESTRICT out) {
  for (int64_t i = 0; i < count; ++i) out[i] = Narrow(values[i]);
}

inline void SoftmaxLoop(float* SPLITQ_RESTRICT row, const float* SPLITQ_RESTRICT bias,
                        int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  float highest[kLanes], sums[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    highest[lane] = -3.402823466e38f;
    sums[lane] = 0.0f;
  }
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float score = row[i + lane] + bias[i + lane];
      row[i + lane] = score;
      highest[lane] = score > highest[lane] ? score : highest[lane];
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    row[i] += bias[i];
    highest[0] = row[i] > highest[0] ? row[i] : highest[0];
  }
  float top = highest[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) top = highest[lane] > top ? highest[lane] : top;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float power = Exponential(row[i + lane] - top);
      row[i + lane] = power;
      sums[lane] += power;
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    row[i] = Exponential(row[i] - top);
    sums[0] += row[i];
  }
  float total = 0.0f;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
  const float inverse = 1.0f / total;
  for (int64_t i = 0; i < count; ++i) row[i] *= inverse;
}

}  // namespace
}  // namespace splitq
