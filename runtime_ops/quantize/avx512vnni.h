// Row loops for x86-64 with AVX-512.
#pragma once

#include "quantize/kernel.h"

namespace splitq {

void GatherAvx512Vnni(const ChannelGather& gather, const float* x, int64_t begin, int64_t count,
                      float* out);
Extremes FindExtremesAvx512Vnni(const float* values, int64_t width);
int32_t EncodeAvx512Vnni(const float* values, int64_t width, Encoding encoding, int8_t* codes);
Encoded EncodeWithRestAvx512Vnni(const float* values, int64_t width, Encoding encoding, float scale,
                                 int8_t* codes, float* rest);
void MultiplyAvx512Vnni(const MatrixProduct& product);

}  // namespace splitq
