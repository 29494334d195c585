#include "linear/panel_terms.h"

#include <algorithm>

namespace splitq {
namespace {

using SumTile = int32_t[kTileRows * kPanel];

void Multiply(const PackedWeight& weight, int64_t panel, const CodeRows& rows, int64_t count,
              int64_t k_begin, int64_t k_end, int32_t* sums) {
  weight.kernel->run({rows.codes, rows.stride, count, weight.panel(panel), k_begin, k_end, sums});
}

// One scale an output channel: (sum * row scale) * channel scale.
void ChannelTerms(const PackedWeight& weight, int64_t panel, const CodeRows& rows, int64_t count,
                  float* terms) {
  SumTile sums;
  Multiply(weight, panel, rows, count, 0, weight.channels_in, sums);
  const int64_t width = PanelWidth(weight, panel);
  const float* scale = weight.scale + panel * kPanel;
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t n = 0; n < width; ++n) {
      terms[m * kPanel + n] = static_cast<float>(sums[m * kPanel + n]) * rows.scale[m] * scale[n];
    }
  }
}

// One scale a block and output channel: (sum over blocks of sum * channel scale) * row scale.
void BlockTerms(const PackedWeight& weight, int64_t panel, const CodeRows& rows, int64_t count,
                float* terms) {
  SumTile sums;
  const int64_t width = PanelWidth(weight, panel);
  const float* scale = weight.scale + panel * kPanel;
  std::fill(terms, terms + count * kPanel, 0.0f);
  for (int64_t k = 0; k < weight.channels_in; k += weight.block_size) {
    const int64_t k_end = std::min(weight.channels_in - k, weight.block_size) + k;
    Multiply(weight, panel, rows, count, k, k_end, sums);
    for (int64_t m = 0; m < count; ++m) {
      for (int64_t n = 0; n < width; ++n) {
        terms[m * kPanel + n] += static_cast<float>(sums[m * kPanel + n]) * scale[n];
      }
    }
    scale += weight.channels_out;
  }
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t n = 0; n < width; ++n) terms[m * kPanel + n] *= rows.scale[m];
  }
}

}  // namespace

int64_t PanelWidth(const PackedWeight& weight, int64_t panel) {
  return std::min(weight.channels_out - panel * kPanel, kPanel);
}

void PanelTerms(const PackedWeight& weight, int64_t panel, const CodeRows& rows, int64_t count,
                float* terms) {
  const auto compute = weight.block_size > 0 ? BlockTerms : ChannelTerms;
  compute(weight, panel, rows, count, terms);
}

}  // namespace splitq
