// Kernels for x86-64 with AVX2.
#pragma once

#include "gemm/kernel.h"

namespace splitq {

void RunAvx2Bits2(const PanelProduct& product);
void RunAvx2Bits3(const PanelProduct& product);
void RunAvx2Bits4(const PanelProduct& product);
void RunAvx2Bits8(const PanelProduct& product);

}  // namespace splitq
