// Which instruction set the kernels may use.
#pragma once

namespace splitq {

// Ascending: a processor that has one has those before it too.
enum class Isa {
  kScalar,  // plain C++
  kAvx2,    // x86-64 with AVX2 and FMA
};

const char* IsaName(Isa isa);

// The names that SPLITQ_ISA may hold, for messages.
inline constexpr char kIsaNames[] = "scalar or avx2";

struct IsaChoice {
  Isa isa = Isa::kScalar;
  const char* unknown = nullptr;  // the value of SPLITQ_ISA if it names no instruction set
};

// The best that this processor, its operating system and this build have, or less if the
// environment variable SPLITQ_ISA names less: it can lower the choice, not raise it. Found out
// once, at the first call.
const IsaChoice& ChooseIsa();

}  // namespace splitq
