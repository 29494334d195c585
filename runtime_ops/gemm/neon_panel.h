// What the NEON micro-kernels share: the walk over a panel in chunks of 16 k, which is one register
// of codes a row, and the unpacking of its weights. They differ in how a chunk is multiplied.
//
// A chunk is 4 quads of 4 consecutive k; a quad of the panel is 4 registers, the quarters, of 4
// channels each. Weights below 8 bits come as the stored codes u, whose zero point is taken off the
// sum: sum(q a) = sum(u a) - z sum(a). At 8 bits u does not fit the signed operand, q does.
//
// The files that include this are compiled for different processors: everything here has internal
// linkage, lest the linker keep a copy for a newer one, so the namespace without a name is wanted.
#pragma once

#include <arm_neon.h>

#include "gemm/kernel.h"
#include "pack/layout.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

constexpr int64_t kChunk = 16;  // k ranges begin at its multiples
constexpr int kQuarters = 4;
constexpr int64_t kQuarterBytes = kVectorBytes / kQuarters;  // one register
constexpr int64_t kQuarterChannels = kPanel / kQuarters;

// A step is whole chunks in whole blocks: 4, 2, 1 and 1 blocks of 8, 4, 2 and 6 bits are one chunk,
// a block of 3 bits is two. Numbers of the layout are constants here: no function of it is called.
template <int bits>
struct Layout {
  static constexpr int64_t kBlock = BlockChannels(bits);
  static constexpr int64_t kBlockBytes = BlockBytes(bits);
  static constexpr int64_t kStep = kBlock > kChunk ? kBlock : kChunk;
  static constexpr int64_t kBytes = kStep / kBlock * kBlockBytes;
  static constexpr bool kTwoChunks = kStep > kChunk;
  static constexpr int kFields = FieldsPerBlock(bits);
  static constexpr int kZeroPoint = bits == 8 ? 0 : 1 << (bits - 1);
};

// (value >> shift) & mask, byte by byte, without the instructions that would change nothing.
template <int shift, int mask>
SPLITQ_INLINE uint8x16_t Field(uint8x16_t value) {
  if constexpr (shift != 0) value = vshrq_n_u8(value, shift);
  if constexpr (mask != 255 >> shift) value = vandq_u8(value, vdupq_n_u8(mask));
  return value;
}

// Stored codes of field `field` of a block. quarter: its first byte in the block.
template <int bits, int field>
SPLITQ_INLINE uint8x16_t LoadStored(const uint8_t* quarter) {
  if constexpr (bits == 6) {
    if constexpr (field < 3) return Field<0, 63>(vld1q_u8(quarter + field * kVectorBytes));
    const uint8x16_t low = Field<6, 3>(vld1q_u8(quarter));
    const uint8x16_t middle = Field<4, 12>(vld1q_u8(quarter + kVectorBytes));
    const uint8x16_t high = Field<2, 48>(vld1q_u8(quarter + 2 * kVectorBytes));
    return vorrq_u8(low, vorrq_u8(middle, high));
  } else if constexpr (bits != 3) {
    return Field<field * bits, (1 << bits) - 1>(vld1q_u8(quarter));
  } else if constexpr (field < 6) {
    return Field<field % 2 * 3, 7>(vld1q_u8(quarter + field / 2 * kVectorBytes));
  } else {
    const uint8x16_t middle = vld1q_u8(quarter + kVectorBytes);
    if constexpr (field == 6) {
      return vorrq_u8(Field<6, 3>(vld1q_u8(quarter)), Field<4, 4>(middle));
    } else {
      const uint8x16_t high = vld1q_u8(quarter + 2 * kVectorBytes);
      return vorrq_u8(Field<5, 6>(high), Field<7, 1>(middle));
    }
  }
}

