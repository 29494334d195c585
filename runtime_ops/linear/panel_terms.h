// Scaled products of a few rows with a few panels of 16 output channels.
#pragma once

#include <cstdint>

#include "linear/code_rows.h"
#include "linear/weight.h"

namespace splitq {

// A tile: amortizes the unpacking of panels and the loading of codes; its sums stay in the L1
// cache.
inline constexpr int64_t kTileRows = 64;

// Numbers of the largest tile: [panels, rows, 16], dense.
inline constexpr int64_t kTileSize = 3 * kTileRows * kPanel;

// Panels of a tile of so many rows, at most. Few rows take many: their time is that of reading the
// weights, which stops for a moment at the end of every tile.
constexpr int64_t TilePanels(int64_t rows) {
  return rows <= 2 ? 96 : rows <= 4 ? 48 : rows <= 16 ? 12 : rows <= 32 ? 6 : 3;
}
static_assert(TilePanels(2) * 2 * kPanel <= kTileSize && TilePanels(4) * 4 * kPanel <= kTileSize);
static_assert(TilePanels(16) * 16 * kPanel <= kTileSize);
static_assert(TilePanels(32) * 32 * kPanel <= kTileSize);
static_assert(TilePanels(kTileRows) * kTileRows * kPanel <= kTileSize);

using FloatTile = float[kTileSize];

// Panels [first, first + count) of a weight; count <= TilePanels(rows of the tile).
struct PanelRange {
  int64_t first;
  int64_t count;
};

// terms[p][m][n] = sum * row scale * channel scale (docs/ops.md, SplitQLinear), for `count` <=
// kTileRows rows. With blocks, the sums of the blocks are scaled and added in order before the row
// scale. Columns at and after channels_out become zero.
void PanelTerms(const PackedWeight& weight, PanelRange panels, const CodeRows& rows, int64_t count,
                float* terms);

// The same added to `total`, for a weight without blocks.
void AddPanelTerms(const PackedWeight& weight, PanelRange panels, const CodeRows& rows,
                   int64_t count, float* total);

inline constexpr int64_t kMostFactors = 3;

// A weight without blocks and the rows that it is multiplied with.
struct Factors {
  const PackedWeight* weight = nullptr;
  CodeRows rows;
};

// Where the sum of a tile's terms goes.
struct TileOutput {
  const float* bias;  // [channels_out] or null
  float* y;           // [count, channels_out]
};

// Whether one kernel makes the products of all of these factors at once.
bool HaveOutput(const Factors* factors, int64_t added);

// y = terms + the products of these factors, in order, + bias, at once; if HaveOutput.
void OutputTerms(const Factors* factors, int64_t added, PanelRange panels, int64_t count,
                 const float* terms, const TileOutput& output);

// Output channels in this panel, 16 but for the last one.
int64_t PanelWidth(const PackedWeight& weight, int64_t panel);

}  // namespace splitq
