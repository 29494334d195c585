// The loops of attention that have a form for each instruction set. They give the same numbers but
// for the rounding of sums, whose order docs/ops.md leaves open.
#pragma once

#include <cstdint>

#include "cpu/features.h"
#include "include/half.h"
#include "include/list.h"

namespace splitq {

// The loops that read a cache of float or Half. No alignment is promised.
template <typename Element>
struct CacheLoops {
  // Of `rows` queries and `count` keys, [rows, width] and [count, width]:
  // scores[r * stride + i] = sum over k < width of queries[r][k] * keys[i][k].
  // scores overlaps nothing else.
  void (*score)(const float* queries, int64_t rows, const Element* keys, int64_t width,
                int64_t count, float* scores, int64_t stride);

  // Of `rows` rows of weights, `stride` apart, and `count` values, [count, width]:
  // means[r * width + k] = sum over i < count of weights[r * stride + i] * values[i][k].
  void (*mean)(const float* weights, int64_t stride, int64_t rows, const Element* values,
               int64_t width, int64_t count, float* means);
};

struct AttentionKernels {
  const char* name;  // attention_isa
  Isa isa;           // what the processor must have

  CacheLoops<float> floats;
  CacheLoops<Half> halves;

  // Exact.
  void (*widen)(const Half* values, int64_t count, float* out);

  // Rounds half to even.
  void (*narrow)(const float* values, int64_t count, Half* out);

  // row[i] = exp(row[i] + bias[i] - m) / sum of these, m the largest of row[i] + bias[i].
  // row, bias: [count], count >= 1; they do not overlap; no alignment is promised.
  void (*softmax)(float* row, const float* bias, int64_t count);
};

// All kernels of this build, the fastest instruction set first.
List<AttentionKernels> AllAttentionKernels();

// The first of the list that needs no more than `isa`.
const AttentionKernels& FindAttentionKernels(Isa isa);

}  // namespace splitq
