// Which instruction set the kernels may use.
#pragma once

namespace splitq {

// Ascending within an architecture: a processor that has one has those before it too. A build has
// kernels of one architecture.
enum class Isa {
  kScalar,      // plain C++
  kAvx2,        // x86-64 with AVX2 and FMA
  kAvx512Vnni,  // x86-64 with AVX-512 F, BW, VL and VNNI, and kAvx2
  kNeon,        // ARM64
  kDotprod,     // ARM64 with the dot products of four int8 (FEAT_DotProd)
  kI8mm,        // ARM64 with the int8 matrix products (FEAT_I8MM), and kDotprod
};

const char* IsaName(Isa isa);

// The names that SPLITQ_ISA may hold, for messages.
inline constexpr char kIsaNames[] = "scalar, avx2, avx512vnni, neon, dotprod or i8mm";

struct IsaChoice {
  Isa isa = Isa::kScalar;
  const char* unknown = nullptr;  // the value of SPLITQ_ISA if it names no instruction set
};

// The best that this processor, its operating system and this build have, or less if the
// environment variable SPLITQ_ISA names less: it can lower the choice, not raise it. A name of
// another architecture leaves what the two have in common, the scalar kernels. Found out once, at
// the first call.
const IsaChoice& ChooseIsa();

}  // namespace splitq
