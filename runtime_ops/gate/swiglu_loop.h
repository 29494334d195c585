// The loop of the gated activation, plain C++ that compilers turn into vectors.
//
// The files that include this are compiled for different processors: everything here has internal
// linkage, lest the linker keep a copy for a newer one.
#pragma once

#include <cstdint>

#include "include/exponential.h"

namespace splitq {
namespace {

inline void SwiGluLoop(const float* SPLITQ_RESTRICT gate, const float* SPLITQ_RESTRICT up,
                       int64_t width, float* SPLITQ_RESTRICT out) {
  for (int64_t i = 0; i < width; ++i) {
    out[i] = gate[i] / (1.0f + ExponentialWithin(WithinExponents(-gate[i]))) * up[i];
  }
}

}  // namespace
}  // namespace splitq
