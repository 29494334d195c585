// The norm for x86-64 with AVX2.
#pragma once

#include "norm/skip_norm.h"

namespace splitq {

void SkipNormAvx2(const SkipNormRow& row);

}  // namespace splitq
