// Channel groups of one row, out[i] = x[order[i]] * scale[i], and what makes it fast.
#pragma once

#include <cstdint>
#include <vector>

namespace splitq {

// Outputs that are gathered together, and the inputs among which all of theirs may lie: one
// AVX-512 register, and the two that it can be permuted out of.
inline constexpr int64_t kGatherBlock = 16;
inline constexpr int64_t kGatherWindow = 32;

// Where a block of outputs lies: output i of the block is input first + places[i]. No such window:
// first is -1.
struct GatherWindow {
  int32_t first;
  uint8_t places[kGatherBlock];
};

struct ChannelGather {
  int64_t channels = 0;
  const int32_t* order = nullptr;         // [channels], null for the identity
  const float* scale = nullptr;           // [channels], null for ones
  const GatherWindow* windows = nullptr;  // [channels / kGatherBlock] as GatherWindows makes them;
                                          // null without an order
};

// For each whole block of outputs the kGatherWindow inputs among which its own are. Most blocks
// have such: an export keeps the channels of the main group ascending.
std::vector<GatherWindow> GatherWindows(const int32_t* order, int64_t channels);

}  // namespace splitq
