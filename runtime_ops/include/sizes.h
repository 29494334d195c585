// Integer arithmetic on sizes, shared by all layers.
#pragma once

#include <cstdint>

namespace splitq {

constexpr int64_t CeilDiv(int64_t value, int64_t divisor) {
  return value / divisor + (value % divisor != 0);
}

constexpr int64_t RoundUp(int64_t value, int64_t multiple) {
  return CeilDiv(value, multiple) * multiple;
}

// Rows of int8 codes are padded with zeros to this many bytes, so that a kernel may read whole
// vectors past the last channel.
inline constexpr int64_t kCodeRowAlign = 64;

// Bytes from one such row to the next: an odd number of cache lines, because rows a power of two
// apart would fight for the same few places of a cache.
constexpr int64_t CodeRowStride(int64_t channels) {
  return (CeilDiv(channels, kCodeRowAlign) | 1) * kCodeRowAlign;
}

}  // namespace splitq
