// Row loops for x86-64 with AVX2; the matrix product with FMA too.
#pragma once

#include "quantize/kernel.h"

namespace splitq {

Extremes FindExtremesAvx2(const float* values, int64_t width);
void EncodeAvx2(const float* values, int64_t width, Encoding encoding, int8_t* codes);
int32_t SumCodesAvx2(const int8_t* codes, int64_t width);
void SubtractCodesAvx2(const float* values, const int8_t* codes, float scale, int64_t width,
                       float* out);
void MultiplyAvx2(const MatrixProduct& product);

}  // namespace splitq
