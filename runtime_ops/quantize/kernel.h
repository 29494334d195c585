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

// What becomes of a row: the sum of its codes, and the extremes of 0 and what they leave, NaNs
// ignored.
struct Encoded {
  int32_t sum;
  Extremes rest;
};

// Arrays overlap only where they are the same argument; no alignment is promised; width >= 0.
struct RowKernels {
  const char* name;  // rows_isa
  Isa isa;           // what the processor must have

  // out[i] = x[order[begin + i]] * scale[begin + i], i < count. x: [channels]
  void (*gather)(const ChannelGather& gather, const float* x, int64_t begin, int64_t count,
                 float* out);
  bool windows;  // whether it reads windows, and the order only where a block has none

  // Of 0 and the values, NaNs ignored.
  Extremes (*find_extremes)(const float* values, int64_t width);

  // Returns the sum of the codes. codes: [width], width at most kMaxChannelsIn of pack/layout.h
  int32_t (*encode)(const float* values, int64_t width, Encoding encoding, int8_t* codes);

  // As encode; rest = values - codes * scale, product and difference rounded one after the other.
  // codes, rest: [width]
  Encoded (*encode_with_rest)(const float* values, int64_t width, Encoding encoding, float scale,
                              int8_t* codes, float* rest);

  // The sum of the codes. codes: [width], width at most kMaxChannelsIn of pack/layout.h
  int32_t (*sum_codes)(const int8_t* codes, int64_t width);

  void (*multiply)(const MatrixProduct& product);
};

}  // namespace splitq
