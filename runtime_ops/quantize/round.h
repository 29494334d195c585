// Rounding and clamping of floats as docs/ops.md wants them.
#pragma once

namespace splitq {

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

}  // namespace splitq
