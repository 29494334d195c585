// Two passes over tasks. First each key-value head: new keys and values go to the cache, keys and
// queries turned by their positions. Then the scores, their softmax and the mean of the values.
//
// One or a few new tokens: each query with each key as it lies in the cache. Many: keys are first
// turned round, a block at a time, so that a row of scores is a row of a product.
//
// `Element` is the type of the cache, float or Half. The new tokens see each other as floats, as
// those of the body do, whatever the cache keeps of them; products of many read it as floats, too.
#include "attention/attention.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "include/prefetch.h"
#include "include/scratch.h"
#include "include/sizes.h"

namespace splitq {
namespace {

constexpr int64_t kFewRows = 16;   // query rows of a key-value head that meet the keys as they lie
constexpr int64_t kKeyBlock = 64;  // keys turned round together
constexpr int64_t kTileRows = 32;  // query rows of a task
constexpr int64_t kSerialWork = int64_t{1} << 17;  // multiplications one thread does at once

struct Buffers {
  bool few = false;
  int64_t queries_size = 0;  // of a key-value head
  float* queries = nullptr;  // [group, tokens, width]
  int64_t turned_size = 0;   // of a key-value head
  float* turned = nullptr;   // many: blocks of [width, kKeyBlock]
  int64_t wide_rows = 0;     // Half: few: new tokens; many: all tokens
  float* wide = nullptr;     // keys and values of a key-value head: [2, wide_rows, width]
  int64_t tile_size = 0;     // few: of a key-value head; many: of a worker
  int64_t workers = 0;       // many: loops that take tiles
  float* tiles = nullptr;
};

int64_t KeyBlocks(const AttentionData& data) { return CeilDiv(data.total, kKeyBlock); }

// Query rows of a head that one task takes.
int64_t RowTiles(const AttentionData& data) { return CeilDiv(data.tokens, kTileRows); }

int64_t Tiles(const Attention& attention, const AttentionData& data) {
  return data.batch * attention.heads * RowTiles(data);
}

Buffers TakeBuffers(const Attention& attention, const AttentionData& data, int64_t threads,
                    Scratch& scratch) {
  Buffers buffers;
  const int64_t kv_heads = data.batch * attention.kv_heads;
  const int64_t rows = attention.group() * data.tokens;
  buffers.few = rows <= kFewRows;
  buffers.queries_size = rows * attention.width;
  buffers.queries = scratch.Take<float>(kv_heads * buffers.queries_size);
  if (attention.half_cache) {
    buffers.wide_rows = buffers.few ? data.tokens : data.total;
    buffers.wide = scratch.Take<float>(kv_heads * 2 * buffers.wide_rows * attention.width);
  }
  if (buffers.few) {
    // scores, the values' means; Half: also those of the new values
    buffers.tile_size = rows * (data.total + (attention.half_cache ? 2 : 1) * attention.width);
    buffers.tiles = scratch.Take<float>(kv_heads * buffers.tile_size);
  } else {
    buffers.turned_size = KeyBlocks(data) * attention.width * kKeyBlock;
    buffers.turned = scratch.Take<float>(kv_heads * buffers.turned_size);
    // scores of a block, scores by row, the values' means
    buffers.tile_size = kTileRows * (kKeyBlock + data.total + attention.width);
    buffers.workers = std::min(Tiles(attention, data), threads);
    buffers.tiles = scratch.Take<float>(buffers.workers * buffers.tile_size);
  }
  return buffers;
}

// out = x turned by the angles of a position, times a factor.
void Turn(const float* x, const float* cosine, const float* sine, int64_t width, float factor,
          float* out) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[i + half];
    out[i] = (low * cosine[i] - high * sine[i]) * factor;
    out[i + half] = (high * cosine[i] + low * sine[i]) * factor;
  }
}

// Of the cache in use, a key-value head.
template <typename Element>
const CacheLoops<Element>& LoopsOf(const Attention& attention) {
  if constexpr (std::is_same_v<Element, Half>) {
    return attention.loops->halves;
  } else {
    return attention.loops->floats;
  }
}

