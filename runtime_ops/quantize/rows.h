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

// Where a row of codes goes.
struct CodeTarget {
  int8_t* codes = nullptr;  // [width]
  float* scale = nullptr;
  int32_t* sum = nullptr;  // of the codes; null: not wanted
};

// The value of a code is code * scale: an asymmetric zero point is already subtracted from the
// codes. A row with a non-finite value gives arbitrary codes within the range. values: [width]
void QuantizeRowValues(const RowKernels& kernels, const RowQuantization& how, const float* values,
                       int64_t width, const CodeTarget& target);

// The same, then what the codes leave of the values (eq. 18), quantized in turn. rest: [width],
// where that lies meanwhile.
void QuantizeWithResidual(const RowKernels& kernels, const RowQuantization& how, int residual_bits,
                          const float* values, int64_t width, float* rest, const CodeTarget& target,
                          const CodeTarget& residual);

}  // namespace splitq
