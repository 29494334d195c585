// The loops of attention against their equations in double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/kernel.h"
#include "tests.h"

namespace splitq::test {
namespace {

constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

struct Sizes {
  int64_t rows, width, count;
};

void Fill(GuardedArray<float>& array, int64_t size, std::mt19937& random) {
  for (int64_t i = 0; i < size; ++i) {
    array[i] = static_cast<float>(Draw(random, -30000, 30000)) / 7919.0f;
  }
}

// Any finite number but the largest, whose products with others stay far from the end of float32.
void Fill(GuardedArray<Half>& array, int64_t size, std::mt19937& random) {
  for (int64_t i = 0; i < size; ++i) {
    const int bits = Draw(random, 0, 0x4FFF) | Draw(random, 0, 1) << 15;
    array[i].bits = static_cast<uint16_t>(bits);
  }
}

double ValueOf(float value) { return double{value}; }

// By the definition of the format.
double ValueOf(Half half) {
  const int exponent = half.bits >> 10 & 0x1F, fraction = half.bits & 0x3FF;
  const double sign = half.bits >> 15 != 0 ? -1.0 : 1.0;
  if (exponent == 0x1F) {
    return fraction == 0 ? sign * std::numeric_limits<double>::infinity()
                         : std::numeric_limits<double>::quiet_NaN();
  }
  const double digits = exponent == 0 ? fraction : 1024 + fraction;
  return sign * std::ldexp(digits, std::max(exponent, 1) - 25);
}

// Of a sum of so many products: the rounding of each, whatever the order.
bool Near(double got, double want, double magnitude, int64_t terms) {
  return std::fabs(got - want) <= static_cast<double>(terms + 2) * kEpsilon * magnitude;
}

template <typename Element>
void TestScores(const AttentionKernels& kernels, const CacheLoops<Element>& loops,
                const Sizes& sizes, std::mt19937& random, Report& report) {
  const int64_t stride = sizes.count + 3;
  GuardedArray<float> queries(sizes.rows * sizes.width);
  GuardedArray<Element> keys(sizes.count * sizes.width);
  GuardedArray<float> scores(sizes.rows * stride);
  Fill(queries, sizes.rows * sizes.width, random);
  Fill(keys, sizes.count * sizes.width, random);
  for (int64_t i = 0; i < sizes.rows * stride; ++i) scores[i] = -7.0f;
  loops.score(queries.data(), sizes.rows, keys.data(), sizes.width, sizes.count, scores.data(),
              stride);
  bool good = scores.Intact() && keys.Intact() && queries.Intact();
  for (int64_t row = 0; row < sizes.rows; ++row) {
    for (int64_t i = 0; i < stride; ++i) {
      const float got = scores[row * stride + i];
      if (i >= sizes.count) {  // what lies between the rows is not ours
        good = good && got == -7.0f;
        continue;
      }
      double want = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < sizes.width; ++k) {
        const double term = queries[row * sizes.width + k] * ValueOf(keys[i * sizes.width + k]);
        want += term;
        magnitude += std::fabs(term);
      }
      good = good && Near(got, want, magnitude, sizes.width);
    }
  }
  report.Check(good, "%s: scores of %d rows, %d channels, %d keys", kernels.name,
               static_cast<int>(sizes.rows), static_cast<int>(sizes.width),
               static_cast<int>(sizes.count));
}

template <typename Element>
void TestMeans(const AttentionKernels& kernels, const CacheLoops<Element>& loops,
               const Sizes& sizes, std::mt19937& random, Report& report) {
  const int64_t stride = sizes.count + 5;
  GuardedArray<float> weights(sizes.rows * stride);
  GuardedArray<Element> values(sizes.count * sizes.width);
  GuardedArray<float> means(sizes.rows * sizes.width);
  Fill(weights, sizes.rows * stride, random);
  Fill(values, sizes.count * sizes.width, random);
  loops.mean(weights.data(), stride, sizes.rows, values.data(), sizes.width, sizes.count,
             means.data());
  bool good = means.Intact() && values.Intact() && weights.Intact();
  for (int64_t row = 0; row < sizes.rows; ++row) {
    for (int64_t k = 0; k < sizes.width; ++k) {
      double want = 0.0, magnitude = 0.0;
      for (int64_t i = 0; i < sizes.count; ++i) {
        const double term = weights[row * stride + i] * ValueOf(values[i * sizes.width + k]);
        want += term;
        magnitude += std::fabs(term);
      }
      good = good && Near(means[row * sizes.width + k], want, magnitude, sizes.count);
    }
  }
  report.Check(good, "%s: means of %d rows, %d channels, %d keys", kernels.name,
               static_cast<int>(sizes.rows), static_cast<int>(sizes.width),
               static_cast<int>(sizes.count));
}

bool SameNumber(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// All float16 numbers, and back again.
void TestWiden(const AttentionKernels& kernels, Report& report) {
  constexpr int64_t kCount = 1 << 16;
  GuardedArray<Half> halves(kCount), back(kCount);
  GuardedArray<float> floats(kCount);
  for (int64_t i = 0; i < kCount; ++i) halves[i].bits = static_cast<uint16_t>(i);
  kernels.widen(halves.data(), kCount, floats.data());
  kernels.narrow(floats.data(), kCount, back.data());
  bool good = halves.Intact() && floats.Intact() && back.Intact();
  for (int64_t i = 0; i < kCount; ++i) {
    good = good && SameNumber(floats[i], ValueOf(halves[i]));
    good = good && SameNumber(ValueOf(back[i]), ValueOf(halves[i]));
  }
  report.Check(good, "%s: float16 to float32 and back", kernels.name);
}

// Between any two neighbours: below, at and above the middle.
void TestNarrow(const AttentionKernels& kernels, Report& report) {
  constexpr int64_t kCount = 3 * 0x7C00;
  GuardedArray<float> floats(kCount);
  GuardedArray<Half> halves(kCount);
  std::vector<uint16_t> want(kCount);
  for (int i = 0; i < 0x7C00; ++i) {
    const auto low = static_cast<uint16_t>(i), high = static_cast<uint16_t>(i + 1);
    // beyond the largest number lies what would be the next one, which becomes infinity
    const double next = i + 1 == 0x7C00 ? 65536.0 : ValueOf(Half{high});
    const auto middle = static_cast<float>((ValueOf(Half{low}) + next) / 2);
    floats[3 * i] = std::nextafter(middle, 0.0f);
    floats[3 * i + 1] = middle;
    floats[3 * i + 2] = std::nextafter(middle, 1e9f);
    const size_t at = static_cast<size_t>(3 * i);
    want[at] = low;
    want[at + 1] = i % 2 == 0 ? low : high;
    want[at + 2] = high;
  }
  kernels.narrow(floats.data(), kCount, halves.data());
  bool good = floats.Intact() && halves.Intact();
  for (int64_t i = 0; i < kCount; ++i)
    good = good && halves[i].bits == want[static_cast<size_t>(i)];
  for (int64_t i = 0; i < kCount; ++i) floats[i] = -floats[i];
  kernels.narrow(floats.data(), kCount, halves.data());
  for (int64_t i = 0; i < kCount; ++i) {
    good = good && halves[i].bits == (want[static_cast<size_t>(i)] | 0x8000);
  }
  report.Check(good, "%s: float32 to float16", kernels.name);
}

void TestConversions(const AttentionKernels& kernels, Report& report) {
  TestWiden(kernels, report);
  TestNarrow(kernels, report);
  for (int64_t count = 0; count < 40; ++count) {
    GuardedArray<Half> halves(count), back(count);
    GuardedArray<float> floats(count);
    for (int64_t i = 0; i < count; ++i) halves[i].bits = static_cast<uint16_t>(0x3C00 + i);
    kernels.widen(halves.data(), count, floats.data());
    kernels.narrow(floats.data(), count, back.data());
    bool good = halves.Intact() && floats.Intact() && back.Intact();
    for (int64_t i = 0; i < count; ++i) good = good && back[i].bits == halves[i].bits;
    report.Check(good, "%s: %d conversions", kernels.name, static_cast<int>(count));
  }
}

void TestSoftmax(const AttentionKernels& kernels, int64_t count, std::mt19937& random,
                 Report& report) {
  GuardedArray<float> row(count), bias(count);
  std::vector<double> want(static_cast<size_t>(count));
  Fill(row, count, random);
  double highest = -1e300, total = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    bias[i] = i % 5 == 3 && count > 4 ? -1e30f : 0.25f;  // padding between tokens
    want[static_cast<size_t>(i)] = static_cast<double>(row[i] + bias[i]);
    highest = std::fmax(highest, want[static_cast<size_t>(i)]);
  }
  for (double& score : want) total += score = std::exp(score - highest);
  kernels.softmax(row.data(), bias.data(), count);
  bool good = row.Intact() && bias.Intact();
  for (int64_t i = 0; i < count; ++i) {
    const double right = want[static_cast<size_t>(i)] / total;
    good = good && std::fabs(row[i] - right) <= (16 + count / 8) * kEpsilon * right + 1e-37;
  }
  report.Check(good, "%s: softmax of %d", kernels.name, static_cast<int>(count));
}

// A row that padding hides whole, and one with a NaN: numbers, and no crash.
void TestSpecial(const AttentionKernels& kernels, Report& report) {
  constexpr int64_t kCount = 37;
  for (const float value :
       {0.0f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    GuardedArray<float> row(kCount), bias(kCount);
    for (int64_t i = 0; i < kCount; ++i) {
      row[i] = 1.0f;
      bias[i] = -1e30f;
    }
    row[20] += value;
    kernels.softmax(row.data(), bias.data(), kCount);
    bool good = row.Intact();
    for (int64_t i = 0; i < kCount && value == 0.0f; ++i) {
      good = good && std::fabs(row[i] - 1.0f / kCount) < 1e-6f;
    }
    report.Check(good, "%s: softmax with %g", kernels.name, static_cast<double>(value));
  }
}

}  // namespace

void TestAttention(Isa isa, Report& report) {
  std::mt19937 random(6);
  for (const AttentionKernels& kernels : AllAttentionKernels()) {
    if (kernels.isa > isa) continue;
    std::printf("%s\n", kernels.name);
    for (int64_t rows = 1; rows <= 9; ++rows) {
      for (const int64_t width : {1, 2, 15, 16, 17, 31, 64, 66, 80, 128, 130}) {
        for (const int64_t count : {1, 3, 4, 5, 18, 67}) {
          const Sizes sizes{rows, width, count};
          TestScores(kernels, kernels.floats, sizes, random, report);
          TestMeans(kernels, kernels.floats, sizes, random, report);
          TestScores(kernels, kernels.halves, sizes, random, report);
          TestMeans(kernels, kernels.halves, sizes, random, report);
        }
      }
    }
    for (int64_t count = 1; count < 70; ++count) TestSoftmax(kernels, count, random, report);
    TestSoftmax(kernels, 1000, random, report);
    TestSpecial(kernels, report);
    TestConversions(kernels, report);
  }
}

}  // namespace splitq::test
