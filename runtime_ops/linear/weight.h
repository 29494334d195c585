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

  int64_t panel_bytes() const { return PanelBytes(channels_in, kernel->bits); }
  const uint8_t* panel(int64_t index) const { return payload + index * panel_bytes(); }
};

}  // namespace splitq
