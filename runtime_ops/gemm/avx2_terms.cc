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

// 8 of the 16 channels, from channel `first` on.
template <bool with_row_scale, bool add>
SPLITQ_INLINE void Half(const PanelSums& panel, int64_t first, float* terms) {
  const __m256 scale = _mm256_loadu_ps(panel.channel_scale + first);
  for (int64_t m = 0; m < panel.rows; ++m) {
    __m256 value = LoadSums(panel.sums + m * kPanel + first);
    if (with_row_scale) value = _mm256_mul_ps(value, _mm256_broadcast_ss(panel.row_scale + m));
    value = _mm256_mul_ps(value, scale);
    float* target = terms + m * kPanel + first;
    if (add) value = _mm256_add_ps(_mm256_loadu_ps(target), value);
    _mm256_storeu_ps(target, value);
  }
}

template <bool with_row_scale, bool add>
SPLITQ_INLINE void Run(const PanelSums& panel, float* terms) {
  Half<with_row_scale, add>(panel, 0, terms);
  Half<with_row_scale, add>(panel, kLanes, terms);
}

SPLITQ_INLINE void Copy(const float* terms, int64_t rows, float* y, int64_t y_stride) {
  for (int64_t m = 0; m < rows; ++m, terms += kPanel, y += y_stride) {
    _mm256_storeu_ps(y, _mm256_loadu_ps(terms));
    _mm256_storeu_ps(y + kLanes, _mm256_loadu_ps(terms + kLanes));
  }
}

}  // namespace

void SetTermsAvx2(const PanelSums& panel, float* terms) { Run<true, false>(panel, terms); }
void AddTermsAvx2(const PanelSums& panel, float* terms) { Run<true, true>(panel, terms); }
void AddBlockTermsAvx2(const PanelSums& panel, float* terms) { Run<false, true>(panel, terms); }

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
