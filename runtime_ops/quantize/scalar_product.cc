// Rows of the right matrix times a scalar, added to a row of the result: the innermost loop is over
// contiguous floats, so any vector width serves, and nothing is transposed.
#include <algorithm>

#include "quantize/scalar.h"

namespace splitq {
namespace {

// out[j] += sum over i < 4 of scalars[i] * rows[i * width + j]
void AddFourRows(const float* scalars, const float* __restrict rows, int64_t width,
                 float* __restrict out) {
  const float s0 = scalars[0], s1 = scalars[1], s2 = scalars[2], s3 = scalars[3];
  for (int64_t j = 0; j < width; ++j) {
    out[j] += (s0 * rows[j] + s1 * rows[width + j]) +
              (s2 * rows[2 * width + j] + s3 * rows[3 * width + j]);
  }
}

// out = sum over i < count of left[i * left_stride] * rows[i], rows: [count, width]
void CombineRows(const float* left, int64_t left_stride, int64_t count, const float* rows,
                 int64_t width, float* __restrict out) {
  std::fill(out, out + width, 0.0f);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4, left += 4 * left_stride) {
    const float scalars[4] = {left[0], left[left_stride], left[2 * left_stride],
                              left[3 * left_stride]};
    AddFourRows(scalars, rows + i * width, width, out);
  }
  for (; i < count; ++i, left += left_stride) {
    const float* row = rows + i * width;
    for (int64_t j = 0; j < width; ++j) out[j] += *left * row[j];
  }
}

}  // namespace

void MultiplyScalar(const MatrixProduct& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    CombineRows(p.left + i * p.row_step, p.k_step, p.depth, p.right, p.columns,
                p.out + i * p.columns);
  }
}

}  // namespace splitq
