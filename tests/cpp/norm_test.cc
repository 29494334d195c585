// The norm of a residual sum against its equation in double.
#include <cmath>
#include <limits>

#include "norm/skip_norm.h"
#include "tests.h"

namespace splitq::test {
namespace {

constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

void TestWidth(const SkipNormKernel& kernel, int64_t width, float added, std::mt19937& random,
               Report& report) {
  GuardedArray<float> x(width), skip(width), weight(width), sum(width), y(width);
  for (int64_t i = 0; i < width; ++i) {
    x[i] = static_cast<float>(Draw(random, -30000, 30000)) / 1000.0f;
    skip[i] = static_cast<float>(Draw(random, -30000, 30000)) / 7919.0f;
    weight[i] = static_cast<float>(Draw(random, -30000, 30000)) / 11000.0f;
  }
  kernel.run({x.data(), skip.data(), weight.data(), width, added, sum.data(), y.data()});
  bool good = x.Intact() && skip.Intact() && weight.Intact() && sum.Intact() && y.Intact();
  double squares = 0.0;
  for (int64_t i = 0; i < width; ++i) {
    good = good && sum[i] == x[i] + skip[i];
    squares += static_cast<double>(sum[i]) * sum[i];
  }
  const double root = std::sqrt(squares / static_cast<double>(width) + added);
  for (int64_t i = 0; i < width; ++i) {
    const double want = sum[i] / root * weight[i];
    good = good && std::fabs(y[i] - want) <= 8 * kEpsilon * std::fabs(want);
  }
  report.Check(good, "%s: %d", kernel.name, static_cast<int>(width));
}

// Zeros stay zeros; what is no number spreads over its row and nothing else.
void TestSpecial(const SkipNormKernel& kernel, Report& report) {
  constexpr int64_t kWidth = 19;
  GuardedArray<float> x(kWidth), weight(kWidth), sum(kWidth), y(kWidth);
  for (int64_t place = -1; place < kWidth; ++place) {
    for (int64_t i = 0; i < kWidth; ++i) x[i] = 0.0f, weight[i] = 2.0f;
    if (place >= 0) x[place] = std::numeric_limits<float>::quiet_NaN();
    kernel.run({x.data(), x.data(), weight.data(), kWidth, 1e-6f, sum.data(), y.data()});
    bool good = sum.Intact() && y.Intact();
    for (int64_t i = 0; i < kWidth; ++i) {
      good = good && (place < 0 ? y[i] == 0.0f : std::isnan(y[i]));
      good = good && std::isnan(sum[i]) == (i == place);
    }
    report.Check(good, "%s: NaN at %d", kernel.name, static_cast<int>(place));
  }
}

}  // namespace

void TestNorms(Isa isa, Report& report) {
  std::mt19937 random(5);
  for (const SkipNormKernel& kernel : AllSkipNormKernels()) {
    if (kernel.isa > isa) continue;
    std::printf("%s\n", kernel.name);
    for (int64_t width = 1; width < 70; ++width) {
      for (const float added : {0.0f, 1e-5f, 3.0f}) {
        TestWidth(kernel, width, added, random, report);
      }
    }
    TestSpecial(kernel, report);
  }
}

}  // namespace splitq::test
