// Reads: int32 sums of a panel. Tile: 1 row x 16 channels, four registers. Features: NEON, no fused
// multiply-add: the contract rounds every product and sum.
// Exactness: the bits of the scalar form; each lane does the same operations.
// Idea: the scalar loops, the channel scales kept in registers.
#include <arm_neon.h>

#include "gemm/neon.h"
#include "pack/layout.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

constexpr int kVectors = 4;
constexpr int64_t kLanes = kPanel / kVectors;

struct Sixteen {
  float32x4_t vector[kVectors];
};

SPLITQ_INLINE Sixteen Load(const float* values) {
  return {vld1q_f32(values), vld1q_f32(values + kLanes), vld1q_f32(values + 2 * kLanes),
          vld1q_f32(values + 3 * kLanes)};
}

template <bool with_row_scale, bool add>
SPLITQ_INLINE void Run(const PanelSums& panels, float* terms) {
  const int32_t* sums = panels.sums;
  for (int64_t p = 0; p < panels.panels; ++p) {
    const Sixteen scale = Load(panels.channel_scale + p * kPanel);
    for (int64_t m = 0; m < panels.rows; ++m) {
      for (int i = 0; i < kVectors; ++i, sums += kLanes, terms += kLanes) {
        float32x4_t value = vcvtq_f32_s32(vld1q_s32(sums));
        if (with_row_scale) value = vmulq_n_f32(value, panels.row_scale[m]);
        value = vmulq_f32(value, scale.vector[i]);
        if (add) value = vaddq_f32(vld1q_f32(terms), value);
        vst1q_f32(terms, value);
      }
    }
  }
}

SPLITQ_INLINE void Copy(const float* terms, int64_t rows, float* y, int64_t y_stride) {
  for (int64_t m = 0; m < rows; ++m, terms += kPanel, y += y_stride) {
    for (int i = 0; i < kVectors; ++i) vst1q_f32(y + i * kLanes, vld1q_f32(terms + i * kLanes));
  }
}

}  // namespace

void SetTermsNeon(const PanelSums& panels, float* terms) { Run<true, false>(panels, terms); }
void AddTermsNeon(const PanelSums& panels, float* terms) { Run<true, true>(panels, terms); }
void AddBlockTermsNeon(const PanelSums& panels, float* terms) { Run<false, true>(panels, terms); }

void StoreTermsNeon(const float* terms, int64_t rows, const float* bias, float* y,
                    int64_t y_stride) {
  if (bias == nullptr) return Copy(terms, rows, y, y_stride);
  const Sixteen added = Load(bias);
  for (int64_t m = 0; m < rows; ++m, terms += kPanel, y += y_stride) {
    for (int i = 0; i < kVectors; ++i) {
      vst1q_f32(y + i * kLanes, vaddq_f32(vld1q_f32(terms + i * kLanes), added.vector[i]));
    }
  }
}

}  // namespace splitq
