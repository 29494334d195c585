// Features: AVX2. Idea: attention/loops.h, eight numbers at a time.
#include "attention/loops.h"
#include "attention/x86.h"

namespace splitq {

void ScoreAvx2(const float* queries, int64_t rows, const float* keys, int64_t width, int64_t count,
               float* scores, int64_t stride) {
  ScoreLoop(queries, rows, keys, width, count, scores, stride);
}

void MeanAvx2(const float* weights, int64_t stride, int64_t rows, const float* values,
              int64_t width, int64_t count, float* means) {
  MeanLoop(weights, stride, rows, values, width, count, means);
}

void ScoreHalfAvx2(const float* queries, int64_t rows, const Half* keys, int64_t width,
                   int64_t count, float* scores, int64_t stride) {
  ScoreLoop(queries, rows, keys, width, count, scores, stride);
}

void MeanHalfAvx2(const float* weights, int64_t stride, int64_t rows, const Half* values,
                  int64_t width, int64_t count, float* means) {
  MeanLoop(weights, stride, rows, values, width, count, means);
}

void WidenAvx2(const Half* values, int64_t count, float* out) { WidenLoop(values, count, out); }

void NarrowAvx2(const float* values, int64_t count, Half* out) { NarrowLoop(values, count, out); }

void SoftmaxAvx2(float* row, const float* bias, int64_t count) { SoftmaxLoop(row, bias, count); }

}  // namespace splitq