template <typename Element>
Element* HeadOf(const Attention& attention, const AttentionData& data, void* present,
                int64_t index) {
  return static_cast<Element*>(present) + index * data.capacity * attention.width;
}

// Keys and values that are in the cache already, if present is another buffer.
template <typename Element>
void CopyPast(const Attention& attention, const AttentionData& data, int64_t index) {
  const int64_t past = data.total - data.tokens;
  if (past == 0 || data.past_key == data.present_key) return;
  const int64_t from = index * data.past_capacity * attention.width;
  const int64_t count = past * attention.width;
  std::copy_n(static_cast<const Element*>(data.past_key) + from, count,
              HeadOf<Element>(attention, data, data.present_key, index));
  std::copy_n(static_cast<const Element*>(data.past_value) + from, count,
              HeadOf<Element>(attention, data, data.present_value, index));
}

// [tokens of a block, width] -> [width, kKeyBlock], zeros behind the last.
void TurnRound(const float* keys, int64_t count, int64_t width, float* out) {
  for (int64_t i = 0; i < width; ++i) {
    float* row = out + i * kKeyBlock;
    for (int64_t key = 0; key < count; ++key) row[key] = keys[key * width + i];
    std::fill(row + count, row + kKeyBlock, 0.0f);
  }
}

// Keys and values of a key-value head as floats: those of the cache, or the copy in `wide`.
struct FloatHead {
  float* keys;
  float* values;
  int64_t first_new;  // row of the first new token
};

template <typename Element>
FloatHead FloatsOf(const Attention& attention, const AttentionData& data, const Buffers& buffers,
                   int64_t index) {
  const int64_t past = data.total - data.tokens;
  if constexpr (std::is_same_v<Element, Half>) {
    const int64_t size = buffers.wide_rows * attention.width;
    float* keys = buffers.wide + index * 2 * size;
    return {keys, keys + size, buffers.few ? 0 : past};
  } else {
    return {HeadOf<float>(attention, data, data.present_key, index),
            HeadOf<float>(attention, data, data.present_value, index), past};
  }
}

// From the copy to the cache: the new tokens. Many: then from the cache to the copy, the others.
void KeepHalves(const Attention& attention, const AttentionData& data, const Buffers& buffers,
                const FloatHead& floats, int64_t index) {
  const int64_t width = attention.width, past = data.total - data.tokens;
  Half* keys = HeadOf<Half>(attention, data, data.present_key, index);
  Half* values = HeadOf<Half>(attention, data, data.present_value, index);
  const int64_t first = floats.first_new * width, count = data.tokens * width;
  attention.loops->narrow(floats.keys + first, count, keys + past * width);
  attention.loops->narrow(floats.values + first, count, values + past * width);
  if (buffers.few) return;
  attention.loops->widen(keys, past * width, floats.keys);
  attention.loops->widen(values, past * width, floats.values);
}

// Everything of key-value head `index` (of batch * kv_heads) that the scores need.
template <typename Element>
void Prepare(const Attention& attention, const AttentionData& data, const Buffers& buffers,
             int64_t index) {
  const int64_t width = attention.width, half = width / 2, group = attention.group();
  const int64_t b = index / attention.kv_heads, kv = index % attention.kv_heads;
  CopyPast<Element>(attention, data, index);
  const FloatHead floats = FloatsOf<Element>(attention, data, buffers, index);
  float* queries = buffers.queries + index * buffers.queries_size;
  for (int64_t s = 0; s < data.tokens; ++s) {
    const int64_t token = b * data.tokens + s;
    const float* row = data.qkv + token * attention.channels();
    const float* cosine = data.cosine + data.positions[token] * half;
    const float* sine = data.sine + data.positions[token] * half;
    const float* key = row + (attention.heads + kv) * width;
    const int64_t place = (floats.first_new + s) * width;
    Turn(key, cosine, sine, width, 1.0f, floats.keys + place);
    const float* value = row + (attention.heads + attention.kv_heads + kv) * width;
    std::copy_n(value, width, floats.values + place);
    for (int64_t h = 0; h < group; ++h) {
      const float* query = row + (kv * group + h) * width;
      float* out = queries + (h * data.tokens + s) * width;
      Turn(query, cosine, sine, width, attention.scale, out);
    }
  }
  if constexpr (std::is_same_v<Element, Half>) {
    KeepHalves(attention, data, buffers, floats, index);
  }
  if (buffers.few) return;
  float* turned = buffers.turned + index * buffers.turned_size;
  for (int64_t block = 0; block < KeyBlocks(data); ++block) {
    const int64_t first = block * kKeyBlock;
    TurnRound(floats.keys + first * width, std::min(kKeyBlock, data.total - first), width,
              turned + block * width * kKeyBlock);
  }
}

