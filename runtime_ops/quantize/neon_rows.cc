// Reads: float rows. Tile: 8 values, 16 for codes; the values left over one by one. Features: NEON,
// no fused multiply-add: the contract rounds product and difference one after the other.
// Exactness: the bits of the scalar form, because each lane does the same operations and extremes
// do not depend on their order. fmin and fmax would let NaNs and negative zeros through, so
// extremes are compared and selected; fminnm and fmaxnm of a product with a NaN give the bound.
// Idea: the scalar loops, 4 lanes at a time.
#include <arm_neon.h>

#include "quantize/neon.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

constexpr int64_t kLanes = 4;

struct Lanes {
  float32x4_t low, high;
};

SPLITQ_INLINE void Include(float32x4_t values, Lanes& lanes) {
  lanes.low = vbslq_f32(vcltq_f32(values, lanes.low), values, lanes.low);
  lanes.high = vbslq_f32(vcgtq_f32(values, lanes.high), values, lanes.high);
}

struct Encoder {
  float32x4_t low, high;
  float inverse;
};

// Clamped first, so that what is rounded is small; fcvtns rounds half to even.
SPLITQ_INLINE int32x4_t EncodeLanes(float32x4_t values, const Encoder& encoder) {
  const float32x4_t raised = vmaxnmq_f32(vmulq_n_f32(values, encoder.inverse), encoder.low);
  return vcvtnq_s32_f32(vminnmq_f32(raised, encoder.high));
}

SPLITQ_INLINE int8x8_t EncodeEight(const float* values, const Encoder& encoder) {
  const int16x4_t low = vmovn_s32(EncodeLanes(vld1q_f32(values), encoder));
  const int16x4_t high = vmovn_s32(EncodeLanes(vld1q_f32(values + kLanes), encoder));
  return vmovn_s16(vcombine_s16(low, high));
}

}  // namespace

Extremes FindExtremesNeon(const float* values, int64_t width) {
  Lanes even{vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}, odd = even;
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    Include(vld1q_f32(values + i), even);
    Include(vld1q_f32(values + i + kLanes), odd);
  }
  for (; i < width; ++i) Include(vdupq_n_f32(values[i]), even);
  return {vminvq_f32(vminq_f32(even.low, odd.low)), vmaxvq_f32(vmaxq_f32(even.high, odd.high))};
}

void EncodeNeon(const float* values, int64_t width, Encoding encoding, int8_t* codes) {
  const Encoder encoder{vdupq_n_f32(encoding.low), vdupq_n_f32(encoding.high), encoding.inverse};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    const int8x8_t low = EncodeEight(values + i, encoder);
    vst1q_s8(codes + i, vcombine_s8(low, EncodeEight(values + i + 2 * kLanes, encoder)));
  }
  if (i + 2 * kLanes <= width) {
    vst1_s8(codes + i, EncodeEight(values + i, encoder));
    i += 2 * kLanes;
  }
  for (; i < width; ++i) {
    const int32x4_t code = EncodeLanes(vdupq_n_f32(values[i]), encoder);
    codes[i] = static_cast<int8_t>(vgetq_lane_s32(code, 0));
  }
}

int32_t SumCodesNeon(const int8_t* codes, int64_t width) {
  int32x4_t total = vdupq_n_s32(0);
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) {
    total = vpadalq_s16(total, vpaddlq_s8(vld1q_s8(codes + i)));
  }
  int32_t sum = vaddvq_s32(total);
  for (; i < width; ++i) sum += codes[i];
  return sum;
}

void SubtractCodesNeon(const float* values, const int8_t* codes, float scale, int64_t width,
                       float* out) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    const int16x8_t wide = vmovl_s8(vld1_s8(codes + i));
    const float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    const float32x4_t high = vcvtq_f32_s32(vmovl_high_s16(wide));
    vst1q_f32(out + i, vsubq_f32(vld1q_f32(values + i), vmulq_n_f32(low, scale)));
    vst1q_f32(out + i + kLanes,
              vsubq_f32(vld1q_f32(values + i + kLanes), vmulq_n_f32(high, scale)));
  }
  for (; i < width; ++i) {
    const float quantized = static_cast<float>(codes[i]) * scale;
    out[i] = values[i] - quantized;
  }
}

}  // namespace splitq
