// Scaled products of a few rows with one panel of 16 output channels.
#pragma once

#include <cstdint>

#include "linear/weight.h"

namespace splitq {

inline constexpr int64_t kTileRows = 64;  // amortizes the unpacking of a panel; sums stay in L1

// Floats of a tile: [kTileRows, 16].
using FloatTile = float[kTileRows * kPanel];

// terms[m][n] = sum * row scale * channel scale (docs/ops.md, SplitQLinear), for rows <= kTileRows.
// With blocks, the sums of the blocks are scaled and added in order before the row scale.
// Columns at and after channels_out become zero.
void PanelTerms(const PackedWeight& weight, int64_t panel, const CodeRows& rows, int64_t count,
                float* terms);

// The same added to `total`, for a weight without blocks.
void AddPanelTerms(const PackedWeight& weight, int64_t panel, const CodeRows& rows, int64_t count,
                   float* total);

// Output channels in this panel, 16 but for the last one.
int64_t PanelWidth(const PackedWeight& weight, int64_t panel);

}  // namespace splitq
