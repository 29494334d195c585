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

Tile TakeTile(const Correction& correction, Scratch& scratch) {
  Tile tile;
  tile.main = TakeCodeRows(scratch, kTileRows, correction.u.channels_in);
  tile.residual = TakeCodeRows(scratch, kTileRows, correction.u.channels_in);
  tile.latent = TakeCodeRows(scratch, kTileRows, correction.rank());
  tile.mac_index = scratch.Take<int64_t>(kTileRows);
  tile.floats = scratch.Take<float>(LatentWorkspace(correction));
  return tile;
}

int64_t TileBytes(const Correction& correction) {
  Scratch scratch;
  TakeTile(correction, scratch);
  return scratch.used() + Scratch::kAlign;
}

void CopyRow(const RowKernels& kernels, const int8_t* codes, float scale, const CodeRows& rows,
             int64_t row) {
  std::memcpy(rows.row(row), codes, static_cast<size_t>(rows.channels));
  rows.scale[row] = scale;
  rows.sums[row * rows.sums_stride()] = kernels.sum_codes(codes, rows.channels);
  FinishRow(kernels, rows, row);
}

// Copies the rows of the tile that starts at row `first`; MAC's rows are gathered.
MacRows LoadTile(const Correction& correction, const CorrectionRows& data, int64_t first,
                 int64_t count, const Tile& tile) {
  const RowKernels& kernels = *correction.kernels;
  const int64_t width = correction.u.channels_in;
  MacRows mac{tile.residual, tile.mac_index, 0};
  for (int64_t m = 0; m < count; ++m) {
    const int64_t row = first + m;
    CopyRow(kernels, data.main_codes + row * width, data.main_scale[row], tile.main, m);
    if (!TakesMac(correction, data.modality, row)) continue;
    CopyRow(kernels, data.residual_codes + row * width, data.residual_scale[row], tile.residual,
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
  const int64_t step = TilePanels(count);
  for (int64_t begin = 0; begin < correction.v.panels(); begin += step) {
    const PanelRange panels{begin, std::min(correction.v.panels() - begin, step)};
    PanelTerms(correction.v, panels, tile.latent, count, terms);
    const float* row = terms;
    for (int64_t panel = panels.first; panel < panels.first + panels.count; ++panel) {
      float* output = data.output + first * outputs + panel * kPanel;
      const int64_t width = PanelWidth(correction.v, panel);
      for (int64_t m = 0; m < count; ++m, row += kPanel, output += outputs) {
        std::copy_n(row, width, output);
      }
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
