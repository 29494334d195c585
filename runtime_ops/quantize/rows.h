// Dynamic per-token quantization of one row (docs/ops.md, "Arithmetic").
#pragma once

#include <cstdint>

namespace splitq {

// Each returns the scale; the value of a code is code * scale. A row with a non-finite value gives
// arbitrary codes within the range.
float QuantizeSymmetric(const float* values, int64_t width, int bits, float clip, int8_t* codes);
// The zero point is already subtracted from the codes. bits < 8.
float QuantizeAsymmetric(const float* values, int64_t width, int bits, float clip, int8_t* codes);

// out = values - codes * scale, product and difference rounded one after the other.
void Residual(const float* values, const int8_t* codes, float scale, int64_t width, float* out);

}  // namespace splitq
