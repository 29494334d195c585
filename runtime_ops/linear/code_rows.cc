#include "linear/code_rows.h"

#include <algorithm>
#include <cstring>

namespace splitq {

CodeRows TakeCodeRows(Scratch& scratch, int64_t rows, int64_t channels, int64_t block_size) {
  CodeRows taken;
  taken.channels = channels;
  taken.block_size = block_size;
  taken.stride = CodeRowStride(channels);
  taken.codes = scratch.Take<int8_t>(rows * taken.stride);
  taken.scale = scratch.Take<float>(rows);
  taken.sums = scratch.Take<int32_t>(rows * taken.sums_stride());
  return taken;
}

void FinishRow(const RowKernels& kernels, const CodeRows& rows, int64_t m) {
  int8_t* codes = rows.row(m);
  std::memset(codes + rows.channels, 0, static_cast<size_t>(rows.stride - rows.channels));
  if (rows.block_size == 0) return;
  int32_t* block_sum = rows.sums + m * rows.sums_stride() + 1;
  for (int64_t k = 0; k < rows.channels; k += rows.block_size, ++block_sum) {
    *block_sum = kernels.sum_codes(codes + k, std::min(rows.channels - k, rows.block_size));
  }
}

}  // namespace splitq
