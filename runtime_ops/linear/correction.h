// The low-rank branches CWS and MAC (eq. 16-19): codes -> latent codes -> correction.
#pragma once

#include <cstdint>

#include "linear/code_rows.h"
#include "linear/weight.h"
#include "quantize/kernel.h"

namespace splitq {

struct Correction {
  const RowKernels* kernels = nullptr;
  PackedWeight u;                   // [main channels, rank]
  PackedWeight v;                   // [rank, N]
  const float* gate_cws = nullptr;  // [cws_rank]
  const float* gate_mac = nullptr;  // [mac_rank]
  int64_t cws_rank = 0;
  int64_t mac_rank = 0;
  bool mac_on_text_only = true;

  int64_t rank() const { return u.channels_out; }
};

// The rows of a tile that take MAC, gathered: row i of `residual` belongs to row index[i].
struct MacRows {
  CodeRows residual;
  const int64_t* index = nullptr;
  int64_t count = 0;
};

// Whether a row takes MAC. modality: [rows], null if every row does.
inline bool TakesMac(const Correction& correction, const int8_t* modality, int64_t row) {
  return correction.mac_rank > 0 && (!correction.mac_on_text_only || modality[row] == 0);
}

// Floats of working memory that QuantizeLatent needs.
int64_t LatentWorkspace(const Correction& correction);

// z = CWS + MAC of `count` <= kTileRows rows, quantized per token at 8 bits into `latent`
// (channels: rank). main: codes of all rows, read if cws_rank > 0.
void QuantizeLatent(const Correction& correction, const CodeRows& main, const MacRows& mac,
                    int64_t count, float* workspace, const CodeRows& latent);

}  // namespace splitq
