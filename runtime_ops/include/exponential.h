// e^x in plain C++ that compilers turn into vectors, for the loops of gate/ and attention/.
//
// The files that include this are compiled for different processors: everything here has internal
// linkage, lest the linker keep a copy for a newer one.
#pragma once

#include <cstdint>
#include <cstring>

#include "include/half.h"
#include "include/restrict.h"

namespace splitq {
namespace {

constexpr float kLowestExponent = -87.0f, kHighestExponent = 88.0f;  // e^x is a normal number

// e^x = 2^n e^r with whole n and |r| <= ln(2) / 2, within 2 ulp, for x from the lowest exponent to
// the highest.
inline float ExponentialWithin(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // their sum is ln(2)
  constexpr float kWhole = 12582912.0f;       // 1.5 * 2^23: adding it rounds to a whole number
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

// The same for any x: what lies beyond is taken as the end, NaN stays NaN.
inline float Exponential(float x) {
  x = x < kLowestExponent ? kLowestExponent : x;
  return ExponentialWithin(x > kHighestExponent ? kHighestExponent : x);
}

// x between the two exponents, NaN as one of them. By whole numbers, whose order is that of floats
// of one sign: of conditions on floats GCC makes a branch for each end, computes what follows for
// the ends too, in every element, and loses a hundred cycles where that is no normal number.
inline float WithinExponents(float x) {
  const uint32_t low = BitsOf(kLowestExponent);
  const auto high = static_cast<int32_t>(BitsOf(kHighestExponent));
  uint32_t bits = BitsOf(x);
  bits = bits < low ? bits : low;
  auto whole = static_cast<int32_t>(bits);
  whole = whole < high ? whole : high;
  std::memcpy(&x, &whole, sizeof(x));
  return x;
}

}  // namespace
}  // namespace splitq
