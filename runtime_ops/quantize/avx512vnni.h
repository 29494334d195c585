// Row loops for x86-64 with AVX-512.
#pragma once

#include "quantize/kernel.h"

namespace splitq {

void GatherAvx512Vnni(const ChannelGather& gather, const float* x, int64_t begin, int64_t count,
                      float* out);
Extremes FindExtremesAvx512Vnni(const float* values, int64_t width);
void EncodeAvx512Vnni(const float* values, int64_t width, Encoding encoding, int8_t* codes);
void SubtractCodesAvx512Vnni(const float* values, const int8_t* codes, float scale, int64_t width,
                             float* out);
void MultiplyAvx512Vnni(const MatrixProduct& product);

}  // namespace splitq
