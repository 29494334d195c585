// Row loops in plain C++, for every processor.
#pragma once

#include "quantize/kernel.h"

namespace splitq {

void GatherScalar(const ChannelGather& gather, const float* x, int64_t begin, int64_t count,
                  float* out);
Extremes FindExtremesScalar(const float* values, int64_t width);
void EncodeScalar(const float* values, int64_t width, Encoding encoding, int8_t* codes);
int32_t SumCodesScalar(const int8_t* codes, int64_t width);
void SubtractCodesScalar(const float* values, const int8_t* codes, float scale, int64_t width,
                         float* out);
void MultiplyScalar(const MatrixProduct& product);

}  // namespace splitq
