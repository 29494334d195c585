#include "gemm/table.h"

#include <iterator>

#include "gemm/avx2.h"
#include "gemm/avx512vnni.h"
#include "gemm/neon.h"
#include "gemm/scalar.h"

namespace splitq {
namespace {

// Fastest first; the scalar kernels run everywhere and end the list.
constexpr GemmKernel kKernels[] = {
#if defined(SPLITQ_AVX512VNNI)
    {"qd8_qc2w_8x48c4_avx512vnni", Isa::kAvx512Vnni, 2, RunAvx512VnniBits2, RunTermsAvx512VnniBits2,
     nullptr, RunBlocksAvx512VnniBits2, 16},
    {"qd8_qc3w_8x48c4_avx512vnni", Isa::kAvx512Vnni, 3, RunAvx512VnniBits3, RunTermsAvx512VnniBits3,
     nullptr, RunBlocksAvx512VnniBits3, 32},
    {"qd8_qc4w_8x48c4_avx512vnni", Isa::kAvx512Vnni, 4, RunAvx512VnniBits4, RunTermsAvx512VnniBits4,
     RunOutputAvx512VnniBits4, RunBlocksAvx512VnniBits4, 16},
    {"qd8_qc6w_8x48c4_avx512vnni", Isa::kAvx512Vnni, 6, RunAvx512VnniBits6, RunTermsAvx512VnniBits6,
     nullptr, RunBlocksAvx512VnniBits6, 16},
    {"qd8_qc8w_8x48c4_avx512vnni", Isa::kAvx512Vnni, 8, RunAvx512VnniBits8, RunTermsAvx512VnniBits8,
     nullptr, RunBlocksAvx512VnniBits8, 16},
#endif
#if defined(SPLITQ_AVX2)
    {"qd8_qc2w_4x16c4_avx2", Isa::kAvx2, 2, RunAvx2Bits2, nullptr, nullptr, RunBlocksAvx2Bits2, 16},
    {"qd8_qc3w_4x16c4_avx2", Isa::kAvx2, 3, RunAvx2Bits3, nullptr, nullptr, RunBlocksAvx2Bits3, 32},
    {"qd8_qc4w_4x16c4_avx2", Isa::kAvx2, 4, RunAvx2Bits4, nullptr, nullptr, RunBlocksAvx2Bits4, 16},
    {"qd8_qc6w_4x16c4_avx2", Isa::kAvx2, 6, RunAvx2Bits6},
    {"qd8_qc8w_2x16c4_avx2", Isa::kAvx2, 8, RunAvx2Bits8},
#endif
#if defined(SPLITQ_NEON)
    {"qd8_qc2w_8x16c8_i8mm", Isa::kI8mm, 2, RunI8mmBits2},
    {"qd8_qc3w_8x16c8_i8mm", Isa::kI8mm, 3, RunI8mmBits3},
    {"qd8_qc4w_8x16c8_i8mm", Isa::kI8mm, 4, RunI8mmBits4},
    {"qd8_qc6w_8x16c8_i8mm", Isa::kI8mm, 6, RunI8mmBits6},
    {"qd8_qc8w_8x16c8_i8mm", Isa::kI8mm, 8, RunI8mmBits8},
    {"qd8_qc2w_8x16c4_dotprod", Isa::kDotprod, 2, RunDotprodBits2},
    {"qd8_qc3w_8x16c4_dotprod", Isa::kDotprod, 3, RunDotprodBits3},
    {"qd8_qc4w_8x16c4_dotprod", Isa::kDotprod, 4, RunDotprodBits4},
    {"qd8_qc6w_8x16c4_dotprod", Isa::kDotprod, 6, RunDotprodBits6},
    {"qd8_qc8w_8x16c4_dotprod", Isa::kDotprod, 8, RunDotprodBits8},
    {"qd8_qc2w_2x16c4_neon", Isa::kNeon, 2, RunNeonBits2},
    {"qd8_qc3w_2x16c4_neon", Isa::kNeon, 3, RunNeonBits3},
    {"qd8_qc4w_2x16c4_neon", Isa::kNeon, 4, RunNeonBits4},
    {"qd8_qc6w_2x16c4_neon", Isa::kNeon, 6, RunNeonBits6},
    {"qd8_qc8w_2x16c4_neon", Isa::kNeon, 8, RunNeonBits8},
#endif
    {"qd8_qc2w_1x16c4_scalar", Isa::kScalar, 2, RunScalar2},
    {"qd8_qc3w_1x16c4_scalar", Isa::kScalar, 3, RunScalar3},
    {"qd8_qc4w_1x16c4_scalar", Isa::kScalar, 4, RunScalar4},
    {"qd8_qc6w_1x16c4_scalar", Isa::kScalar, 6, RunScalar6},
    {"qd8_qc8w_1x16c4_scalar", Isa::kScalar, 8, RunScalar8},
};

constexpr TermKernels kTermKernels[] = {
#if defined(SPLITQ_AVX2)
    {"terms_avx2", Isa::kAvx2, SetTermsAvx2, AddTermsAvx2, AddBlockTermsAvx2, StoreTermsAvx2},
#endif
#if defined(SPLITQ_NEON)
    {"terms_neon", Isa::kNeon, SetTermsNeon, AddTermsNeon, AddBlockTermsNeon, StoreTermsNeon},
#endif
    {"terms_scalar", Isa::kScalar, SetTermsScalar, AddTermsScalar, AddBlockTermsScalar,
     StoreTermsScalar},
};

}  // namespace

List<GemmKernel> AllKernels() { return {kKernels, std::size(kKernels)}; }
List<TermKernels> AllTermKernels() { return {kTermKernels, std::size(kTermKernels)}; }

const GemmKernel& FindKernel(int bits, Isa isa) {
  const GemmKernel* kernel = kKernels;
  while (kernel->bits != bits || kernel->isa > isa) ++kernel;
  return *kernel;
}

const TermKernels& FindTermKernels(Isa isa) {
  const TermKernels* kernels = kTermKernels;
  while (kernels->isa > isa) ++kernels;
  return *kernels;
}

}  // namespace splitq
