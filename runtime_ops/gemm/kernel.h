// A micro-kernel: int8 rows times one panel of a packed weight, exact int32 sums.
#pragma once

#include <cstdint>

#include "cpu/features.h"

namespace splitq {

// sums[m][n] = sum over k in [k_begin, k_end) of codes[m][k] * q[k][n], n < 16. Overwrites sums.
//
// Caller duties: a row of codes is readable, and zero from the last channel of the weight on, up to
// a multiple of kCodeRowAlign; k_begin is a multiple of 16, k_end is one or the channels of the
// weight; rows > 0. With 3 bits a packed block is 32 channels, so a range may begin or end in the
// middle of one.
struct PanelProduct {
  const int8_t* codes;   // [rows, >= k_end]
  int64_t codes_stride;  // bytes from row to row
  int64_t rows;
  const uint8_t* panel;  // first byte of the panel; no alignment is promised
  int64_t k_begin;
  int64_t k_end;
  int32_t* sums;  // [rows, 16], dense
};

// One row of the kernel table (gemm/table.h).
struct GemmKernel {
  const char* name;  // activations_weights_tile_isa, as in qd8_qc4w_1x16c4_scalar
  Isa isa;           // what the processor must have
  int bits;          // of the weight
  void (*run)(const PanelProduct& product);
};

}  // namespace splitq
