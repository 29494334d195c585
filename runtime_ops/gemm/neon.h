// Kernels for ARM64: plain NEON, which every such processor has, dot products and matrix products.
#pragma once

#include "gemm/kernel.h"
#include "gemm/terms.h"

namespace splitq {

void RunNeonBits2(const PanelProduct& product);
void RunNeonBits3(const PanelProduct& product);
void RunNeonBits4(const PanelProduct& product);
void RunNeonBits6(const PanelProduct& product);
void RunNeonBits8(const PanelProduct& product);

void RunDotprodBits2(const PanelProduct& product);
void RunDotprodBits3(const PanelProduct& product);
void RunDotprodBits4(const PanelProduct& product);
void RunDotprodBits6(const PanelProduct& product);
void RunDotprodBits8(const PanelProduct& product);

void RunI8mmBits2(const PanelProduct& product);
void RunI8mmBits3(const PanelProduct& product);
void RunI8mmBits4(const PanelProduct& product);
void RunI8mmBits6(const PanelProduct& product);
void RunI8mmBits8(const PanelProduct& product);

void SetTermsNeon(const PanelSums& panel, float* terms);
void AddTermsNeon(const PanelSums& panel, float* terms);
void AddBlockTermsNeon(const PanelSums& panel, float* terms);
void StoreTermsNeon(const float* terms, int64_t rows, const float* bias, float* y,
                    int64_t y_stride);

}  // namespace splitq
