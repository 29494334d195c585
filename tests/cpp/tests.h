// Each runs its kernels for every instruction set up to `isa`, all of which this processor has.
#pragma once

#include "check.h"
#include "cpu/features.h"
#include "gemm/kernel.h"
#include "include/list.h"

namespace splitq::test {

void TestGemm(List<GemmKernel> kernels, Isa isa, Report& report);
void TestRows(Isa isa, Report& report);
void TestTerms(Isa isa, Report& report);
void TestAttention(Isa isa, Report& report);
void TestGates(Isa isa, Report& report);
void TestNorms(Isa isa, Report& report);
void TestLayers(Isa isa, Report& report);

// Of what is the same on every instruction set.
void TestPayloads(Report& report);

// The AVX-512 kernels on emulated intrinsics; empty where SIMDe is not installed.
List<GemmKernel> EmulatedKernels();

}  // namespace splitq::test
