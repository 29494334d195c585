// Kernels in plain C++, for every processor.
#pragma once

#include "gemm/kernel.h"

namespace splitq {

void RunScalar2(const PanelProduct& product);
void RunScalar3(const PanelProduct& product);
void RunScalar4(const PanelProduct& product);
void RunScalar8(const PanelProduct& product);

}  // namespace splitq
