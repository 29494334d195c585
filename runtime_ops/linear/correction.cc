#include "linear/correction.h"

#include <algorithm>

#include "include/restrict.h"
#include "linear/panel_terms.h"
#include "quantize/rows.h"

namespace splitq {
namespace {

constexpr int kLatentBits = 8;

// target += row * gate. A whole panel has a form of its own, which compilers make vectors of.
void AddGated(const float* SPLITQ_RESTRICT row, const float* SPLITQ_RESTRICT gate, int64_t width,
              float* SPLITQ_RESTRICT target) {
  if (width == kPanel) {
    for (int64_t n = 0; n < kPanel; ++n) target[n] += row[n] * gate[n];
  } else {
    for (int64_t n = 0; n < width; ++n) target[n] += row[n] * gate[n];
  }
}

// Adds gate * terms of the columns below `rank` to z, rows through `index` (null: the identity).
void AddBranch(const Correction& correction, const CodeRows& rows, const int64_t* index,
               int64_t count, const float* gate, int64_t rank, float* z) {
  FloatTile terms;
  const int64_t panels = CeilDiv(rank, kPanel);
  const int64_t step = TilePanels(count);
  for (int64_t panel = 0; panel < panels; panel += step) {
    const PanelRange range{panel, std::min(panels - panel, step)};
    PanelTerms(correction.u, range, rows, count, terms);
    const float* row = terms;
    for (int64_t first = panel * kPanel; first < (panel + range.count) * kPanel; first += kPanel) {
      const int64_t width = std::min(rank - first, kPanel);
      for (int64_t m = 0; m < count; ++m, row += kPanel) {
        float* target = z + (index != nullptr ? index[m] : m) * correction.rank() + first;
        AddGated(row, gate + first, width, target);
      }
    }
  }
}

}  // namespace

int64_t LatentWorkspace(const Correction& correction) { return kTileRows * correction.rank(); }

void QuantizeLatent(const Correction& correction, const CodeRows& main, const MacRows& mac,
                    int64_t count, float* workspace, const CodeRows& latent) {
  const int64_t rank = correction.rank();
  std::fill(workspace, workspace + count * rank, 0.0f);
  if (correction.cws_rank > 0) {
    AddBranch(correction, main, nullptr, count, correction.gate_cws, correction.cws_rank,
              workspace);
  }
  if (mac.count > 0) {
    AddBranch(correction, mac.residual, mac.index, mac.count, correction.gate_mac,
              correction.mac_rank, workspace);
  }
  for (int64_t m = 0; m < count; ++m) {
    QuantizeRowValues(*correction.kernels, {kLatentBits}, workspace + m * rank, rank,
                      latent.target(m));
    FinishRow(*correction.kernels, latent, m);
  }
}

}  // namespace splitq
