// The gated activation of a feed-forward layer (SwiGLU): y = gate * sigmoid(gate) * up.
#pragma once

#include <cstdint>

#include "cpu/features.h"
#include "include/list.h"

namespace splitq {

struct SwiGluKernel {
  const char* name;  // swiglu_isa
  Isa isa;           // what the processor must have

  // gate, up, out: [width]; out overlaps neither; no alignment is promised.
  void (*run)(const float* gate, const float* up, int64_t width, float* out);
};

// All kernels of this build, the fastest instruction set first.
List<SwiGluKernel> AllSwiGluKernels();

// The first of the list that needs no more than `isa`.
const SwiGluKernel& FindSwiGluKernel(Isa isa);

}  // namespace splitq
