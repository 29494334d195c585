// Portable weights to layout 1, once at load.
#pragma once

#include <cstdint>

namespace splitq {

// The data of an ONNX tensor [K, N]: INT8, or INT4 with two codes a byte, the first in the low
// nibble.
struct PortableCodes {
  const uint8_t* data;
  bool is_int4;

  int At(int64_t index) const {
    if (!is_int4) return static_cast<int8_t>(data[index]);
    const int nibble = (data[index / 2] >> (index % 2 * 4)) & 15;
    return nibble < 8 ? nibble : nibble - 16;
  }
};

// Fills payload (PayloadBytes(channels_in, channels_out, bits) bytes) and returns -1, or returns
// the index of the first code found that does not fit `bits`.
int64_t Pack(const PortableCodes& codes, int64_t channels_in, int64_t channels_out, int bits,
             uint8_t* payload);

}  // namespace splitq
