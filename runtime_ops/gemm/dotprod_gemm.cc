// Reads: layout 1, all bit widths. Tile: 8 rows x 8 channels, twice; the rows left over 4, 3, 2 or
// 1 x 16 channels: then all sums, codes and weights of a tile stay in the 32 registers. Features:
// NEON with dot products.
// Exactness: int32, exact.
// Idea: sdot multiplies a quad of 4 channels by one lane, a quad of a row. Chunks come from
// neon_panel.h.
#include "gemm/neon.h"
#include "gemm/neon_panel.h"

namespace splitq {
namespace {

template <int bits, int rows, int width>
struct Tile {
  static constexpr int kBits = bits, kRows = rows, kWidth = width;

  int32x4_t sums[rows][width];

  template <int chunk>
  SPLITQ_INLINE void Add(const uint8_t* step, const int8_t* codes, int64_t stride) {
    int8x16_t four[rows];  // quads of each row
    for (int m = 0; m < rows; ++m) four[m] = vld1q_s8(codes + m * stride);
    for (int n = 0; n < width; ++n) {
      const uint8_t* quarter = step + n * kQuarterBytes;
      const int8x16_t first = LoadWeights<bits, 4 * chunk>(quarter);
      const int8x16_t second = LoadWeights<bits, 4 * chunk + 1>(quarter);
      const int8x16_t third = LoadWeights<bits, 4 * chunk + 2>(quarter);
      const int8x16_t fourth = LoadWeights<bits, 4 * chunk + 3>(quarter);
      for (int m = 0; m < rows; ++m) sums[m][n] = vdotq_laneq_s32(sums[m][n], first, four[m], 0);
      for (int m = 0; m < rows; ++m) sums[m][n] = vdotq_laneq_s32(sums[m][n], second, four[m], 1);
      for (int m = 0; m < rows; ++m) sums[m][n] = vdotq_laneq_s32(sums[m][n], third, four[m], 2);
      for (int m = 0; m < rows; ++m) sums[m][n] = vdotq_laneq_s32(sums[m][n], fourth, four[m], 3);
    }
  }

  SPLITQ_INLINE void Store(const int32_t* begin, int32_t* target) const {
    for (int m = 0; m < rows; ++m) {
      const int32x4_t start = vdupq_n_s32(begin[m]);
      for (int n = 0; n < width; ++n) {
        vst1q_s32(target + m * kPanel + n * kQuarterChannels, vaddq_s32(start, sums[m][n]));
      }
    }
  }
};

template <int bits>
SPLITQ_INLINE void Run(const PanelProduct& product) {
  int64_t m = 0;
  for (; m + 8 <= product.rows; m += 8) RunRows<Tile<bits, 8, 2>>(product, m);
  if (m + 4 <= product.rows) {
    RunRows<Tile<bits, 4, 4>>(product, m);
    m += 4;
  }
  switch (product.rows - m) {
    case 3:
      return RunRows<Tile<bits, 3, 4>>(product, m);
    case 2:
      return RunRows<Tile<bits, 2, 4>>(product, m);
    case 1:
      return RunRows<Tile<bits, 1, 4>>(product, m);
  }
}

}  // namespace

void RunDotprodBits2(const PanelProduct& product) { RunEachPanel<Run<2>>(product); }
void RunDotprodBits3(const PanelProduct& product) { RunEachPanel<Run<3>>(product); }
void RunDotprodBits4(const PanelProduct& product) { RunEachPanel<Run<4>>(product); }
void RunDotprodBits6(const PanelProduct& product) { RunEachPanel<Run<6>>(product); }
void RunDotprodBits8(const PanelProduct& product) { RunEachPanel<Run<8>>(product); }

}  // namespace splitq
