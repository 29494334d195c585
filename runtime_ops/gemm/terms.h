// From the int32 sums of a panel to floats: scales, the sum of terms, the bias (docs/ops.md,
// SplitQLinear). Every form gives the same bits.
#pragma once

#include <cstdint>

#include "cpu/features.h"

namespace splitq {

struct PanelSums {
  const int32_t* sums;         // [panels, rows, 16]
  const float* row_scale;      // [rows]
  const float* channel_scale;  // [panels, 16], zeros after the channels that exist
  int64_t rows;
  int64_t panels;
};

// terms: [panels, rows, 16], dense.
struct TermKernels {
  const char* name;  // terms_isa
  Isa isa;           // what the processor must have

  // terms = (sum * row scale) * channel scale
  void (*set)(const PanelSums& panel, float* terms);

  // terms += (sum * row scale) * channel scale
  void (*add)(const PanelSums& panel, float* terms);

  // terms += sum * channel scale
  void (*add_block)(const PanelSums& panel, float* terms);

  // y = terms + bias, of one panel. bias: [16] or null; y: rows of 16, `y_stride` floats from one
  // to the next.
  void (*store)(const float* terms, int64_t rows, const float* bias, float* y, int64_t y_stride);
};

}  // namespace splitq
