// The list of row kernels.
#pragma once

#include <cstddef>

#include "quantize/kernel.h"

namespace splitq {

// All kernels of this build, the fastest instruction set first.
struct RowKernelList {
  const RowKernels* first;
  size_t count;

  const RowKernels* begin() const { return first; }
  const RowKernels* end() const { return first + count; }
};
RowKernelList AllRowKernels();

// The first of the list that needs no more than `isa`.
const RowKernels& FindRowKernels(Isa isa);

}  // namespace splitq
