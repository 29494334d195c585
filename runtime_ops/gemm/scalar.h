// Kernels in plain C++, for every processor.
#pragma once

#include "gemm/kernel.h"
#include "gemm/terms.h"

namespace splitq {

void RunScalar2(const PanelProduct& product);
void RunScalar3(const PanelProduct& product);
void RunScalar4(const PanelProduct& product);
void RunScalar6(const PanelProduct& product);
void RunScalar8(const PanelProduct& product);

void SetTermsScalar(const PanelSums& panel, float* terms);
void AddTermsScalar(const PanelSums& panel, float* terms);
void AddBlockTermsScalar(const PanelSums& panel, float* terms);
void StoreTermsScalar(const float* terms, int64_t rows, const float* bias, float* y,
                      int64_t y_stride);

}  // namespace splitq
