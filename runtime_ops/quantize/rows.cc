// The library is compiled with -ffp-contract=off: a fused multiply-add in the residual would round
// once where the contract rounds twice, and codes would differ between processors.
#include "quantize/rows.h"

#include <algorithm>
#include <cmath>

namespace splitq {
namespace {

constexpr float kScaleFloor = 1e-12f;  // keeps the inverse scale of an all-zero row finite
constexpr int kLanes = 8;  // independent maxima: compilers may not reorder a float reduction

// Comparisons are written so that a NaN yields `low`.
inline float Clamp(float value, float low, float high) {
  const float raised = value > low ? value : low;
  return raised < high ? raised : high;
}

// Half to even for |value| < 2^22: adding 1.5 * 2^23 leaves no fraction bits. Unlike nearbyint it
// is two additions on every processor.
inline float Round(float value) {
  constexpr float kShift = 12582912.0f;
  return (value + kShift) - kShift;
}

// Largest of f(value) and 0 over the row, NaNs ignored.
template <typename Function>
float MaxOf(const float* values, int64_t width, const Function& f) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float candidate = f(values[i + lane]);
      lanes[lane] = candidate > lanes[lane] ? candidate : lanes[lane];
    }
  }
  float result = 0.0f;
  for (; i < width; ++i) result = std::max(result, f(values[i]));
  for (const float lane : lanes) result = std::max(result, lane);
  return result;
}

// codes = clamp(round(values * inverse), low, high); the bounds are integers, so clamping first
// gives the same code and bounds what is rounded and converted.
void Encode(const float* __restrict values, int64_t width, float inverse, float low, float high,
            int8_t* __restrict codes) {
  for (int64_t i = 0; i < width; ++i) {
    const float rounded = Round(Clamp(values[i] * inverse, low, high));
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(rounded));
  }
}

}  // namespace

float QuantizeSymmetric(const float* values, int64_t width, int bits, float clip, int8_t* codes) {
  const float top = static_cast<float>((1 << (bits - 1)) - 1);
  const float largest = MaxOf(values, width, [](float v) { return std::fabs(v); });
  const float scale = std::max(largest * clip / top, kScaleFloor);
  Encode(values, width, 1.0f / scale, -top - 1.0f, top, codes);
  return scale;
}

float QuantizeAsymmetric(const float* values, int64_t width, int bits, float clip, int8_t* codes) {
  const float top = static_cast<float>((1 << bits) - 1);
  const float high = MaxOf(values, width, [](float v) { return v; }) * clip;
  const float low = -MaxOf(values, width, [](float v) { return -v; }) * clip;
  const float scale = std::max((high - low) / top, kScaleFloor);
  const float inverse = 1.0f / scale;
  const float zero = Round(Clamp(-low * inverse, 0.0f, top));
  // clamp(round(v) + zero, 0, top) - zero, with the zero point moved into the bounds
  Encode(values, width, inverse, -zero, top - zero, codes);
  return scale;
}

void Residual(const float* __restrict values, const int8_t* __restrict codes, float scale,
              int64_t width, float* __restrict out) {
  for (int64_t i = 0; i < width; ++i) {
    const float quantized = static_cast<float>(codes[i]) * scale;
    out[i] = values[i] - quantized;
  }
}

}  // namespace splitq
