// Reads: row-major float matrices of any size. Tile: 4 rows x 16 columns, smaller at the edges.
// Features: NEON.
// Exactness: float; whole numbers that stay below 2^24 are exact.
// Idea: quantize/matrix_product.h.
#include <arm_neon.h>

#include "quantize/matrix_product.h"
#include "quantize/neon.h"

namespace splitq {
namespace {

struct Four {
  using Register = float32x4_t;
  static constexpr int kCount = 4, kRows = 4, kVectors = 4;
  static SPLITQ_INLINE float32x4_t Zero() { return vdupq_n_f32(0.0f); }
  static SPLITQ_INLINE float32x4_t Load(const float* p) { return vld1q_f32(p); }
  static SPLITQ_INLINE float32x4_t Broadcast(const float* p) { return vld1q_dup_f32(p); }
  static SPLITQ_INLINE void Store(float* p, float32x4_t v) { vst1q_f32(p, v); }
  static SPLITQ_INLINE float32x4_t MultiplyAdd(float32x4_t a, float32x4_t b, float32x4_t c) {
    return vfmaq_f32(c, a, b);
  }
};

}  // namespace

void MultiplyNeon(const MatrixProduct& product) { Multiply<Four, One>(product); }

}  // namespace splitq
