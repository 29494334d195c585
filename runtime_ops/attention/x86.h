// Attention for x86-64.
#pragma once

#include <cstdint>

#include "include/half.h"

namespace splitq {

void ScoreAvx2(const float* queries, int64_t rows, const float* keys, int64_t width, int64_t count,
               float* scores, int64_t stride);
void MeanAvx2(const float* weights, int64_t stride, int64_t rows, const float* values,
              int64_t width, int64_t count, float* means);
void ScoreHalfAvx2(const float* queries, int64_t rows, const Half* keys, int64_t width,
                   int64_t count, float* scores, int64_t stride);
void MeanHalfAvx2(const float* weights, int64_t stride, int64_t rows, const Half* values,
                  int64_t width, int64_t count, float* means);
void WidenAvx2(const Half* values, int64_t count, float* out);
void NarrowAvx2(const float* values, int64_t count, Half* out);
void SoftmaxAvx2(float* row, const float* bias, int64_t count);

void ScoreAvx512Vnni(const float* queries, int64_t rows, const float* keys, int64_t width,
                     int64_t count, float* scores, int64_t stride);
void MeanAvx512Vnni(const float* weights, int64_t stride, int64_t rows, const float* values,
                    int64_t width, int64_t count, float* means);
void ScoreHalfAvx512Vnni(const float* queries, int64_t rows, const Half* keys, int64_t width,
                         int64_t count, float* scores, int64_t stride);
void MeanHalfAvx512Vnni(const float* weights, int64_t stride, int64_t rows, const Half* values,
                        int64_t width, int64_t count, float* means);
void WidenAvx512Vnni(const Half* values, int64_t count, float* out);
void NarrowAvx512Vnni(const float* values, int64_t count, Half* out);
void SoftmaxAvx512Vnni(float* row, const float* bias, int64_t count);

}  // namespace splitq