// Weights of quad `quad` of a step, 4 k of 4 channels. quarter: their first byte in the step.
template <int bits, int quad>
SPLITQ_INLINE int8x16_t LoadWeights(const uint8_t* quarter) {
  constexpr int kFields = Layout<bits>::kFields;
  const uint8_t* block = quarter + quad / kFields * Layout<bits>::kBlockBytes;
  const uint8x16_t stored = LoadStored<bits, quad % kFields>(block);
  if constexpr (bits == 8) return vreinterpretq_s8_u8(veorq_u8(stored, vdupq_n_u8(0x80)));
  return vreinterpretq_s8_u8(stored);
}

// The chunk in which the weight ends, if its panel ends there too: a copy of the blocks that exist.
// Codes are zero from there on.
template <typename Tile>
SPLITQ_INLINE void AddLastChunk(const uint8_t* step, int64_t channels, const int8_t* codes,
                                int64_t stride, Tile& tile) {
  using Bits = Layout<Tile::kBits>;
  uint8_t copy[Bits::kBytes] = {};
  for (int64_t k = 0; k < channels; k += Bits::kBlock) {
    const int64_t block = k / Bits::kBlock * Bits::kBlockBytes;
    for (int64_t quarter = 0; quarter < Tile::kWidth; ++quarter) {
      const int64_t byte = block + quarter * kQuarterBytes;
      vst1q_u8(copy + byte, vld1q_u8(step + byte));
    }
  }
  tile.template Add<0>(copy, codes, stride);
}

// Adds the products of the whole range to a tile, which is
//   kBits, kWidth      of the weight; in quarters
//   Add<chunk>(step, codes, stride)  adds a chunk of a step; codes: of its first k, first row
// panel: first byte of the tile's quarters. codes: of k = 0, the tile's first row.
template <typename Tile>
SPLITQ_INLINE void Walk(const PanelProduct& product, const uint8_t* panel, const int8_t* codes,
                        Tile& tile) {
  using Bits = Layout<Tile::kBits>;
  const int64_t stride = product.codes_stride;
  int64_t k = product.k_begin;
  const uint8_t* step = panel + k / Bits::kStep * Bits::kBytes;
  if constexpr (Bits::kTwoChunks) {
    if (k % Bits::kStep != 0) {
      tile.template Add<1>(step, codes + k, stride);
      k += kChunk;
      step += Bits::kBytes;
    }
  }
  for (; k + Bits::kStep <= product.k_end; k += Bits::kStep, step += Bits::kBytes) {
    tile.template Add<0>(step, codes + k, stride);
    if constexpr (Bits::kTwoChunks) tile.template Add<1>(step, codes + k + kChunk, stride);
  }
  if (k >= product.k_end) return;
  if constexpr (Bits::kBlock < kChunk) {
    AddLastChunk(step, product.k_end - k, codes + k, stride, tile);
  } else {
    tile.template Add<0>(step, codes + k, stride);
    if constexpr (Bits::kTwoChunks) {
      if (k + kChunk < product.k_end) tile.template Add<1>(step, codes + k + kChunk, stride);
    }
  }
}

// Rows m .. m + Tile::kRows of the product. A tile begins as Tile{} and ends with
//   Store(begin, sums)  begin: [kRows], what each row's sums begin with: the zero point times the
//                       sum of its codes, subtracted; sums: of the tile's first channel
template <typename Tile>
SPLITQ_INLINE void RunRows(const PanelProduct& product, int64_t m) {
  const int8_t* codes = product.codes + m * product.codes_stride;
  int32_t begin[Tile::kRows];
  for (int i = 0; i < Tile::kRows; ++i) {
    begin[i] =
        -Layout<Tile::kBits>::kZeroPoint * product.code_sums[(m + i) * product.code_sums_stride];
  }
  for (int quarter = 0; quarter < kQuarters; quarter += Tile::kWidth) {
    Tile tile{};
    Walk(product, product.panel + quarter * kQuarterBytes, codes, tile);
    tile.Store(begin, product.sums + m * kPanel + quarter * kQuarterChannels);
  }
}

}  // namespace
}  // namespace splitq
