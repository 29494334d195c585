// Prints each kernel it ran and the number of checks; fails if one failed.
#include "tests.h"

int main() {
  using namespace splitq;
  test::Report report;
  const IsaChoice& choice = ChooseIsa();
  test::TestGemm(choice.isa, report);
  test::TestRows(choice.isa, report);
  test::TestTerms(choice.isa, report);
  std::printf("isa %s: %lld checks, %lld failures\n", IsaName(choice.isa),
              static_cast<long long>(report.checks()), static_cast<long long>(report.failures()));
  return report.failures() == 0 && report.checks() > 0 ? 0 : 1;
}
