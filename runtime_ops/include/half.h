// float16 numbers as they lie in a cache, in plain C++ that compilers turn into vectors.
//
// The files that include this are compiled for different processors: everything but the type has
// internal linkage, lest the linker keep a copy for a newer one.
#pragma once

#include <cstdint>
#include <cstring>

namespace splitq {

// An IEEE binary16 number.
struct Half {
  uint16_t bits;
};

namespace {

inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float Widen(float value) { return value; }

#if defined(__aarch64__)  // has instructions for it

inline float Widen(Half half) {
  __fp16 value;
  std::memcpy(&value, &half, sizeof(value));
  return static_cast<float>(value);
}

inline Half Narrow(float value) {
  const __fp16 narrow = static_cast<__fp16>(value);
  Half half;
  std::memcpy(&half, &narrow, sizeof(half));
  return half;
}

#else

// Exact; the payload of a NaN is kept.
inline float Widen(Half half) {
  constexpr uint32_t kExponents = 0x7C00u << 13;  // in float32's place
  constexpr uint32_t kBiases = (127u - 15u) << 23;
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000u) << 16;
  const uint32_t shifted = static_cast<uint32_t>(half.bits & 0x7FFFu) << 13;
  const uint32_t exponent = shifted & kExponents;
  const uint32_t normal = shifted + kBiases;
  // float16's denormals have the step of the smallest normal number's: 2^-14 is taken off again
  const uint32_t small = BitsOf(FloatOf(normal + (1u << 23)) - FloatOf(kBiases + (1u << 23)));
  const uint32_t infinite = normal + kBiases;
  uint32_t bits = exponent == 0 ? small : normal;
  bits = exponent == kExponents ? infinite : bits;
  return FloatOf(bits | sign);
}

// Rounds half to even; beyond 65504 to infinity; a NaN stays one.
inline Half Narrow(float value) {
  constexpr uint32_t kFirstInfinite = 0x47800000u;  // 2^16
  constexpr uint32_t kFirstNormal = 0x38800000u;    // 2^-14
  constexpr float kStep = 0.5f;  // a number whose last place is that of float16's denormals
  const uint32_t all = BitsOf(value);
  const uint32_t bits = all & 0x7FFFFFFFu;
  const uint32_t odd = bits >> 13 & 1u;
  const uint32_t normal = (bits - ((127u - 15u) << 23) + 0xFFFu + odd) >> 13;
  const uint32_t small = BitsOf(FloatOf(bits) + kStep) - BitsOf(kStep);
  const uint32_t beyond = bits > 0x7F800000u ? 0x7E00u : 0x7C00u;
  uint32_t narrow = bits < kFirstNormal ? small : normal;
  narrow = bits >= kFirstInfinite ? beyond : narrow;
  return {static_cast<uint16_t>(narrow | (all >> 16 & 0x8000u))};
}

#endif

}  // namespace
}  // namespace splitq
