// Layout 1 of packed weights (docs/ops.md), the only place that knows its bytes.
//
// Panels of 16 output channels; in a panel, blocks of 4 * F consecutive input channels k; a block
// is V vectors of 64 bytes. Byte 4 * n + i of a vector belongs to output channel n of the panel and
// to k = 4 * f + i of the block, for each of the F fields f that share the byte. A field stores
// u = q + 2^(bits-1). One vector is one AVX-512 register, two AVX2 or four NEON ones, and four
// consecutive k are what the dot-product instructions take.
//
//   bits  F  V  bits of a byte
//      8  1  1  u0
//      4  2  1  u0 in 0-3, u1 in 4-7
//      2  4  1  u0 in 0-1, u1 in 2-3, u2 in 4-5, u3 in 6-7
//      3  8  3  vector v: u[2v] in 0-2, u[2v+1] in 3-5; bits 6-7 of the three vectors hold, lowest
//               first, the three bits of u6 and then the three bits of u7
//      6  4  3  vector v: u[v] in 0-5; bits 6-7 of the three vectors hold, lowest first, u3
#pragma once

#include <cstdint>

#include "include/sizes.h"

namespace splitq {

inline constexpr int64_t kPanel = 16;
inline constexpr int64_t kQuad = 4;
inline constexpr int64_t kVectorBytes = kPanel * kQuad;

// The longest sum of products of two int8 codes that int32 holds: 131071 * 128 * 128 < 2^31.
inline constexpr int64_t kMaxChannelsIn = 131071;

constexpr bool IsBitWidth(int64_t bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 6 || bits == 8;
}

// Whether the last fields of a block lie in the two top bits of its three vectors.
constexpr bool IsSpread(int bits) { return bits == 3 || bits == 6; }

constexpr int FieldsPerBlock(int bits) { return IsSpread(bits) ? 24 / bits : 8 / bits; }

constexpr int VectorsPerBlock(int bits) { return IsSpread(bits) ? 3 : 1; }

constexpr int64_t BlockChannels(int bits) { return kQuad * FieldsPerBlock(bits); }

constexpr int64_t BlockBytes(int bits) { return kVectorBytes * VectorsPerBlock(bits); }

constexpr int64_t PanelBytes(int64_t channels_in, int bits) {
  return CeilDiv(channels_in, BlockChannels(bits)) * BlockBytes(bits);
}

constexpr int64_t PayloadBytes(int64_t channels_in, int64_t channels_out, int bits) {
  return CeilDiv(channels_out, kPanel) * PanelBytes(channels_in, bits);
}

// Stored code of one field; `byte` is 4 * n + i.
template <int bits>
inline int LoadField(const uint8_t* block, int field, int byte) {
  constexpr int kMaxCode = (1 << bits) - 1;
  if constexpr (!IsSpread(bits)) {
    return (block[byte] >> (field * bits)) & kMaxCode;
  } else {
    constexpr int kFieldsPerByte = 6 / bits;
    const int vector = field / kFieldsPerByte, shift = field % kFieldsPerByte * bits;
    if (vector < 3) return (block[vector * kVectorBytes + byte] >> shift) & kMaxCode;
    const int top = (block[byte] >> 6) | (block[kVectorBytes + byte] >> 6 << 2) |
                    (block[2 * kVectorBytes + byte] >> 6 << 4);
    return (top >> shift) & kMaxCode;
  }
}

// Writes one field of a block whose bytes were zero before the first field.
template <int bits>
inline void StoreField(uint8_t* block, int field, int byte, int code) {
  const auto merge = [&](int64_t vector, int value) {
    uint8_t& target = block[vector * kVectorBytes + byte];
    target = static_cast<uint8_t>(target | value);
  };
  if constexpr (!IsSpread(bits)) {
    merge(0, code << (field * bits));
  } else {
    constexpr int kFieldsPerByte = 6 / bits;
    const int vector = field / kFieldsPerByte, moved = code << (field % kFieldsPerByte * bits);
    if (vector < 3) return merge(vector, moved);
    for (int v = 0; v < 3; ++v) merge(v, (moved >> (2 * v) & 3) << 6);
  }
}

}  // namespace splitq
