// Each runs its kernels for every instruction set up to `isa`, all of which this processor has.
#pragma once

#include "check.h"
#include "cpu/features.h"

namespace splitq::test {

void TestGemm(Isa isa, Report& report);
void TestRows(Isa isa, Report& report);
void TestTerms(Isa isa, Report& report);

}  // namespace splitq::test
