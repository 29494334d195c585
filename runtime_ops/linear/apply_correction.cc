#include "linear/apply_correction.h"

#include <algorithm>
#include <cstring>

#include "include/scratch.h"
#include "linear/panel_terms.h"

namespace splitq {
namespace {

constexpr int64_t kSerialWork = int64_t{1} << 20;  // multiplications one thread does at once

// Memory of one tile of rows; kernels want rows padded, tensors are dense.
struct Tile {
  CodeRows main, residual, latent;
  int64_t* mac_index;
  float* floats;
};

CodeRows TakeRows(Scratch& scratch, int64_t channels) {
  const int64_t stride = RoundUp(channels, kCodeRowAlign);
  int8_t* codes = scratch.Take<int8_t>(kTileRows * stride);
  return {codes, stride, scratch.Take<float>(kTileRows)};
}

Tile TakeTile(const Correction& correction, Scratch& scratch) {
  Tile tile;
  tile.main = TakeRows(scratch, correction.u.channels_in);
  tile.residual = TakeRows(scratch, correction.u.channels_in);
  tile.latent = TakeRows(scratch, correction.rank());
  tile.mac_index = scratch.Take<int64_t>(kTileRows);
  tile.floats = scratch.Take<float>(LatentWorkspace(correction));
  return tile;
}

int64_t TileBytes(const Correction& correction) {
  Scratch scratch;
  TakeTile(correction, scratch);
  return scratch.used() + Scratch::kAlign;
}

void CopyRow(const int8_t* codes, float scale, int64_t width, const CodeRows& rows, int64_t row) {
  std::memcpy(rows.row(row), codes, static_cast<size_t>(width));
  std::memset(rows.row(row) + width, 0, static_cast<size_t>(rows.stride - width));
  rows.scale[row] = scale;
}

// Copies the rows of the tile that starts at row `first`; MAC's rows are gathered.
MacRows LoadTile(const Correction& correction, const CorrectionRows& data, int64_t first,
                 int64_t count, const Tile& tile) {
  const int64_t width = correction.u.channels_in;
  MacRows mac{tile.residual, tile.mac_index, 0};
  for (int64_t m = 0; m < count; ++m) {
    const int64_t row = first + m;
    CopyRow(data.main_codes + row * width, data.main_scale[row], width, tile.main, m);
    std::memset(tile.latent.row(m), 0, static_cast<size_t>(tile.latent.stride));
    if (!TakesMac(correction, data.modality, row)) continue;
    CopyRow(data.residual_codes + row * width, data.residual_scale[row], width, tile.residual,
            mac.count);
    tile.mac_index[mac.count++] = m;
  }
  return mac;
}

void CorrectTile(const Correction& correction, const CorrectionRows& data, int64_t first,
                 const Tile& tile) {
  const int64_t count = std::min(data.rows - first, kTileRows);
  const MacRows mac = LoadTile(correction, data, first, count, tile);
  QuantizeLatent(correction, tile.main, mac, count, tile.floats, tile.latent);
  const int64_t outputs = correction.v.channels_out;
  FloatTile terms;
  for (int64_t panel = 0; panel < correction.v.panels(); ++panel) {
    PanelTerms(correction.v, panel, tile.latent, count, terms);
    const int64_t width = PanelWidth(correction.v, panel);
    for (int64_t m = 0; m < count; ++m) {
      std::copy_n(terms + m * kPanel, width, data.output + (first + m) * outputs + panel * kPanel);
    }
  }
}

}  // namespace

int64_t ScratchBytes(const Correction& correction, int64_t rows) {
  return CeilDiv(rows, kTileRows) * TileBytes(correction);
}

void ApplyCorrection(const Correction& correction, const CorrectionRows& data, void* memory,
                     const ParallelFor& parallel) {
  const int64_t tile_bytes = TileBytes(correction);
  const int64_t row_work =
      correction.rank() * (correction.u.channels_in + correction.v.channels_out);
  parallel(CeilDiv(data.rows, kTileRows), row_work < kSerialWork / data.rows, [&](int64_t index) {
    Scratch scratch(static_cast<uint8_t*>(memory) + index * tile_bytes);
    CorrectTile(correction, data, index * kTileRows, TakeTile(correction, scratch));
  });
}

}  // namespace splitq
