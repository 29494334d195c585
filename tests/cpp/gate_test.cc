// The gated activation against its equation in double.
#include <cmath>
#include <limits>

#include "gate/swiglu.h"
#include "tests.h"

namespace splitq::test {
namespace {

constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

void TestWidth(const SwiGluKernel& kernel, int64_t width, std::mt19937& random, Report& report) {
  GuardedArray<float> gate(width), up(width), out(width);
  for (int64_t i = 0; i < width; ++i) {
    gate[i] = static_cast<float>(Draw(random, -30000, 30000)) / 1000.0f;
    up[i] = static_cast<float>(Draw(random, -30000, 30000)) / 7919.0f;
  }
  kernel.run(gate.data(), up.data(), width, out.data());
  bool good = out.Intact() && gate.Intact() && up.Intact();
  for (int64_t i = 0; i < width; ++i) {
    const double g = gate[i], want = g / (1.0 + std::exp(-g)) * up[i];
    good = good && std::fabs(out[i] - want) <= 8 * kEpsilon * std::fabs(want);
  }
  report.Check(good, "%s: %d", kernel.name, static_cast<int>(width));
}

// In every place of a register.
void TestSpecial(const SwiGluKernel& kernel, Report& report) {
  constexpr int64_t kWidth = 19;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t place = 0; place < kWidth; ++place) {
    GuardedArray<float> gate(kWidth), up(kWidth), out(kWidth);
    for (const float value : {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity,
                              std::numeric_limits<float>::max(), -1e6f}) {
      for (int64_t i = 0; i < kWidth; ++i) gate[i] = up[i] = 1.0f;
      gate[place] = value;
      kernel.run(gate.data(), up.data(), kWidth, out.data());
      bool good = out.Intact();
      for (int64_t i = 0; i < kWidth; ++i) {
        if (i != place) good = good && std::fabs(out[i] - 0.7310585786) < 1e-6;
      }
      if (std::isfinite(value)) {
        good = good && (value > 0.0f ? out[place] == value : std::fabs(out[place]) < 1e-30f);
      } else {
        good = good && !std::isfinite(out[place]);
      }
      report.Check(good, "%s: %g at %d", kernel.name, static_cast<double>(value),
                   static_cast<int>(place));
    }
  }
}

}  // namespace

void TestGates(Isa isa, Report& report) {
  std::mt19937 random(4);
  for (const SwiGluKernel& kernel : AllSwiGluKernels()) {
    if (kernel.isa > isa) continue;
    std::printf("%s\n", kernel.name);
    for (int64_t width = 1; width < 70; ++width) TestWidth(kernel, width, random, report);
    TestSpecial(kernel, report);
  }
}

}  // namespace splitq::test
