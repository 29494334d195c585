// The loops over float rows that have a form for each instruction set. The scalar form is the
// meaning; others give the same bits, but for the rounding of the Kronecker product, whose order of
// summation docs/ops.md leaves open.
#pragma once

#include <cstdint>

#include "cpu/features.h"

namespace splitq {

// P = P1 (x) P2 of a group of width a * b; p1 == nullptr is the identity (eq. 2).
struct KroneckerFactors {
  const float* p1 = nullptr;  // [a, a]
  const float* p2 = nullptr;  // [b, b]
  int64_t a = 0;
  int64_t b = 0;
};

struct Extremes {
  float low, high;  // low <= 0 <= high
};

// codes = clamp(round(value * inverse), low, high), round half to even; a NaN gives low.
// low and high: integers that int8 holds.
struct Encoding {
  float inverse, low, high;
};

// Arrays overlap only where they are the same argument; no alignment is promised; width >= 0.
struct RowKernels {
  const char* name;  // rows_isa
  Isa isa;           // what the processor must have

  // Of 0 and the values, NaNs ignored.
  Extremes (*find_extremes)(const float* values, int64_t width);

  // codes: [width]
  void (*encode)(const float* values, int64_t width, Encoding encoding, int8_t* codes);

  // The sum of the codes. codes: [width], width at most kMaxChannelsIn of pack/layout.h
  int32_t (*sum_codes)(const int8_t* codes, int64_t width);

  // out = values - codes * scale, product and difference rounded one after the other.
  void (*subtract_codes)(const float* values, const int8_t* codes, float scale, int64_t width,
                         float* out);

  // out = g P, computed as P1^T (g P2) with g seen as a row-major matrix [a, b].
  // g, work, out: [a * b], distinct. p1 and p2 are given.
  void (*apply_kronecker)(const KroneckerFactors& factors, const float* g, float* work, float* out);
};

}  // namespace splitq
