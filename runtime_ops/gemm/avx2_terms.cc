// Reads: int32 sums of a panel. Tile: 1 row x 16 channels, two registers. Features: AVX2, no FMA:
// the contract rounds every product and sum.
// Exactness: the bits of the scalar form; each lane does the same operations.
// Idea: the scalar loops, the channel scales kept in registers.
//
// Everything here has internal linkage, as in avx2_low_bits.cc.
#include <immintrin.h>

#include "gemm/avx2.h"
#include "pack/layout.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

constexpr int64_t kLanes = 8;

SPLITQ_INLINE __m256 LoadSums(const int32_t* sums) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums)));
}

// 8 channels of a row.
template <bool with_row_scale, bool add>
SPLITQ_INLINE void Half(const int32_t* sums, __m256 row_scale, __m256 scale, float* terms) {
  __m256 value = LoadSums(sums);
  if (with_row_scale) value = _mm256_mul_ps(value, row_scale);
  value = _mm256_mul_ps(value, scale);
  if (add) value = _mm256_add_ps(_mm256_loadu_ps(terms), value);
  _mm256_storeu_ps(terms, value);
}

template <bool with_row_scale, bool add>
SPLITQ_INLINE void Run(const PanelSums& panels, float* terms) {
  const int32_t* sums = panels.sums;
  for (int64_t p = 0; p < panels.panels; ++p) {
    const __m256 low = _mm256_loadu_ps(panels.channel_scale + p * kPanel);
    const __m256 high = _mm256_loadu_ps(panels.channel_scale + p * kPanel + kLanes);
    for (int64_t m = 0; m < panels.rows; ++m, sums += kPanel, terms += kPanel) {
      const __m256 scale = _mm256_broadcast_ss(panels.row_scale + m);
      Half<with_row_scale, add>(sums, scale, low, terms);
      Half<with_row_scale, add>(sums + kLanes, scale, high, terms + kLanes);
    }
  }
}

SPLITQ_INLINE void Copy(const float* terms, int64_t rows, float* y, int64_t y_stride) {
  for (int64_t m = 0; m < rows; ++m, terms += kPanel, y += y_stride) {
    _mm256_storeu_ps(y, _mm256_loadu_ps(terms));
    _mm256_storeu_ps(y + kLanes, _mm256_loadu_ps(terms + kLanes));
  }
}

}  // namespace

void SetTermsAvx2(const PanelSums& panels, float* terms) { Run<true, false>(panels, terms); }
void AddTermsAvx2(const PanelSums& panels, float* terms) { Run<true, true>(panels, terms); }
void AddBlockTermsAvx2(const PanelSums& panels, float* terms) { Run<false, true>(panels, terms); }

void StoreTermsAvx2(const float* terms, int64_t rows, const float* bias, float* y,
                    int64_t y_stride) {
  if (bias == nullptr) return Copy(terms, rows, y, y_stride);
  const __m256 low = _mm256_loadu_ps(bias), high = _mm256_loadu_ps(bias + kLanes);
  for (int64_t m = 0; m < rows; ++m, terms += kPanel, y += y_stride) {
    _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(terms), low));
    _mm256_storeu_ps(y + kLanes, _mm256_add_ps(_mm256_loadu_ps(terms + kLanes), high));
  }
}

}  // namespace splitq
