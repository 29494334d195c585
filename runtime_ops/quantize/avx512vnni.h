// Row loops for x86-64 with AVX-512.
#pragma once

#include "quantize/kernel.h"

namespace splitq {

void ApplyKroneckerAvx512Vnni(const KroneckerFactors& factors, const float* g, float* work,
                              float* out);

}  // namespace splitq
