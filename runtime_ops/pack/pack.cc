#include "pack/pack.h"

#include <cstring>

#include "pack/layout.h"

namespace splitq {
namespace {

struct Panel {
  const PortableCodes& codes;
  int64_t channels_in;
  int64_t channels_out;
  int64_t first_out;
};

// Packs the block that starts at input channel `first_in`. Padding stores q = 0.
template <int bits>
int64_t PackBlock(const Panel& panel, int64_t first_in, uint8_t* block) {
  constexpr int kOffset = 1 << (bits - 1);
  std::memset(block, 0, BlockBytes(bits));
  for (int in = 0; in < BlockChannels(bits); ++in) {
    const int64_t k = first_in + in;
    for (int out = 0; out < kPanel; ++out) {
      const int64_t n = panel.first_out + out;
      int code = 0;
      if (k < panel.channels_in && n < panel.channels_out) {
        const int64_t index = k * panel.channels_out + n;
        code = panel.codes.At(index);
        if (code < -kOffset || code >= kOffset) return index;
      }
      StoreField<bits>(block, static_cast<int>(in / kQuad),
                       static_cast<int>(kQuad * out + in % kQuad), code + kOffset);
    }
  }
  return -1;
}

template <int bits>
int64_t PackAll(const PortableCodes& codes, int64_t channels_in, int64_t channels_out,
                uint8_t* payload) {
  for (int64_t n = 0; n < channels_out; n += kPanel) {
    const Panel panel{codes, channels_in, channels_out, n};
    for (int64_t k = 0; k < channels_in; k += BlockChannels(bits), payload += BlockBytes(bits)) {
      const int64_t bad = PackBlock<bits>(panel, k, payload);
      if (bad >= 0) return bad;
    }
  }
  return -1;
}

}  // namespace

int64_t Pack(const PortableCodes& codes, int64_t channels_in, int64_t channels_out, int bits,
             uint8_t* payload) {
  switch (bits) {
    case 2:
      return PackAll<2>(codes, channels_in, channels_out, payload);
    case 3:
      return PackAll<3>(codes, channels_in, channels_out, payload);
    case 4:
      return PackAll<4>(codes, channels_in, channels_out, payload);
    case 6:
      return PackAll<6>(codes, channels_in, channels_out, payload);
    default:
      return PackAll<8>(codes, channels_in, channels_out, payload);
  }
}

}  // namespace splitq
