// CrossModalCorrection on raw pointers: codes that lie densely in tensors to the correction.
#pragma once

#include <cstdint>

#include "include/parallel_for.h"
#include "linear/correction.h"

namespace splitq {

struct CorrectionRows {
  const int8_t* main_codes = nullptr;      // [rows, K_m]
  const float* main_scale = nullptr;       // [rows]
  const int8_t* residual_codes = nullptr;  // [rows, K_m], null without MAC
  const float* residual_scale = nullptr;   // [rows]
  const int8_t* modality = nullptr;        // [rows], null unless MAC looks at it
  int64_t rows = 0;                        // > 0
  float* output = nullptr;                 // [rows, N]
};

// Bytes of scratch memory for this many rows.
int64_t ScratchBytes(const Correction& correction, int64_t rows);

// scratch: [ScratchBytes(correction, data.rows)], any alignment.
void ApplyCorrection(const Correction& correction, const CorrectionRows& data, void* scratch,
                     const ParallelFor& parallel);

}  // namespace splitq
