// The tiles of a layer's output, handed out to whichever thread is free.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "include/sizes.h"
#include "linear/panel_terms.h"

namespace splitq {

// Some rows and panels of y.
struct OutputRange {
  int64_t first, count;
  PanelRange panels;
};

// Hands out the tiles of y: the rows of one tile, from panel to panel, then the next rows. The
// tiles of the last rows shrink to the end, so that threads are done at the same time although
// their tiles began large.
class PanelQueue {
 public:
  PanelQueue(int64_t rows, int64_t panels, int64_t threads)
      : rows_(rows), panels_(panels), threads_(threads) {
    for (int64_t at = 0; at < end(); at += Panels(at)) ++tiles_;
  }

  int64_t tiles() const { return tiles_; }

  // To be called `tiles()` times, by any thread.
  OutputRange Next() {
    int64_t at = next_.load(std::memory_order_relaxed);
    while (!next_.compare_exchange_weak(at, at + Panels(at), std::memory_order_relaxed)) {
    }
    const int64_t first = at / panels_ * kTileRows;
    return {first, Rows(at), {at % panels_, Panels(at)}};
  }

 private:
  static constexpr int64_t kFewest = 6;  // or the most that a tile has

  // Panels of all row tiles, numbered through.
  int64_t end() const { return CeilDiv(rows_, kTileRows) * panels_; }

  int64_t Rows(int64_t at) const { return std::min(rows_ - at / panels_ * kTileRows, kTileRows); }

  // Panels of the tile that begins here.
  int64_t Panels(int64_t at) const {
    const int64_t most = TilePanels(Rows(at));
    const int64_t share = std::max((end() - at) / threads_, std::min(kFewest, most));
    return std::min({most, share, panels_ - at % panels_});
  }

  int64_t rows_, panels_, threads_;
  int64_t tiles_ = 0;
  std::atomic<int64_t> next_{0};
};

}  // namespace splitq
