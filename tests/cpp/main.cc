// Prints each kernel it ran and the number of checks; fails if one failed. With the argument
// "emulated" it runs the kernels on emulated intrinsics, else those of this processor.
#include <cstring>

#include "gemm/table.h"
#include "tests.h"

int main(int count, char** arguments) {
  using namespace splitq;
  test::Report report;
  const IsaChoice& choice = ChooseIsa();
  const bool emulated = count > 1 && std::strcmp(arguments[1], "emulated") == 0;
  if (emulated) {
    test::TestGemm(test::EmulatedKernels(), Isa::kAvx512Vnni, report);
  } else {
    test::TestGemm(AllKernels(), choice.isa, report);
    test::TestRows(choice.isa, report);
    test::TestTerms(choice.isa, report);
    test::TestAttention(choice.isa, report);
    test::TestGates(choice.isa, report);
    test::TestNorms(choice.isa, report);
    test::TestLayers(choice.isa, report);
    test::TestPayloads(report);
  }
  std::printf("isa %s: %lld checks, %lld failures\n", emulated ? "emulated" : IsaName(choice.isa),
              static_cast<long long>(report.checks()), static_cast<long long>(report.failures()));
  return report.failures() == 0 && report.checks() > 0 ? 0 : 1;
}
