// Reads: layout 1, all bit widths. Tile: 2 rows x 16 channels, the row left over alone. Features:
// NEON.
// Exactness: int32, exact. Up to 6 bits the four products of a chunk, each at most 63 * 128 in
// magnitude, are added in 16 bits and then go to 32; at 8 bits two of 128 * 128 would be too much,
// and each product goes to 32 bits alone.
// Idea: a quad of a row, twice in a register, times two channels of the panel; a channel's sum lies
// in two lanes until the end. Chunks come from neon_panel.h.
#include "gemm/neon.h"
#include "gemm/neon_panel.h"

namespace splitq {
namespace {

template <int bits, int rows>
struct Tile {
  static constexpr int kBits = bits, kRows = rows, kWidth = kQuarters;

  int32x4_t low[rows][kQuarters], high[rows][kQuarters];  // 2 channels each, 2 lanes a channel

  template <int chunk>
  SPLITQ_INLINE void Add(const uint8_t* step, const int8_t* codes, int64_t stride);
  SPLITQ_INLINE void Store(const int32_t* begin, int32_t* sums) const;
};

// 4 quads: of weights, or of codes, each quad in every 4 bytes of its register.
struct Quads {
  int8x16_t quad[4];
};

SPLITQ_INLINE Quads BroadcastCodes(const int8_t* codes) {
  const int32x4_t all = vreinterpretq_s32_s8(vld1q_s8(codes));
  return {
      vreinterpretq_s8_s32(vdupq_laneq_s32(all, 0)), vreinterpretq_s8_s32(vdupq_laneq_s32(all, 1)),
      vreinterpretq_s8_s32(vdupq_laneq_s32(all, 2)), vreinterpretq_s8_s32(vdupq_laneq_s32(all, 3))};
}

template <int bits>
SPLITQ_INLINE void AddQuads(const Quads& weights, const Quads& codes, int32x4_t& low,
                            int32x4_t& high) {
  int16x8_t short_low = vmull_s8(vget_low_s8(weights.quad[0]), vget_low_s8(codes.quad[0]));
  int16x8_t short_high = vmull_high_s8(weights.quad[0], codes.quad[0]);
  for (int i = 1; i < 4; ++i) {
    const int8x16_t weight = weights.quad[i], code = codes.quad[i];
    if constexpr (bits == 8) {
      low = vpadalq_s16(low, short_low);
      high = vpadalq_s16(high, short_high);
      short_low = vmull_s8(vget_low_s8(weight), vget_low_s8(code));
      short_high = vmull_high_s8(weight, code);
    } else {
      short_low = vmlal_s8(short_low, vget_low_s8(weight), vget_low_s8(code));
      short_high = vmlal_high_s8(short_high, weight, code);
    }
  }
  low = vpadalq_s16(low, short_low);
  high = vpadalq_s16(high, short_high);
}

template <int bits, int rows>
template <int chunk>
void Tile<bits, rows>::Add(const uint8_t* step, const int8_t* codes, int64_t stride) {
  Quads four[rows];
  for (int m = 0; m < rows; ++m) four[m] = BroadcastCodes(codes + m * stride);
  for (int n = 0; n < kQuarters; ++n) {
    const uint8_t* quarter = step + n * kQuarterBytes;
    const Quads weights{
        LoadWeights<bits, 4 * chunk>(quarter), LoadWeights<bits, 4 * chunk + 1>(quarter),
        LoadWeights<bits, 4 * chunk + 2>(quarter), LoadWeights<bits, 4 * chunk + 3>(quarter)};
    for (int m = 0; m < rows; ++m) AddQuads<bits>(weights, four[m], low[m][n], high[m][n]);
  }
}

template <int bits, int rows>
void Tile<bits, rows>::Store(const int32_t* begin, int32_t* sums) const {
  for (int m = 0; m < rows; ++m) {
    const int32x4_t start = vdupq_n_s32(begin[m]);
    for (int n = 0; n < kQuarters; ++n) {
      const int32x4_t added = vpaddq_s32(low[m][n], high[m][n]);
      vst1q_s32(sums + m * kPanel + n * kQuarterChannels, vaddq_s32(start, added));
    }
  }
}

template <int bits>
SPLITQ_INLINE void Run(const PanelProduct& product) {
  int64_t m = 0;
  for (; m + 2 <= product.rows; m += 2) RunRows<Tile<bits, 2>>(product, m);
  if (m < product.rows) RunRows<Tile<bits, 1>>(product, m);
}

}  // namespace

void RunNeonBits2(const PanelProduct& product) { RunEachPanel<Run<2>>(product); }
void RunNeonBits3(const PanelProduct& product) { RunEachPanel<Run<3>>(product); }
void RunNeonBits4(const PanelProduct& product) { RunEachPanel<Run<4>>(product); }
void RunNeonBits6(const PanelProduct& product) { RunEachPanel<Run<6>>(product); }
void RunNeonBits8(const PanelProduct& product) { RunEachPanel<Run<8>>(product); }

}  // namespace splitq