const float* BiasOf(const AttentionData& data, int64_t b, int64_t s) {
  return data.bias + b * data.bias_step + s * data.total;
}

void StoreMean(const Attention& attention, const AttentionData& data, int64_t b, int64_t head,
               int64_t s, const float* mean) {
  float* y = data.y + ((b * data.tokens + s) * attention.heads + head) * attention.width;
  std::copy_n(mean, attention.width, y);
}

// Softmax of a row over the keys that token s sees; zeros behind.
void Weigh(const Attention& attention, const AttentionData& data, int64_t b, int64_t s,
           float* row) {
  const int64_t seen = data.total - data.tokens + s + 1;
  attention.loops->softmax(row, BiasOf(data, b, s), seen);
  std::fill(row + seen, row + data.total, 0.0f);
}

// Bytes of the values that are asked for while the keys are read.
constexpr int64_t kAhead = int64_t{16} << 10;

// Scores and means of the queries of a key-value head, [rows, total] and [rows, width].
struct FewTile {
  const float* queries;
  int64_t rows;
  float* scores;
  float* means;  // Half: [2, rows, width]
};

FewTile FewTileOf(const Attention& attention, const AttentionData& data, const Buffers& buffers,
                  int64_t index) {
  const int64_t rows = attention.group() * data.tokens;
  float* scores = buffers.tiles + index * buffers.tile_size;
  return {buffers.queries + index * buffers.queries_size, rows, scores, scores + rows * data.total};
}

template <typename Element>
void ScoreFew(const Attention& attention, const AttentionData& data, const Buffers& buffers,
              const FewTile& tile, int64_t index) {
  const int64_t width = attention.width, total = data.total, past = total - data.tokens;
  const auto* keys = HeadOf<Element>(attention, data, data.present_key, index);
  const int64_t count = std::is_same_v<Element, Half> ? past : total;
  LoopsOf<Element>(attention).score(tile.queries, tile.rows, keys, width, count, tile.scores,
                                    total);
  if constexpr (std::is_same_v<Element, Half>) {
    const FloatHead floats = FloatsOf<Half>(attention, data, buffers, index);
    attention.loops->floats.score(tile.queries, tile.rows, floats.keys, width, data.tokens,
                                  tile.scores + past, total);
  }
}

template <typename Element>
void MeanFew(const Attention& attention, const AttentionData& data, const Buffers& buffers,
             const FewTile& tile, int64_t index) {
  const int64_t width = attention.width, total = data.total, past = total - data.tokens;
  const auto* values = HeadOf<Element>(attention, data, data.present_value, index);
  const int64_t count = std::is_same_v<Element, Half> ? past : total;
  LoopsOf<Element>(attention).mean(tile.scores, total, tile.rows, values, width, count, tile.means);
  if constexpr (std::is_same_v<Element, Half>) {
    const FloatHead floats = FloatsOf<Half>(attention, data, buffers, index);
    float* more = tile.means + tile.rows * width;
    attention.loops->floats.mean(tile.scores + past, total, tile.rows, floats.values, width,
                                 data.tokens, more);
    for (int64_t k = 0; k < tile.rows * width; ++k) tile.means[k] += more[k];
  }
}

