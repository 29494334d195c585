// The 64-byte header of a packed weight (docs/ops.md). Little endian, as every platform that ONNX
// Runtime supports.
#pragma once

#include <cstdint>
#include <cstring>

namespace splitq {

inline constexpr char kMagic[8] = {'S', 'P', 'L', 'I', 'T', 'Q', 'W', '\0'};
inline constexpr uint32_t kSchema = 1;
inline constexpr uint32_t kLayout = 1;

struct PackedHeader {
  char magic[8];
  uint32_t schema;
  uint32_t layout;
  uint32_t bits;
  uint32_t nr;
  uint64_t channels_out;
  uint64_t channels_in;
  uint64_t payload_bytes;
  uint32_t block_size;
  uint32_t checksum;
  uint64_t reserved;
};
static_assert(sizeof(PackedHeader) == 64, "the header has no padding");

// buffer: at least sizeof(PackedHeader) bytes. A copy, because a mapped file aligns nothing.
inline PackedHeader ReadHeader(const uint8_t* buffer) {
  PackedHeader header;
  std::memcpy(&header, buffer, sizeof(header));
  return header;
}

inline bool HasMagic(const PackedHeader& header) {
  return std::memcmp(header.magic, kMagic, sizeof(kMagic)) == 0;
}

}  // namespace splitq
