// Channel groups of one row: g[i] = x[order[i]] * scale[i].
#pragma once

#include <cstdint>

namespace splitq {

// order: [width] or null for the identity; scale: [width] or null for ones.
inline void GatherChannels(const float* __restrict x, const int32_t* __restrict order,
                           const float* __restrict scale, int64_t width, float* __restrict out) {
  if (order != nullptr) {
    for (int64_t i = 0; i < width; ++i) out[i] = x[order[i]];
  } else {
    for (int64_t i = 0; i < width; ++i) out[i] = x[i];
  }
  if (scale != nullptr) {
    for (int64_t i = 0; i < width; ++i) out[i] *= scale[i];
  }
}

}  // namespace splitq
