// Causal attention of a few new tokens over a cache, several query heads to a key-value head.
#pragma once

#include <cstdint>

#include "attention/kernel.h"
#include "include/parallel_for.h"
#include "quantize/kernel.h"

namespace splitq {

struct Attention {
  int64_t heads = 0;     // of the queries, a multiple of kv_heads
  int64_t kv_heads = 0;  // of keys and values
  int64_t width = 0;     // of a head, even
  float scale = 1.0f;    // of the scores
  bool half_cache = false;
  const RowKernels* kernels = nullptr;
  const AttentionKernels* loops = nullptr;

  int64_t group() const { return heads / kv_heads; }
  int64_t channels() const { return (heads + 2 * kv_heads) * width; }
};

// Keys and values lie as [batch, kv_heads, capacity, width], as Half or float. Past and present are
// one buffer or do not overlap.
struct AttentionData {
  int64_t batch = 0, tokens = 0;   // > 0, new tokens
  int64_t total = 0;               // >= tokens, with those in the cache
  const float* qkv = nullptr;      // [batch, tokens, channels()]: queries, keys, values
  const void* past_key = nullptr;  // null unless total > tokens
  const void* past_value = nullptr;
  int64_t past_capacity = 0;  // >= total - tokens
  void* present_key = nullptr;
  void* present_value = nullptr;
  int64_t capacity = 0;                // >= total, of present
  const float* cosine = nullptr;       // [places, width / 2]
  const float* sine = nullptr;         // likewise
  const int64_t* positions = nullptr;  // [batch, tokens], each a place
  const float* bias = nullptr;         // [batch or 1, 1, tokens, total]
  int64_t bias_step = 0;               // from one row of the batch to the next
  float* y = nullptr;                  // [batch, tokens, heads * width]
};

// Bytes of scratch memory.
int64_t ScratchBytes(const Attention& attention, const AttentionData& data,
                     const ParallelFor& parallel);

// memory: [ScratchBytes(attention, data, parallel)], any alignment.
void RunAttention(const Attention& attention, const AttentionData& data, void* memory,
                  const ParallelFor& parallel);

}  // namespace splitq
