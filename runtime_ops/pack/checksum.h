// CRC-32 as zlib computes it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace splitq {

uint32_t Crc32(const uint8_t* data, size_t size);

}  // namespace splitq
