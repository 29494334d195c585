// The AVX-512 kernels once more, on SIMDe's emulation of the intrinsics.
#include <iterator>

#include "tests.h"

#if defined(SPLITQ_TEST_EMULATED)
#define SPLITQ_SIMDE
#define RunAvx512VnniBits2 RunEmulatedBits2
#define RunBlocksAvx512VnniBits2 RunBlocksEmulatedBits2
#define RunAvx512VnniBits3 RunEmulatedBits3
#define RunBlocksAvx512VnniBits3 RunBlocksEmulatedBits3
#define RunAvx512VnniBits4 RunEmulatedBits4
#define RunBlocksAvx512VnniBits4 RunBlocksEmulatedBits4
#define RunAvx512VnniBits8 RunEmulatedBits8
#define RunBlocksAvx512VnniBits8 RunBlocksEmulatedBits8
#include "gemm/avx512vnni.cc"

namespace splitq::test {

constexpr GemmKernel kKernels[] = {
    {"qd8_qc2w_8x48c4_emulated", Isa::kAvx512Vnni, 2, RunEmulatedBits2, RunBlocksEmulatedBits2, 16},
    {"qd8_qc3w_8x48c4_emulated", Isa::kAvx512Vnni, 3, RunEmulatedBits3, RunBlocksEmulatedBits3, 32},
    {"qd8_qc4w_8x48c4_emulated", Isa::kAvx512Vnni, 4, RunEmulatedBits4, RunBlocksEmulatedBits4, 16},
    {"qd8_qc8w_8x48c4_emulated", Isa::kAvx512Vnni, 8, RunEmulatedBits8, RunBlocksEmulatedBits8, 16},
};

List<GemmKernel> EmulatedKernels() { return {kKernels, std::size(kKernels)}; }

}  // namespace splitq::test
#else
namespace splitq::test {

List<GemmKernel> EmulatedKernels() { return {nullptr, 0}; }

}  // namespace splitq::test
#endif
