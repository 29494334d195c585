// Reads: layout 1, all bit widths. Tile: 8 rows x 8 channels, twice; the rows left over 4 or 2 x 16
// channels, and a last single row by the dot-product kernel, where a matrix product would waste
// half its work. Features: NEON with int8 matrix products, and dot products.
// Exactness: int32, exact.
// Idea: smmla multiplies 8 k of two channels by 8 k of two rows. Two quads of the panel, zipped
// channel by channel, are 8 k; a sum register holds 2 rows x 2 channels until the end. Chunks come
// from neon_panel.h.
#include "gemm/neon.h"
#include "gemm/neon_panel.h"

namespace splitq {
namespace {

// Two registers seen as pairs of 64 bits: their first halves or their second ones.
SPLITQ_INLINE int8x16_t FirstHalves(int8x16_t a, int8x16_t b) {
  return vreinterpretq_s8_s64(vtrn1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}
SPLITQ_INLINE int8x16_t SecondHalves(int8x16_t a, int8x16_t b) {
  return vreinterpretq_s8_s64(vtrn2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

// 8 k of 4 channels, two channels a register.
struct Weights {
  int8x16_t low, high;
};

// Quads `quad` and `quad` + 1 of a step.
template <int bits, int quad>
SPLITQ_INLINE Weights LoadEight(const uint8_t* quarter) {
  const int32x4_t first = vreinterpretq_s32_s8(LoadWeights<bits, quad>(quarter));
  const int32x4_t second = vreinterpretq_s32_s8(LoadWeights<bits, quad + 1>(quarter));
  return {vreinterpretq_s8_s32(vzip1q_s32(first, second)),
          vreinterpretq_s8_s32(vzip2q_s32(first, second))};
}

template <int bits, int rows, int width>
struct Tile {
  static constexpr int kBits = bits, kRows = rows, kWidth = width, kPairs = rows / 2;

  int32x4_t low[kPairs][width], high[kPairs][width];  // 2 channels of row 0, then of row 1

  template <int chunk>
  SPLITQ_INLINE void Add(const uint8_t* step, const int8_t* codes, int64_t stride) {
    int8x16_t first[kPairs], second[kPairs];  // 8 k of two rows
    for (int p = 0; p < kPairs; ++p) {
      const int8x16_t even = vld1q_s8(codes + 2 * p * stride);
      const int8x16_t odd = vld1q_s8(codes + (2 * p + 1) * stride);
      first[p] = FirstHalves(even, odd);
      second[p] = SecondHalves(even, odd);
    }
    for (int n = 0; n < width; ++n) {
      const uint8_t* quarter = step + n * kQuarterBytes;
      AddEight(LoadEight<bits, 4 * chunk>(quarter), first, n);
      AddEight(LoadEight<bits, 4 * chunk + 2>(quarter), second, n);
    }
  }

  SPLITQ_INLINE void AddEight(const Weights& weights, const int8x16_t* pairs, int n) {
    for (int p = 0; p < kPairs; ++p) {
      low[p][n] = vmmlaq_s32(low[p][n], pairs[p], weights.low);
      high[p][n] = vmmlaq_s32(high[p][n], pairs[p], weights.high);
    }
  }

  SPLITQ_INLINE void Store(const int32_t* begin, int32_t* sums) const {
    for (int p = 0; p < kPairs; ++p) {
      int32_t* even = sums + 2 * p * kPanel;
      const int32x4_t even_start = vdupq_n_s32(begin[2 * p]);
      const int32x4_t odd_start = vdupq_n_s32(begin[2 * p + 1]);
      for (int n = 0; n < width; ++n, even += kQuarterChannels) {
        const int8x16_t a = vreinterpretq_s8_s32(low[p][n]), b = vreinterpretq_s8_s32(high[p][n]);
        vst1q_s32(even, vaddq_s32(even_start, vreinterpretq_s32_s8(FirstHalves(a, b))));
        vst1q_s32(even + kPanel, vaddq_s32(odd_start, vreinterpretq_s32_s8(SecondHalves(a, b))));
      }
    }
  }
};

using RunProduct = void (*)(const PanelProduct& product);

template <int bits, RunProduct run_one_row>
SPLITQ_INLINE void Run(const PanelProduct& product) {
  int64_t m = 0;
  for (; m + 8 <= product.rows; m += 8) RunRows<Tile<bits, 8, 2>>(product, m);
  if (m + 4 <= product.rows) {
    RunRows<Tile<bits, 4, 4>>(product, m);
    m += 4;
  }
  if (m + 2 <= product.rows) {
    RunRows<Tile<bits, 2, 4>>(product, m);
    m += 2;
  }
  if (m == product.rows) return;
  PanelProduct last = product;
  last.codes += m * product.codes_stride;
  last.code_sums += m * product.code_sums_stride;
  last.rows = 1;
  last.sums += m * kPanel;
  run_one_row(last);
}

}  // namespace

void RunI8mmBits2(const PanelProduct& product) { RunEachPanel<Run<2, RunDotprodBits2>>(product); }
void RunI8mmBits3(const PanelProduct& product) { RunEachPanel<Run<3, RunDotprodBits3>>(product); }
void RunI8mmBits4(const PanelProduct& product) { RunEachPanel<Run<4, RunDotprodBits4>>(product); }
void RunI8mmBits6(const PanelProduct& product) { RunEachPanel<Run<6, RunDotprodBits6>>(product); }
void RunI8mmBits8(const PanelProduct& product) { RunEachPanel<Run<8, RunDotprodBits8>>(product); }

}  // namespace splitq
