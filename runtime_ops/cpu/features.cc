#include "cpu/features.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>

#if defined(SPLITQ_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(SPLITQ_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace splitq {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2",    "avx512vnni",
                                  "neon",   "dotprod", "i8mm"};  // in Isa's order

// SPLITQ_AVX2, SPLITQ_AVX512VNNI and SPLITQ_NEON are defined where the build has these kernels.
#if defined(SPLITQ_AVX2)

// The builtin asks the operating system too, whether it saves the wide registers.
Isa DetectIsa() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kScalar;
#if defined(SPLITQ_AVX512VNNI)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    return Isa::kAvx512Vnni;
  }
#endif
  return Isa::kAvx2;
}

#elif defined(SPLITQ_NEON)

struct ArmFeatures {
  bool dotprod = false, i8mm = false;
};

#if defined(__APPLE__)

bool HasFeature(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

ArmFeatures AskSystem() {
  return {HasFeature("hw.optional.arm.FEAT_DotProd"), HasFeature("hw.optional.arm.FEAT_I8MM")};
}

#elif defined(__linux__)

// Linux's numbers (asm/hwcap.h), which headers older than the kernel lack.
ArmFeatures AskSystem() {
  constexpr unsigned long kDotprodBit = 1ul << 20;  // HWCAP_ASIMDDP of AT_HWCAP
  constexpr unsigned long kI8mmBit = 1ul << 13;     // HWCAP2_I8MM of AT_HWCAP2
  return {(getauxval(AT_HWCAP) & kDotprodBit) != 0, (getauxval(AT_HWCAP2) & kI8mmBit) != 0};
}

#else

ArmFeatures AskSystem() { return {}; }

#endif

Isa DetectIsa() {
  const ArmFeatures features = AskSystem();
  if (!features.dotprod) return Isa::kNeon;
  return features.i8mm ? Isa::kI8mm : Isa::kDotprod;
}

#else

Isa DetectIsa() { return Isa::kScalar; }

#endif

bool IsArm(Isa isa) { return isa >= Isa::kNeon; }

IsaChoice MakeChoice(const char* wanted) {
  const Isa best = DetectIsa();
  if (wanted == nullptr || *wanted == '\0') return {best, nullptr};
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (std::strcmp(wanted, kNames[i]) != 0) continue;
    const Isa isa = static_cast<Isa>(i);
    return {IsArm(isa) == IsArm(best) ? std::min(isa, best) : Isa::kScalar, nullptr};
  }
  return {best, wanted};
}

}  // namespace

const char* IsaName(Isa isa) { return kNames[static_cast<int>(isa)]; }

const IsaChoice& ChooseIsa() {
  static const IsaChoice choice = MakeChoice(std::getenv("SPLITQ_ISA"));
  return choice;
}

}  // namespace splitq
