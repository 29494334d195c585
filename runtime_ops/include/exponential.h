// e^x in plain C++ that compilers turn into vectors, for the loops of gate/ and attention/.
//
// The files that include this are compiled for different processors: everything here has internal
// linkage, lest the linker keep a copy for a newer one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#define SPLITQ_RESTRICT __restrict
#else
#define SPLITQ_RESTRICT __restrict__
#endif

namespace splitq {
namespace {

// e^x = 2^n e^r with whole n and |r| <= ln(2) / 2, within 2 ulp; NaN stays NaN. x beyond the range
// of normal numbers is taken as its end.
inline float Exponential(float x) {
  constexpr float kLowest = -87.0f, kHighest = 88.0f;
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // their sum is ln(2)
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  x = x < kLowest ? kLowest : x;
  x = x > kHighest ? kHighest : x;
  const float shifted = x * kLog2E + kWhole;  // n in its lowest bits
  const float n = shifted - kWhole;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float sum = 1.0f / 5040.0f;  // Taylor's series, the next term is below 6e-9
  sum = sum * r + 1.0f / 720.0f;
  sum = sum * r + 1.0f / 120.0f;
  sum = sum * r + 1.0f / 24.0f;
  sum = sum * r + 1.0f / 6.0f;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3F800000u;  // 2^n
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return sum * power;
}

}  // namespace
}  // namespace splitq
