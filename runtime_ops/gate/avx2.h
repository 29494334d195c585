// The gated activation for x86-64 with AVX2 and FMA.
#pragma once

#include <cstdint>

namespace splitq {

void SwiGluAvx2(const float* gate, const float* up, int64_t width, float* out);

}  // namespace splitq
