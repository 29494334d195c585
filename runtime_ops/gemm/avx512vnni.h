// Kernels for x86-64 with AVX-512 BW and VNNI.
#pragma once

#include "gemm/kernel.h"

namespace splitq {

void RunAvx512VnniBits2(const PanelProduct& product);
void RunAvx512VnniBits3(const PanelProduct& product);
void RunAvx512VnniBits4(const PanelProduct& product);
void RunAvx512VnniBits6(const PanelProduct& product);
void RunAvx512VnniBits8(const PanelProduct& product);

void RunTermsAvx512VnniBits2(const PanelProduct& product, const TermsOutput& output);
void RunTermsAvx512VnniBits3(const PanelProduct& product, const TermsOutput& output);
void RunTermsAvx512VnniBits4(const PanelProduct& product, const TermsOutput& output);
void RunTermsAvx512VnniBits6(const PanelProduct& product, const TermsOutput& output);
void RunTermsAvx512VnniBits8(const PanelProduct& product, const TermsOutput& output);

void RunOutputAvx512VnniBits4(const OutputSum& sum);

void RunBlocksAvx512VnniBits2(const BlockProduct& product);
void RunBlocksAvx512VnniBits3(const BlockProduct& product);
void RunBlocksAvx512VnniBits4(const BlockProduct& product);
void RunBlocksAvx512VnniBits6(const BlockProduct& product);
void RunBlocksAvx512VnniBits8(const BlockProduct& product);

}  // namespace splitq
