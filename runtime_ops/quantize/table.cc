#include "quantize/table.h"

#include <iterator>

#include "quantize/avx2.h"
#include "quantize/avx512vnni.h"
#include "quantize/neon.h"
#include "quantize/scalar.h"

namespace splitq {
namespace {

// From loops that do one thing at a time.
template <auto encode, auto sum>
int32_t Encode(const float* values, int64_t width, Encoding encoding, int8_t* codes) {
  encode(values, width, encoding, codes);
  return sum(codes, width);
}

template <auto encode, auto sum, auto subtract, auto find_extremes>
Encoded EncodeWithRest(const float* values, int64_t width, Encoding encoding, float scale,
                       int8_t* codes, float* rest) {
  encode(values, width, encoding, codes);
  subtract(values, codes, scale, width, rest);
  return {sum(codes, width), find_extremes(rest, width)};
}

// Fastest first; the scalar kernels run everywhere and end the list.
constexpr RowKernels kRowKernels[] = {
#if defined(SPLITQ_AVX512VNNI)
    {"rows_avx512vnni", Isa::kAvx512Vnni, GatherAvx512Vnni, true, FindExtremesAvx512Vnni,
     EncodeAvx512Vnni, EncodeWithRestAvx512Vnni, SumCodesAvx2, MultiplyAvx512Vnni},
#endif
#if defined(SPLITQ_AVX2)
    {"rows_avx2", Isa::kAvx2, GatherScalar, false, FindExtremesAvx2,
     Encode<EncodeAvx2, SumCodesAvx2>,
     EncodeWithRest<EncodeAvx2, SumCodesAvx2, SubtractCodesAvx2, FindExtremesAvx2>, SumCodesAvx2,
     MultiplyAvx2},
#endif
#if defined(SPLITQ_NEON)
    {"rows_neon", Isa::kNeon, GatherScalar, false, FindExtremesNeon,
     Encode<EncodeNeon, SumCodesNeon>,
     EncodeWithRest<EncodeNeon, SumCodesNeon, SubtractCodesNeon, FindExtremesNeon>, SumCodesNeon,
     MultiplyNeon},
#endif
    {"rows_scalar", Isa::kScalar, GatherScalar, false, FindExtremesScalar,
     Encode<EncodeScalar, SumCodesScalar>,
     EncodeWithRest<EncodeScalar, SumCodesScalar, SubtractCodesScalar, FindExtremesScalar>,
     SumCodesScalar, MultiplyScalar},
};

}  // namespace

List<RowKernels> AllRowKernels() { return {kRowKernels, std::size(kRowKernels)}; }

const RowKernels& FindRowKernels(Isa isa) {
  const RowKernels* kernels = kRowKernels;
  while (kernels->isa > isa) ++kernels;
  return *kernels;
}

}  // namespace splitq
