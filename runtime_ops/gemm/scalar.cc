// Reads: layout 1, all bit widths. Tile: 1 row x 16 channels x 256 k. Features: none.
// Exactness: int32, exact.
// Idea: a chunk of the panel is unpacked once to int16 [16][256] and kept for all rows; a row is
// widened to int16 once a chunk. Dot products of two int16 arrays are what compilers turn into a
// multiply-add of pairs (pmaddwd, smlal).
#include "gemm/scalar.h"

#include <algorithm>

#include "pack/layout.h"

namespace splitq {
namespace {

constexpr int64_t kChunk = 256;  // a multiple of every block; 16 x 256 int16 stay in the L1 cache

using UnpackedPanel = int16_t[kPanel][kChunk];

// Blocks [first, first + count) of the panel to weights[n][k].
template <int bits>
void UnpackChunk(const uint8_t* panel, int64_t first, int64_t count, UnpackedPanel& weights) {
  constexpr int kOffset = 1 << (bits - 1);
  for (int64_t b = 0; b < count; ++b) {
    const uint8_t* block = panel + (first + b) * BlockBytes(bits);
    for (int n = 0; n < kPanel; ++n) {
      int16_t* target = weights[n] + b * BlockChannels(bits);
      for (int i = 0; i < kQuad; ++i) {
        const int byte = static_cast<int>(kQuad * n + i);
        for (int f = 0; f < FieldsPerBlock(bits); ++f) {
          target[f * kQuad + i] = static_cast<int16_t>(LoadField<bits>(block, f, byte) - kOffset);
        }
      }
    }
  }
}

// Channels [begin, begin + length) of a row to int16, zeros outside [k_begin, k_end).
void WidenRow(const int8_t* codes, int64_t begin, int64_t length, const PanelProduct& product,
              int16_t* wide) {
  const int64_t skip = std::max<int64_t>(product.k_begin - begin, 0);
  const int64_t stop = std::min(product.k_end - begin, length);
  std::fill(wide, wide + skip, int16_t{0});
  for (int64_t k = skip; k < stop; ++k) wide[k] = codes[begin + k];
  std::fill(wide + stop, wide + length, int16_t{0});
}

// sums[n] += wide . weights[n]
void AddDots(const int16_t* __restrict wide, const UnpackedPanel& weights, int64_t length,
             int32_t* __restrict sums) {
  for (int n = 0; n < kPanel; ++n) {
    const int16_t* row = weights[n];
    int32_t sum = 0;
    for (int64_t k = 0; k < length; ++k) sum += wide[k] * row[k];
    sums[n] += sum;
  }
}

template <int bits>
void Run(const PanelProduct& product) {
  constexpr int64_t kStep = BlockChannels(bits);
  alignas(64) UnpackedPanel weights;
  alignas(64) int16_t wide[kChunk];
  std::fill(product.sums, product.sums + product.rows * kPanel, 0);
  const int64_t first_channel = product.k_begin / kStep * kStep;
  for (int64_t begin = first_channel; begin < product.k_end; begin += kChunk) {
    const int64_t blocks = CeilDiv(std::min(product.k_end - begin, kChunk), kStep);
    UnpackChunk<bits>(product.panel, begin / kStep, blocks, weights);
    for (int64_t m = 0; m < product.rows; ++m) {
      WidenRow(product.codes + m * product.codes_stride, begin, blocks * kStep, product, wide);
      AddDots(wide, weights, blocks * kStep, product.sums + m * kPanel);
    }
  }
}

}  // namespace

void RunScalar2(const PanelProduct& product) { RunEachPanel<Run<2>>(product); }
void RunScalar3(const PanelProduct& product) { RunEachPanel<Run<3>>(product); }
void RunScalar4(const PanelProduct& product) { RunEachPanel<Run<4>>(product); }
void RunScalar6(const PanelProduct& product) { RunEachPanel<Run<6>>(product); }
void RunScalar8(const PanelProduct& product) { RunEachPanel<Run<8>>(product); }

}  // namespace splitq
