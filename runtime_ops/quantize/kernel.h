// The loops over float rows that have a form for each instruction set. The scalar form is the
// meaning; others give the same bits, but for the rounding of the matrix product, whose order of
// summation docs/ops.md leaves open.
#pragma once

#include <cstdint>

#include "cpu/features.h"
#include "include/read_ahead.h"
#include "quantize/gather.h"

namespace splitq {

// out[i][j] = sum over k < depth of left[i * row_step + k * k_step] * right[k][j], i < rows; right
// and out have `columns` columns. out overlaps nothing else.
struct MatrixProduct {
  const float* left;
  int64_t row_step, k_step;
  const float* right;
  int64_t rows, depth, columns;
  float* out;
  ReadAhead* ahead;  // null: nothing to load meanwhile
};

struct Extremes {
  float low, high;  // low <= 0 <= high
};

// codes = clamp(round(value * inverse), low, high), round half to even; a NaN gives low.
// low and high: integers that int8 holds.
struct Encoding {
  float inverse, low, high;
};

// Arrays overlap only where they are the same argument; no alignment is promised; width >= 0.
struct RowKernels {
  const char* name;  // rows_isa
  Isa isa;           // what the processor must have

  // out[i] = x[order[begin + i]] * scale[begin + i], i < count. x: [channels]
  void (*gather)(const ChannelGather& gather, const float* x, int64_t begin, int64_t count,
                 float* out);

  // Of 0 and the values, NaNs ignored.
  Extremes (*find_extremes)(const float* values, int64_t width);

  // codes: [width]
  void (*encode)(const float* values, int64_t width, Encoding encoding, int8_t* codes);

  // The sum of the codes. codes: [width], width at most kMaxChannelsIn of pack/layout.h
  int32_t (*sum_codes)(const int8_t* codes, int64_t width);

  // out = values - codes * scale, product and difference rounded one after the other.
  void (*subtract_codes)(const float* values, const int8_t* codes, float scale, int64_t width,
                         float* out);

  void (*multiply)(const MatrixProduct& product);
};

}  // namespace splitq
