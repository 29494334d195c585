// Kernels for x86-64 with AVX2.
#pragma once

#include "gemm/kernel.h"
#include "gemm/terms.h"

namespace splitq {

void RunAvx2Bits2(const PanelProduct& product);
void RunAvx2Bits3(const PanelProduct& product);
void RunAvx2Bits4(const PanelProduct& product);
void RunAvx2Bits6(const PanelProduct& product);
void RunAvx2Bits8(const PanelProduct& product);

void RunBlocksAvx2Bits2(const BlockProduct& product);
void RunBlocksAvx2Bits3(const BlockProduct& product);
void RunBlocksAvx2Bits4(const BlockProduct& product);

void SetTermsAvx2(const PanelSums& panel, float* terms);
void AddTermsAvx2(const PanelSums& panel, float* terms);
void AddBlockTermsAvx2(const PanelSums& panel, float* terms);
void StoreTermsAvx2(const float* terms, int64_t rows, const float* bias, float* y,
                    int64_t y_stride);

}  // namespace splitq
