// Row loops for ARM64, whose every processor has NEON; the matrix product is fused.
#pragma once

#include "quantize/kernel.h"

namespace splitq {

Extremes FindExtremesNeon(const float* values, int64_t width);
void EncodeNeon(const float* values, int64_t width, Encoding encoding, int8_t* codes);
int32_t SumCodesNeon(const int8_t* codes, int64_t width);
void SubtractCodesNeon(const float* values, const int8_t* codes, float scale, int64_t width,
                       float* out);
void MultiplyNeon(const MatrixProduct& product);

}  // namespace splitq
