#include "quantize/table.h"

#include <iterator>

#include "quantize/avx2.h"
#include "quantize/avx512vnni.h"
#include "quantize/neon.h"
#include "quantize/scalar.h"

namespace splitq {
namespace {

// Fastest first; the scalar kernels run everywhere and end the list.
constexpr RowKernels kRowKernels[] = {
#if defined(SPLITQ_AVX512VNNI)
    {"rows_avx512vnni", Isa::kAvx512Vnni, GatherAvx512Vnni, FindExtremesAvx512Vnni,
     EncodeAvx512Vnni, SumCodesAvx2, SubtractCodesAvx512Vnni, MultiplyAvx512Vnni},
#endif
#if defined(SPLITQ_AVX2)
    {"rows_avx2", Isa::kAvx2, GatherScalar, FindExtremesAvx2, EncodeAvx2, SumCodesAvx2,
     SubtractCodesAvx2, MultiplyAvx2},
#endif
#if defined(SPLITQ_NEON)
    {"rows_neon", Isa::kNeon, GatherScalar, FindExtremesNeon, EncodeNeon, SumCodesNeon,
     SubtractCodesNeon, MultiplyNeon},
#endif
    {"rows_scalar", Isa::kScalar, GatherScalar, FindExtremesScalar, EncodeScalar, SumCodesScalar,
     SubtractCodesScalar, MultiplyScalar},
};

}  // namespace

List<RowKernels> AllRowKernels() { return {kRowKernels, std::size(kRowKernels)}; }

const RowKernels& FindRowKernels(Isa isa) {
  const RowKernels* kernels = kRowKernels;
  while (kernels->isa > isa) ++kernels;
  return *kernels;
}

}  // namespace splitq
