// The transform of a channel group (eq. 2).
#pragma once

#include <cstdint>

namespace splitq {

// P = P1 (x) P2 of a group of width a * b; p1 == nullptr is the identity.
struct KroneckerFactors {
  const float* p1 = nullptr;  // [a, a]
  const float* p2 = nullptr;  // [b, b]
  int64_t a = 0;
  int64_t b = 0;
};

// out = g P, computed as P1^T (g P2) with g seen as a row-major matrix [a, b].
// g, work, out: [a * b], distinct.
void ApplyKronecker(const KroneckerFactors& factors, const float* g, float* work, float* out);

}  // namespace splitq
