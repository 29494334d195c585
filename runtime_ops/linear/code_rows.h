// Rows of integer codes, as the micro-kernels want them.
#pragma once

#include <cstdint>

#include "include/scratch.h"
#include "include/sizes.h"
#include "quantize/rows.h"

namespace splitq {

// Codes with a scale a row, and the sums of codes that the weights' zero points are multiplied
// with.
struct CodeRows {
  int64_t channels = 0;
  int64_t block_size = 0;   // of the weight the codes meet
  int64_t stride = 0;       // bytes from row to row
  int8_t* codes = nullptr;  // [rows, channels], padded with zeros
  float* scale = nullptr;   // [rows]
  int32_t* sums = nullptr;  // [rows, 1 + blocks]: of a row, then of its blocks

  int64_t sums_stride() const { return 1 + (block_size > 0 ? CeilDiv(channels, block_size) : 0); }
  int8_t* row(int64_t m) const { return codes + m * stride; }

  CodeTarget target(int64_t m) const { return {row(m), scale + m, sums + m * sums_stride()}; }

  CodeRows from(int64_t m) const {
    CodeRows rows = *this;
    rows.codes += m * stride;
    rows.scale += m;
    rows.sums += m * sums_stride();
    return rows;
  }
};

CodeRows TakeCodeRows(Scratch& scratch, int64_t rows, int64_t channels, int64_t block_size = 0);

// Completes row m, whose codes and their sum are written: its padding and the sums of its blocks.
void FinishRow(const RowKernels& kernels, const CodeRows& rows, int64_t m);

}  // namespace splitq
