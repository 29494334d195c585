#include "gemm/scalar.h"
#include "pack/layout.h"

namespace splitq {

namespace {

template <bool with_row_scale, bool add>
void Run(const PanelSums& panels, float* __restrict terms) {
  const int32_t* sums = panels.sums;
  for (int64_t p = 0; p < panels.panels; ++p) {
    const float* scale = panels.channel_scale + p * kPanel;
    for (int64_t m = 0; m < panels.rows; ++m, sums += kPanel, terms += kPanel) {
      for (int64_t n = 0; n < kPanel; ++n) {
        float value = static_cast<float>(sums[n]);
        if (with_row_scale) value *= panels.row_scale[m];
        value *= scale[n];
        terms[n] = add ? terms[n] + value : value;
      }
    }
  }
}

}  // namespace

void SetTermsScalar(const PanelSums& panels, float* terms) { Run<true, false>(panels, terms); }
void AddTermsScalar(const PanelSums& panels, float* terms) { Run<true, true>(panels, terms); }
void AddBlockTermsScalar(const PanelSums& panels, float* terms) { Run<false, true>(panels, terms); }

void StoreTermsScalar(const float* terms, int64_t rows, const float* bias, float* __restrict y,
                      int64_t y_stride) {
  for (int64_t i = 0; i < rows * kPanel; ++i) {
    float& target = y[i / kPanel * y_stride + i % kPanel];
    target = bias != nullptr ? terms[i] + bias[i % kPanel] : terms[i];
  }
}

}  // namespace splitq
