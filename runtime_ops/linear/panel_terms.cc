#include "linear/panel_terms.h"

#include <algorithm>

namespace splitq {
namespace {

using SumTile = int32_t[kTileSize];

// Channels [k_begin, k_end); `sum` is the place of their sum in a row's sums of codes.
struct Range {
  int64_t k_begin, k_end, sum;
};

PanelProduct ProductOf(const PackedWeight& weight, PanelRange panels, const CodeRows& rows,
                       int64_t count, const Range& range, int32_t* sums) {
  return {rows.codes,
          rows.stride,
          count,
          rows.sums + range.sum,
          rows.sums_stride(),
          weight.panel(panels.first),
          weight.panel_bytes(),
          panels.count,
          range.k_begin,
          range.k_end,
          sums};
}

// Scales of the channels of a few panels; those that do not exist have the scale 0.
class PanelScales {
 public:
  // scale: of the weight's first channel
  PanelScales(const PackedWeight& weight, const float* scale, PanelRange panels)
      : values_(scale + panels.first * kPanel) {
    const int64_t exist = weight.channels_out - panels.first * kPanel;
    if (exist >= panels.count * kPanel) return;
    std::fill(std::copy_n(values_, exist, copy_), copy_ + panels.count * kPanel, 0.0f);
    values_ = copy_;
  }
  PanelScales(const PanelScales&) = delete;
  PanelScales& operator=(const PanelScales&) = delete;

  const float* values() const { return values_; }

 private:
  const float* values_;
  float copy_[TilePanels(1) * kPanel];
};

// One scale an output channel: (sum * row scale) * channel scale.
template <bool add>
void ChannelTerms(const PackedWeight& weight, PanelRange panels, const CodeRows& rows,
                  int64_t count, float* terms) {
  const PanelScales scales(weight, weight.scale, panels);
  const Range all = {0, weight.channels_in, 0};
  if (weight.kernel->run_terms != nullptr) {
    const PanelProduct product = ProductOf(weight, panels, rows, count, all, nullptr);
    return weight.kernel->run_terms(product, {rows.scale, scales.values(), add, terms});
  }
  SumTile sums;
  weight.kernel->run(ProductOf(weight, panels, rows, count, all, sums));
  const auto run = add ? weight.terms->add : weight.terms->set;
  run({sums, rows.scale, scales.values(), count, panels.count}, terms);
}

// All blocks by the kernel itself; false if it cannot.
bool RunBlocks(const PackedWeight& weight, PanelRange panels, const CodeRows& rows, int64_t count,
               float* terms) {
  const GemmKernel& kernel = *weight.kernel;
  if (kernel.run_blocks == nullptr || weight.block_size % kernel.block_step != 0) return false;
  kernel.run_blocks({{rows.codes, rows.stride, count, rows.sums + 1, rows.sums_stride(),
                      weight.panel(panels.first), weight.panel_bytes(), panels.count, 0,
                      weight.channels_in, nullptr},
                     weight.block_size,
                     weight.scale + panels.first * kPanel,
                     weight.channels_out,
                     weight.channels_out - panels.first * kPanel,
                     terms});
  return true;
}

// Block by block, for other kernels: panel by panel, so that the weights are read as they lie.
void AddBlocks(const PackedWeight& weight, PanelRange panel, const CodeRows& rows, int64_t count,
               float* terms) {
  SumTile sums;
  std::fill(terms, terms + count * kPanel, 0.0f);
  int64_t block = 0;
  for (int64_t k = 0; k < weight.channels_in; k += weight.block_size, ++block) {
    const int64_t k_end = std::min(weight.channels_in - k, weight.block_size) + k;
    weight.kernel->run(ProductOf(weight, panel, rows, count, {k, k_end, 1 + block}, sums));
    const PanelScales scales(weight, weight.scale + block * weight.channels_out, panel);
    weight.terms->add_block({sums, rows.scale, scales.values(), count, 1}, terms);
  }
}

// One scale a block and output channel: (sum over blocks of sum * channel scale) * row scale.
void BlockTerms(const PackedWeight& weight, PanelRange panels, const CodeRows& rows, int64_t count,
                float* terms) {
  if (!RunBlocks(weight, panels, rows, count, terms)) {
    for (int64_t p = 0; p < panels.count; ++p) {
      AddBlocks(weight, {panels.first + p, 1}, rows, count, terms + p * count * kPanel);
    }
  }
  for (int64_t i = 0; i < panels.count * count; ++i) {
    for (int64_t n = 0; n < kPanel; ++n) terms[i * kPanel + n] *= rows.scale[i % count];
  }
}

}  // namespace

int64_t PanelWidth(const PackedWeight& weight, int64_t panel) {
  return std::min(weight.channels_out - panel * kPanel, kPanel);
}

void PanelTerms(const PackedWeight& weight, PanelRange panels, const CodeRows& rows, int64_t count,
                float* terms) {
  const auto compute = weight.block_size > 0 ? BlockTerms : ChannelTerms<false>;
  compute(weight, panels, rows, count, terms);
}

bool HaveOutput(const Factors* factors, int64_t added) {
  if (added == 0) return false;
  const auto run = factors->weight->kernel->run_output;
  const auto same = [&](const Factors& each) { return each.weight->kernel->run_output == run; };
  return run != nullptr && std::all_of(factors, factors + added, same);
}

void OutputTerms(const Factors* factors, int64_t added, PanelRange panels, int64_t count,
                 const float* terms, const TileOutput& output) {
  ScaledProduct products[kMostFactors];
  for (int64_t i = 0; i < added; ++i) {
    const PackedWeight& weight = *factors[i].weight;
    const CodeRows& rows = factors[i].rows;
    const Range all = {0, weight.channels_in, 0};
    products[i] = {ProductOf(weight, panels, rows, count, all, nullptr), rows.scale,
                   weight.scale + panels.first * kPanel};
  }
  const int64_t outputs = factors->weight->channels_out, first = panels.first * kPanel;
  const float* bias = output.bias != nullptr ? output.bias + first : nullptr;
  factors->weight->kernel->run_output(
      {products, added, terms, bias, output.y + first, outputs, outputs - first});
}

void AddPanelTerms(const PackedWeight& weight, PanelRange panels, const CodeRows& rows,
                   int64_t count, float* total) {
  ChannelTerms<true>(weight, panels, rows, count, total);
}

}  // namespace splitq
