#include <iterator>

#include "attention/kernel.h"
#include "attention/loops.h"
#include "attention/x86.h"

namespace splitq {
namespace {

// For every processor that the compiler is told nothing about; on ARM64 that has NEON.
template <typename Element>
void ScorePlain(const float* queries, int64_t rows, const Element* keys, int64_t width,
                int64_t count, float* scores, int64_t stride) {
  ScoreLoop(queries, rows, keys, width, count, scores, stride);
}

template <typename Element>
void MeanPlain(const float* weights, int64_t stride, int64_t rows, const Element* values,
               int64_t width, int64_t count, float* means) {
  MeanLoop(weights, stride, rows, values, width, count, means);
}

void WidenPlain(const Half* values, int64_t count, float* out) { WidenLoop(values, count, out); }

void NarrowPlain(const float* values, int64_t count, Half* out) { NarrowLoop(values, count, out); }

void SoftmaxPlain(float* row, const float* bias, int64_t count) { SoftmaxLoop(row, bias, count); }

constexpr AttentionKernels kKernels[] = {
#if defined(SPLITQ_AVX512VNNI)
    {"attention_avx512vnni",
     Isa::kAvx512Vnni,
     {ScoreAvx512Vnni, MeanAvx512Vnni},
     {ScoreHalfAvx512Vnni, MeanHalfAvx512Vnni},
     WidenAvx512Vnni,
     NarrowAvx512Vnni,
     SoftmaxAvx512Vnni},
#endif
#if defined(SPLITQ_AVX2)
    {"attention_avx2",
     Isa::kAvx2,
     {ScoreAvx2, MeanAvx2},
     {ScoreHalfAvx2, MeanHalfAvx2},
     WidenAvx2,
     NarrowAvx2,
     SoftmaxAvx2},
#endif
    {"attention_plain",
     Isa::kScalar,
     {ScorePlain<float>, MeanPlain<float>},
     {ScorePlain<Half>, MeanPlain<Half>},
     WidenPlain,
     NarrowPlain,
     SoftmaxPlain},
};

}  // namespace

List<AttentionKernels> AllAttentionKernels() { return {kKernels, std::size(kKernels)}; }

const AttentionKernels& FindAttentionKernels(Isa isa) {
  const AttentionKernels* kernels = kKernels;
  while (kernels->isa > isa) ++kernels;
  return *kernels;
}

}  // namespace splitq
