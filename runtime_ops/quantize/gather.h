// Channel groups of one row, out[i] = x[order[i]] * scale[i], and what makes it fast.
#pragma once

#include <cstdint>
#include <vector>

namespace splitq {

// Outputs that are gathered together, and the inputs among which all of theirs may lie: one
// AVX-512 register, and the two that it can be permuted out of.
inline constexpr int64_t kGatherBlock = 16;
inline constexpr int64_t kGatherWindow = 32;

struct ChannelGather {
  int64_t channels = 0;
  const int32_t* order = nullptr;    // [channels], null for the identity
  const float* scale = nullptr;      // [channels], null for ones
  const int32_t* windows = nullptr;  // [channels / kGatherBlock] as GatherWindows makes them; null
                                     // without an order
};

// For each whole block of outputs the first of kGatherWindow inputs that hold its own, or -1. Most
// blocks have one: an export keeps the channels of the main group ascending.
std::vector<int32_t> GatherWindows(const int32_t* order, int64_t channels);

}  // namespace splitq
