// 8 and 4 floats for quantize/matrix_product.h; AVX2, FMA.
#pragma once

#include <immintrin.h>

#include "quantize/matrix_product.h"

namespace splitq {
namespace {

struct Eight {
  using Register = __m256;
  static constexpr int kCount = 8, kRows = 4, kVectors = 2;
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
  static constexpr int kCount = 4, kRows = 4, kVectors = 2;
  static SPLITQ_INLINE __m128 Zero() { return _mm_setzero_ps(); }
  static SPLITQ_INLINE __m128 Load(const float* p) { return _mm_loadu_ps(p); }
  static SPLITQ_INLINE __m128 Broadcast(const float* p) { return _mm_broadcast_ss(p); }
  static SPLITQ_INLINE void Store(float* p, __m128 v) { _mm_storeu_ps(p, v); }
  static SPLITQ_INLINE __m128 MultiplyAdd(__m128 a, __m128 b, __m128 c) {
    return _mm_fmadd_ps(a, b, c);
  }
};

}  // namespace
}  // namespace splitq
