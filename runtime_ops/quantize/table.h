// The list of row kernels.
#pragma once

#include "include/list.h"
#include "quantize/kernel.h"

namespace splitq {

// All kernels of this build, the fastest instruction set first.
List<RowKernels> AllRowKernels();

// The first of the list that needs no more than `isa`.
const RowKernels& FindRowKernels(Isa isa);

}  // namespace splitq
