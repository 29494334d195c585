// A packed weight with its scales, ready to be multiplied.
#pragma once

#include <cstdint>

#include "gemm/kernel.h"
#include "gemm/terms.h"
#include "pack/layout.h"

namespace splitq {

struct PackedWeight {
  const uint8_t* payload = nullptr;  // layout 1
  const float* scale = nullptr;      // [channels_out] or [blocks, channels_out]
  const GemmKernel* kernel = nullptr;
  const TermKernels* terms = nullptr;
  int64_t channels_in = 0;
  int64_t channels_out = 0;
  int64_t block_size = 0;  // 0: one scale an output channel

  int64_t panels() const { return CeilDiv(channels_out, kPanel); }

  const uint8_t* panel(int64_t index) const {
    return payload + index * PanelBytes(channels_in, kernel->bits);
  }
};

// Rows of codes with a scale each.
struct CodeRows {
  int8_t* codes = nullptr;  // [rows, channels]
  int64_t stride = 0;       // bytes, a multiple of kCodeRowAlign, padded with zeros
  float* scale = nullptr;   // [rows]

  int8_t* row(int64_t m) const { return codes + m * stride; }
  CodeRows from(int64_t m) const { return {row(m), stride, scale + m}; }
};

}  // namespace splitq
