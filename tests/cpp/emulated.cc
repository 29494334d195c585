// The AVX-512 kernels once more, on SIMDe's emulation of the intrinsics.
#include <cstring>
#include <iterator>

#include "tests.h"

#if defined(SPLITQ_TEST_EMULATED)
#define SPLITQ_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// What older versions of SIMDe lack.
#if !defined(_mm512_cvtepi32_ps)
static __m512 _mm512_cvtepi32_ps(__m512i values) {
  int32_t whole[16];
  float result[16];
  std::memcpy(whole, &values, sizeof(whole));
  for (int i = 0; i < 16; ++i) result[i] = static_cast<float>(whole[i]);
  return _mm512_loadu_ps(result);
}
#endif
#if !defined(_mm512_maskz_loadu_ps)
using __mmask16 = uint16_t;
static __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* values) {
  float result[16] = {};
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) result[i] = static_cast<const float*>(values)[i];
  }
  return _mm512_loadu_ps(result);
}
#endif

#if !defined(_mm512_mask_storeu_ps)
static void _mm512_mask_storeu_ps(void* memory, __mmask16 mask, __m512 values) {
  float all[16];
  _mm512_storeu_ps(all, values);
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) static_cast<float*>(memory)[i] = all[i];
  }
}
#endif

#define RunAvx512VnniBits2 RunEmulatedBits2
#define RunTermsAvx512VnniBits2 RunTermsEmulatedBits2
#define RunBlocksAvx512VnniBits2 RunBlocksEmulatedBits2
#define RunAvx512VnniBits3 RunEmulatedBits3
#define RunTermsAvx512VnniBits3 RunTermsEmulatedBits3
#define RunBlocksAvx512VnniBits3 RunBlocksEmulatedBits3
#define RunAvx512VnniBits4 RunEmulatedBits4
#define RunTermsAvx512VnniBits4 RunTermsEmulatedBits4
#define RunOutputAvx512VnniBits4 RunOutputEmulatedBits4
#define RunBlocksAvx512VnniBits4 RunBlocksEmulatedBits4
#define RunAvx512VnniBits6 RunEmulatedBits6
#define RunTermsAvx512VnniBits6 RunTermsEmulatedBits6
#define RunBlocksAvx512VnniBits6 RunBlocksEmulatedBits6
#define RunAvx512VnniBits8 RunEmulatedBits8
#define RunTermsAvx512VnniBits8 RunTermsEmulatedBits8
#define RunBlocksAvx512VnniBits8 RunBlocksEmulatedBits8
#include "gemm/avx512vnni.cc"

namespace splitq::test {

constexpr GemmKernel kKernels[] = {
    {"qd8_qc2w_8x48c4_emulated", Isa::kAvx512Vnni, 2, RunEmulatedBits2, RunTermsEmulatedBits2,
     nullptr, RunBlocksEmulatedBits2, 16},
    {"qd8_qc3w_8x48c4_emulated", Isa::kAvx512Vnni, 3, RunEmulatedBits3, RunTermsEmulatedBits3,
     nullptr, RunBlocksEmulatedBits3, 32},
    {"qd8_qc4w_8x48c4_emulated", Isa::kAvx512Vnni, 4, RunEmulatedBits4, RunTermsEmulatedBits4,
     RunOutputEmulatedBits4, RunBlocksEmulatedBits4, 16},
    {"qd8_qc6w_8x48c4_emulated", Isa::kAvx512Vnni, 6, RunEmulatedBits6, RunTermsEmulatedBits6,
     nullptr, RunBlocksEmulatedBits6, 16},
    {"qd8_qc8w_8x48c4_emulated", Isa::kAvx512Vnni, 8, RunEmulatedBits8, RunTermsEmulatedBits8,
     nullptr, RunBlocksEmulatedBits8, 16},
};

List<GemmKernel> EmulatedKernels() { return {kKernels, std::size(kKernels)}; }

}  // namespace splitq::test
#else
namespace splitq::test {

List<GemmKernel> EmulatedKernels() { return {nullptr, 0}; }

}  // namespace splitq::test
#endif
