// Dynamic per-token quantization of one row (docs/ops.md, "Arithmetic").
#pragma once

#include <cstdint>

#include "quantize/kernel.h"

namespace splitq {

struct RowQuantization {
  int bits = 8;
  float clip = 1.0f;
  bool symmetric = true;  // else bits < 8
};

// Returns the scale; the value of a code is code * scale: an asymmetric zero point is already
// subtracted from the codes. A row with a non-finite value gives arbitrary codes within the range.
// values, codes: [width]
float QuantizeRowValues(const RowKernels& kernels, const RowQuantization& how, const float* values,
                        int64_t width, int8_t* codes);

}  // namespace splitq
