// Row loops for x86-64 with AVX-512.
#pragma once

#include "quantize/kernel.h"

namespace splitq {

void GatherAvx512Vnni(const ChannelGather& gather, const float* x, int64_t begin, int64_t count,
                      float* out);
void MultiplyAvx512Vnni(const MatrixProduct& product);

}  // namespace splitq
