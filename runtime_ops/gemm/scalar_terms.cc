#include "gemm/scalar.h"
#include "pack/layout.h"

namespace splitq {

void SetTermsScalar(const PanelSums& panel, float* __restrict terms) {
  for (int64_t i = 0; i < panel.rows * kPanel; ++i) {
    terms[i] = static_cast<float>(panel.sums[i]) * panel.row_scale[i / kPanel] *
               panel.channel_scale[i % kPanel];
  }
}

void AddTermsScalar(const PanelSums& panel, float* __restrict terms) {
  for (int64_t i = 0; i < panel.rows * kPanel; ++i) {
    terms[i] += static_cast<float>(panel.sums[i]) * panel.row_scale[i / kPanel] *
                panel.channel_scale[i % kPanel];
  }
}

void AddBlockTermsScalar(const PanelSums& panel, float* __restrict terms) {
  for (int64_t i = 0; i < panel.rows * kPanel; ++i) {
    terms[i] += static_cast<float>(panel.sums[i]) * panel.channel_scale[i % kPanel];
  }
}

void StoreTermsScalar(const float* terms, int64_t rows, const float* bias, float* __restrict y,
                      int64_t y_stride) {
  for (int64_t i = 0; i < rows * kPanel; ++i) {
    float& target = y[i / kPanel * y_stride + i % kPanel];
    target = bias != nullptr ? terms[i] + bias[i % kPanel] : terms[i];
  }
}

}  // namespace splitq