// All queries of a key-value head.
template <typename Element>
void AttendFew(const Attention& attention, const AttentionData& data, const Buffers& buffers,
               int64_t index) {
  const int64_t width = attention.width, total = data.total;
  const int64_t b = index / attention.kv_heads, kv = index % attention.kv_heads;
  const FewTile tile = FewTileOf(attention, data, buffers, index);
  const auto* values = HeadOf<Element>(attention, data, data.present_value, index);
  Prefetch(values, std::min(total * width * static_cast<int64_t>(sizeof(Element)), kAhead));
  ScoreFew<Element>(attention, data, buffers, tile, index);
  for (int64_t row = 0; row < tile.rows; ++row) {
    Weigh(attention, data, b, row % data.tokens, tile.scores + row * total);
  }
  MeanFew<Element>(attention, data, buffers, tile, index);
  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t head = kv * attention.group() + row / data.tokens;
    StoreMean(attention, data, b, head, row % data.tokens, tile.means + row * width);
  }
}

// Some rows of one query head. memory: [tile_size]
template <typename Element>
void AttendTile(const Attention& attention, const AttentionData& data, const Buffers& buffers,
                int64_t task, float* memory) {
  const int64_t width = attention.width, total = data.total;
  const int64_t tiles = RowTiles(data);
  const int64_t first = (tiles - 1 - task % tiles) * kTileRows;  // the longest rows first
  const int64_t b = task / tiles / attention.heads, head = task / tiles % attention.heads;
  const int64_t index = b * attention.kv_heads + head / attention.group();
  const int64_t rows = std::min(kTileRows, data.tokens - first);
  const int64_t seen = total - data.tokens + first + rows;  // by the tile's last token
  float* block_scores = memory;
  float* scores = block_scores + kTileRows * kKeyBlock;
  float* means = scores + kTileRows * total;
  const float* queries = buffers.queries + index * buffers.queries_size +
                         (head % attention.group() * data.tokens + first) * width;
  const float* turned = buffers.turned + index * buffers.turned_size;
  for (int64_t key = 0; key < seen; key += kKeyBlock, turned += width * kKeyBlock) {
    attention.kernels->multiply(
        {queries, width, 1, turned, rows, width, kKeyBlock, block_scores, nullptr});
    const int64_t count = std::min(kKeyBlock, total - key);
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(block_scores + row * kKeyBlock, count, scores + row * total + key);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    Weigh(attention, data, b, first + row, scores + row * total);
  }
  const float* values = FloatsOf<Element>(attention, data, buffers, index).values;
  attention.kernels->multiply({scores, total, 1, values, rows, seen, width, means, nullptr});
  for (int64_t row = 0; row < rows; ++row) {
    StoreMean(attention, data, b, head, first + row, means + row * width);
  }
}

template <typename Element>
void Run(const Attention& attention, const AttentionData& data, void* memory,
         const ParallelFor& parallel) {
  Scratch scratch(memory);
  const Buffers buffers = TakeBuffers(attention, data, parallel.threads(), scratch);
  const int64_t kv_heads = data.batch * attention.kv_heads;
  const int64_t work = 2 * data.batch * attention.heads * data.tokens * data.total;
  const bool serial = work * attention.width < kSerialWork;
  parallel(kv_heads, serial || buffers.few,
           [&](int64_t index) { Prepare<Element>(attention, data, buffers, index); });
  if (buffers.few) {
    parallel(kv_heads, serial,
             [&](int64_t index) { AttendFew<Element>(attention, data, buffers, index); });
    return;
  }
  std::atomic<int64_t> next{0};
  parallel(buffers.workers, serial, [&](int64_t worker) {
    float* own = buffers.tiles + worker * buffers.tile_size;
    int64_t task;
    while ((task = next.fetch_add(1, std::memory_order_relaxed)) < Tiles(attention, data)) {
      AttendTile<Element>(attention, data, buffers, task, own);
    }
  });
}

}  // namespace

int64_t ScratchBytes(const Attention& attention, const AttentionData& data,
                     const ParallelFor& parallel) {
  Scratch scratch;
  TakeBuffers(attention, data, parallel.threads(), scratch);
  return scratch.used() + Scratch::kAlign;
}

void RunAttention(const Attention& attention, const AttentionData& data, void* memory,
                  const ParallelFor& parallel) {
  const auto run = attention.half_cache ? Run<Half> : Run<float>;
  run(attention, data, memory, parallel);
}

}  // namespace splitq
