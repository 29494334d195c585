#include "linear/panel_terms.h"

#include <algorithm>

namespace splitq {
namespace {

using SumTile = int32_t[kTileRows * kPanel];

void Multiply(const PackedWeight& weight, int64_t panel, const CodeRows& rows, int64_t count,
              int64_t k_begin, int64_t k_end, int32_t* sums) {
  weight.kernel->run({rows.codes, rows.stride, count, weight.panel(panel), k_begin, k_end, sums});
}

// Scales of the 16 channels of a panel; those that do not exist have the scale 0.
struct PanelScale {
  float values[kPanel];
};

PanelScale LoadScale(const float* scale, int64_t width) {
  PanelScale result{};
  std::copy_n(scale, width, result.values);
  return result;
}

// One scale an output channel: (sum * row scale) * channel scale.
template <bool add>
void ChannelTerms(const PackedWeight& weight, int64_t panel, const CodeRows& rows, int64_t count,
                  float* terms) {
  SumTile sums;
  Multiply(weight, panel, rows, count, 0, weight.channels_in, sums);
  const PanelScale scale = LoadScale(weight.scale + panel * kPanel, PanelWidth(weight, panel));
  const auto run = add ? weight.terms->add : weight.terms->set;
  run({sums, rows.scale, scale.values, count}, terms);
}

// One scale a block and output channel: (sum over blocks of sum * channel scale) * row scale.
void BlockTerms(const PackedWeight& weight, int64_t panel, const CodeRows& rows, int64_t count,
                float* terms) {
  SumTile sums;
  const int64_t width = PanelWidth(weight, panel);
  const float* scales = weight.scale + panel * kPanel;
  std::fill(terms, terms + count * kPanel, 0.0f);
  for (int64_t k = 0; k < weight.channels_in; k += weight.block_size) {
    const int64_t k_end = std::min(weight.channels_in - k, weight.block_size) + k;
    Multiply(weight, panel, rows, count, k, k_end, sums);
    const PanelScale scale = LoadScale(scales, width);
    weight.terms->add_block({sums, rows.scale, scale.values, count}, terms);
    scales += weight.channels_out;
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
  const auto compute = weight.block_size > 0 ? BlockTerms : ChannelTerms<false>;
  compute(weight, panel, rows, count, terms);
}

void AddPanelTerms(const PackedWeight& weight, int64_t panel, const CodeRows& rows, int64_t count,
                   float* total) {
  ChannelTerms<true>(weight, panel, rows, count, total);
}

}  // namespace splitq
