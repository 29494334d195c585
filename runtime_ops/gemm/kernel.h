// A micro-kernel: int8 rows times a few panels of a packed weight, exact int32 sums.
#pragma once

#include <cstdint>

#include "cpu/features.h"

namespace splitq {

// sums[p][m][n] = sum over k in [k_begin, k_end) of codes[m][k] * q[k][16 * p + n], n < 16.
// Overwrites sums.
//
// Caller duties: a row of codes is readable, and zero from the last channel of the weight on, up to
// a multiple of kCodeRowAlign; k_begin is a multiple of 16, k_end is one or the channels of the
// weight; rows > 0; panels > 0. With 3 bits a packed block is 32 channels, so a range may begin or
// end in the middle of one.
struct PanelProduct {
  const int8_t* codes;   // [rows, >= k_end]
  int64_t codes_stride;  // bytes from row to row
  int64_t rows;
  const int32_t* code_sums;  // [rows], of a row's codes over the range
  int64_t code_sums_stride;  // elements from row to row
  const uint8_t* panel;      // first byte of the first panel; no alignment is promised
  int64_t panel_stride;      // bytes from panel to panel
  int64_t panels;
  int64_t k_begin;
  int64_t k_end;
  int32_t* sums;  // [panels, rows, 16], dense
};

// Where a product goes as floats at once, as gemm/terms.h makes them of its sums:
// terms[p][m][n] = (sum * row_scale[m]) * channel_scale[16 * p + n], or that added to them.
struct TermsOutput {
  const float* row_scale;      // [rows]
  const float* channel_scale;  // [panels, 16], zeros after the channels that exist
  bool add;
  float* terms;  // [panels, rows, 16], dense
};

// A product whose codes and weights have scales, as above.
struct ScaledProduct {
  PanelProduct product;        // k_begin 0, k_end the channels of the weight; sums are not used
  const float* row_scale;      // [rows]
  const float* channel_scale;  // of the first panel's first channel, of those that exist
};

// y[m][n] = terms + the scaled sums of the products, one after the other, + bias, every product and
// sum rounded.
struct OutputSum {
  const ScaledProduct* products;  // of the same rows and panels
  int64_t count;                  // of the products, at least 1
  const float* terms;             // [panels, rows, 16], dense
  const float* bias;  // of the first panel's first channel, of those that exist, or null
  float* y;           // likewise, of the first row
  int64_t y_stride;   // elements from row to row
  int64_t outputs;    // channels that exist from the first panel's first on; others are not written
};

// For kernels that take one panel at a time. Internal linkage and always inlined: files of several
// instruction sets call it.
template <void (*run)(const PanelProduct& product)>
static inline __attribute__((always_inline)) void RunEachPanel(const PanelProduct& product) {
  PanelProduct one = product;
  one.panels = 1;
  for (int64_t p = 0; p < product.panels; ++p) {
    run(one);
    one.panel += one.panel_stride;
    one.sums += one.rows * 16;
  }
}

// terms[p][m][n] = sum over the blocks of block_size channels, in order, of
//   (float) (sum over the block of codes[m][k] * q[k][16 * p + n]) * scale[block][16 * p + n],
// every product and sum rounded. Overwrites terms.
struct BlockProduct {
  PanelProduct panels;   // k_begin 0, k_end the channels of the weight; code_sums: [rows, blocks],
                         // code_sums_stride from row to row; sums are not used
  int64_t block_size;    // a multiple of 16
  const float* scale;    // of the first block and the first panel's first channel
  int64_t scale_stride;  // elements from block to block
  int64_t outputs;       // channels that the panels have; terms of others become zero
  float* terms;          // [panels, rows, 16], dense
};

// One row of the kernel table (gemm/table.h).
struct GemmKernel {
  const char* name;  // activations_weights_tile_isa, as in qd8_qc4w_1x16c4_scalar
  Isa isa;           // what the processor must have
  int bits;          // of the weight
  void (*run)(const PanelProduct& product);
  // As run, with floats instead of sums, which are not used; null: there is none.
  void (*run_terms)(const PanelProduct& product, const TermsOutput& output) = nullptr;
  // Several products of weights of these bits at once, and what becomes of their sum; null: there
  // is none.
  void (*run_output)(const OutputSum& sum) = nullptr;
  // The blocks of a weight at once, if block_size is a multiple of block_step; null: there is none.
  void (*run_blocks)(const BlockProduct& product) = nullptr;
  int64_t block_step = 0;
};

}  // namespace splitq
