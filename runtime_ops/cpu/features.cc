#include "cpu/features.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace splitq {
namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2};

// SPLITQ_AVX2 is defined where the build has the AVX2 kernels. The builtin asks the operating
// system too, whether it saves the wide registers.
Isa DetectIsa() {
#if defined(SPLITQ_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kScalar;
}

IsaChoice MakeChoice(const char* wanted) {
  const Isa best = DetectIsa();
  if (wanted == nullptr || *wanted == '\0') return {best, nullptr};
  for (const Isa isa : kAll) {
    if (std::strcmp(wanted, IsaName(isa)) == 0) return {std::min(isa, best), nullptr};
  }
  return {best, wanted};
}

}  // namespace

const char* IsaName(Isa isa) { return isa == Isa::kAvx2 ? "avx2" : "scalar"; }

const IsaChoice& ChooseIsa() {
  static const IsaChoice choice = MakeChoice(std::getenv("SPLITQ_ISA"));
  return choice;
}

}  // namespace splitq
