// Row and term kernels: the scalar ones against plain loops of docs/ops.md, the others against the
// scalar ones, to the bit; the Kronecker product against sums in double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gemm/table.h"
#include "pack/layout.h"
#include "quantize/kronecker.h"
#include "quantize/table.h"
#include "tests.h"

namespace splitq::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Halves (rounding goes to even), zeros of both signs, ordinary numbers, and a few that are none.
float DrawValue(std::mt19937& random, bool finite) {
  const int kind = Draw(random, 0, finite ? 9 : 12);
  if (kind < 4) return static_cast<float>(Draw(random, -300, 300)) / 2.0f;
  if (kind == 4) return Draw(random, 0, 1) == 0 ? 0.0f : -0.0f;
  if (kind == 10) return kNaN;
  if (kind > 10) return kind == 11 ? kInfinity : -kInfinity;
  return static_cast<float>(Draw(random, -1000000, 1000000)) / 7919.0f;
}

template <typename T>
bool SameBits(const T* a, const T* b, int64_t count) {
  return std::memcmp(a, b, static_cast<size_t>(count) * sizeof(T)) == 0;
}

int PlainCode(float value, const Encoding& encoding) {
  const float scaled = value * encoding.inverse;
  if (!(scaled > encoding.low)) return static_cast<int>(encoding.low);
  if (scaled > encoding.high) return static_cast<int>(encoding.high);
  return static_cast<int>(std::nearbyint(scaled));
}

void TestRow(const RowKernels& kernels, int64_t width, bool finite, std::mt19937& random,
             Report& report) {
  const int size = static_cast<int>(width);
  GuardedArray<float> values(width), residual(width);
  GuardedArray<int8_t> codes(width, width % 3);
  Extremes expected{0.0f, 0.0f};
  for (int64_t i = 0; i < width; ++i) {
    values[i] = DrawValue(random, finite);
    if (values[i] < expected.low) expected.low = values[i];
    if (values[i] > expected.high) expected.high = values[i];
  }
  const Extremes extremes = kernels.find_extremes(values.data(), width);
  report.Check(SameBits(&extremes, &expected, 1), "%s: extremes of %d", kernels.name, size);
  for (const Encoding encoding : {Encoding{1.0f, -128.0f, 127.0f}, Encoding{0.25f, -8.0f, 7.0f},
                                  Encoding{0.37f, -0.0f, 3.0f}, Encoding{1e12f, -2.0f, 1.0f}}) {
    int32_t sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += PlainCode(values[i], encoding);
    const auto right_codes = [&] {
      bool same = codes.Intact() && values.Intact();
      for (int64_t i = 0; i < width; ++i) same = same && codes[i] == PlainCode(values[i], encoding);
      return same;
    };
    const int32_t encoded = kernels.encode(values.data(), width, encoding, codes.data());
    report.Check(right_codes() && encoded == sum, "%s: codes of %d", kernels.name, size);
    report.Check(kernels.sum_codes(codes.data(), width) == sum, "%s: sum of %d codes", kernels.name,
                 size);
    const float scale = 1.0f / encoding.inverse;
    std::vector<float> plain(static_cast<size_t>(width));
    for (int64_t i = 0; i < width; ++i) {
      const volatile float product = static_cast<float>(codes[i]) * scale;  // rounded here
      plain[static_cast<size_t>(i)] = values[i] - product;
    }
    Extremes left{0.0f, 0.0f};
    for (const float value : plain) {
      if (value < left.low) left.low = value;
      if (value > left.high) left.high = value;
    }
    std::fill_n(codes.data(), width, int8_t{99});
    const Encoded both = kernels.encode_with_rest(values.data(), width, encoding, scale,
                                                  codes.data(), residual.data());
    const bool right = !finite || (SameBits(residual.data(), plain.data(), width) &&
                                   SameBits(&both.rest, &left, 1));
    report.Check(right && right_codes() && both.sum == sum && residual.Intact(),
                 "%s: codes and residual of %d", kernels.name, size);
  }
}

enum Order { kNone, kAscending, kShuffled, kOrders };

// Ascending: with gaps, whose channels come last, as an export splits outliers off.
std::vector<int32_t> DrawOrder(Order kind, int64_t channels, std::mt19937& random) {
  std::vector<int32_t> order, last;
  if (kind == kNone) return order;
  for (int64_t i = 0; i < channels; ++i) {
    (Draw(random, 0, 19) == 0 ? last : order).push_back(static_cast<int32_t>(i));
  }
  order.insert(order.end(), last.begin(), last.end());
  if (kind == kShuffled) std::shuffle(order.begin(), order.end(), random);
  return order;
}

void TestGather(const RowKernels& kernels, int64_t channels, Order kind, bool scaled,
                std::mt19937& random, Report& report) {
  const std::vector<int32_t> order = DrawOrder(kind, channels, random);
  const std::vector<GatherWindow> windows =
      GatherWindows(order.data(), kind == kNone ? 0 : channels);
  GuardedArray<float> x(channels), scale(channels);
  for (int64_t i = 0; i < channels; ++i) {
    x[i] = DrawValue(random, true);
    scale[i] = DrawValue(random, true);
  }
  const ChannelGather gather{channels, kind == kNone ? nullptr : order.data(),
                             scaled ? scale.data() : nullptr, windows.data()};
  for (const int64_t begin : {int64_t{0}, channels / 3, channels - 1}) {
    const int64_t count = begin == 0 ? channels : (channels - begin + 1) / 2;
    GuardedArray<float> out(count);
    kernels.gather(gather, x.data(), begin, count, out.data());
    bool good = out.Intact() && x.Intact() && scale.Intact();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t channel = begin + i;
      const float value = x[kind == kNone ? channel : order[static_cast<size_t>(channel)]];
      const float want = scaled ? value * scale[channel] : value;
      good = good && SameBits(&out[i], &want, 1);
    }
    report.Check(good, "%s: %d of %d channels, order %d", kernels.name, static_cast<int>(count),
                 static_cast<int>(channels), kind);
  }
}

// One element of g P and the sum of its magnitudes, in double.
struct Element {
  double value = 0.0, magnitude = 0.0;
};

// p1: [blocks, a, a] of the factors; i of blocks * a rows
Element PlainKronecker(const KroneckerFactors& factors, const float* g, int64_t i, int64_t j) {
  Element element;
  const int64_t first = i / factors.a * factors.a;
  const float* p1 = factors.p1 + first * factors.a;
  g += first * factors.b;
  for (int64_t r = 0; r < factors.a; ++r) {
    for (int64_t c = 0; c < factors.b; ++c) {
      const double term = static_cast<double>(g[r * factors.b + c]) *
                          p1[r * factors.a + i - first] * factors.p2[c * factors.b + j];
      element.value += term;
      element.magnitude += std::fabs(term);
    }
  }
  return element;
}

// The group is the last part of a row that is gathered.
void TestKronecker(const RowKernels& kernels, int64_t blocks, int64_t a, int64_t b, bool whole,
                   std::mt19937& random, Report& report) {
  const int64_t width = blocks * a * b, begin = 7, channels = begin + width;
  GuardedArray<float> x(channels), p1(blocks * a * a), p2(b * b), product(a * b), out(width);
  GuardedArray<float> scale(channels);
  const auto fill = [&](GuardedArray<float>& array, int64_t count, int limit) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = static_cast<float>(Draw(random, -limit, limit));
      array[i] = whole ? value : value / 3.7f;
    }
  };
  fill(x, channels, 100);
  fill(scale, channels, 2);
  fill(p1, blocks * a * a, 2);
  fill(p2, b * b, 2);
  const KroneckerFactors factors{p1.data(), p2.data(), a, b, blocks};
  const std::vector<int32_t> order = DrawOrder(kAscending, channels, random);
  const std::vector<GatherWindow> windows = GatherWindows(order.data(), channels);
  const ChannelGather gather{channels, order.data(), scale.data(), windows.data()};
  std::vector<float> g(static_cast<size_t>(width));
  for (int64_t i = 0; i < width; ++i) {
    g[static_cast<size_t>(i)] = x[order[static_cast<size_t>(begin + i)]] * scale[begin + i];
  }
  ReadAhead ahead{{p1.data(), 1}, {p2.data(), b * b}};
  ApplyKronecker(kernels, factors, {gather, x.data(), begin}, &ahead, product.data(), out.data());
  bool good = product.Intact() && out.Intact() && x.Intact() && p1.Intact() && p2.Intact();
  for (int64_t i = 0; i < width; ++i) {
    const Element element = PlainKronecker(factors, g.data(), i / b, i % b);
    // Two dot products of a and b terms, each operation within eps / 2.
    const double bound =
        whole ? 0.0 : (a + b) * std::numeric_limits<float>::epsilon() * element.magnitude;
    good = good && std::fabs(out[i] - element.value) <= bound;
  }
  report.Check(good, "%s: transform of %d x %d x %d", kernels.name, static_cast<int>(blocks),
               static_cast<int>(a), static_cast<int>(b));
}

void TestTerms(const TermKernels& kernels, int64_t rows, std::mt19937& random, Report& report) {
  constexpr int64_t kPanels = 3;
  const int64_t count = kPanels * rows * kPanel, stride = kPanel + 3;
  GuardedArray<int32_t> sums(count);
  GuardedArray<float> row_scale(rows), channel_scale(kPanels * kPanel), terms(count), bias(kPanel);
  GuardedArray<float> y((rows - 1) * stride + kPanel);
  for (int64_t i = 0; i < count; ++i) sums[i] = Draw(random, -2000000000, 2000000000);
  for (int64_t m = 0; m < rows; ++m) row_scale[m] = DrawValue(random, true);
  for (int64_t n = 0; n < kPanels * kPanel; ++n) channel_scale[n] = DrawValue(random, true) / 3.0f;
  for (int64_t n = 0; n < kPanel; ++n) bias[n] = DrawValue(random, true) * 1e6f;
  const PanelSums panel{sums.data(), row_scale.data(), channel_scale.data(), rows, kPanels};
  const auto row_of = [&](int64_t i) { return i / kPanel % rows; };
  const auto channel_of = [&](int64_t i) { return i / (rows * kPanel) * kPanel + i % kPanel; };
  std::vector<float> expected(static_cast<size_t>(count));
  const auto same = [&] {
    return SameBits(terms.data(), expected.data(), count) && terms.Intact() && sums.Intact();
  };
  kernels.set(panel, terms.data());
  for (int64_t i = 0; i < count; ++i) {
    const volatile float scaled = static_cast<float>(sums[i]) * row_scale[row_of(i)];
    expected[static_cast<size_t>(i)] = scaled * channel_scale[channel_of(i)];
  }
  report.Check(same(), "%s: set %d rows", kernels.name, static_cast<int>(rows));
  kernels.add(panel, terms.data());
  for (float& term : expected) term += term;
  report.Check(same(), "%s: add %d rows", kernels.name, static_cast<int>(rows));
  kernels.add_block(panel, terms.data());
  for (int64_t i = 0; i < count; ++i) {
    const volatile float term = static_cast<float>(sums[i]) * channel_scale[channel_of(i)];
    expected[static_cast<size_t>(i)] += term;
  }
  report.Check(same(), "%s: add a block of %d rows", kernels.name, static_cast<int>(rows));
  for (const float* added :
       {static_cast<const float*>(nullptr), static_cast<const float*>(&bias[0])}) {
    kernels.store(terms.data(), rows, added, y.data(), stride);
    bool good = y.Intact();
    for (int64_t i = 0; i < rows * kPanel; ++i) {
      const float want = added != nullptr ? terms[i] + added[i % kPanel] : terms[i];
      good = good && SameBits(&y[i / kPanel * stride + i % kPanel], &want, 1);
    }
    report.Check(good, "%s: store %d rows", kernels.name, static_cast<int>(rows));
  }
}

}  // namespace

void TestRows(Isa isa, Report& report) {
  std::mt19937 random(2);
  for (const RowKernels& kernels : AllRowKernels()) {
    if (kernels.isa > isa) continue;
    std::printf("%s\n", kernels.name);
    for (int64_t width = 1; width < 140; ++width) {
      TestRow(kernels, width, true, random, report);
      TestRow(kernels, width, false, random, report);
    }
    for (const int64_t channels : {1, 15, 16, 17, 31, 32, 33, 64, 100, 517}) {
      for (int kind = 0; kind < kOrders; ++kind) {
        TestGather(kernels, channels, static_cast<Order>(kind), true, random, report);
        TestGather(kernels, channels, static_cast<Order>(kind), false, random, report);
      }
    }
    for (const int64_t a : {1, 2, 3, 4, 5, 7, 8, 16, 19, 35}) {
      for (const int64_t b : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20, 28, 33, 47, 62}) {
        for (const int64_t blocks : {1, 3}) {
          TestKronecker(kernels, blocks, a, b, true, random, report);
          TestKronecker(kernels, blocks, a, b, false, random, report);
        }
      }
    }
  }
}

void TestTerms(Isa isa, Report& report) {
  std::mt19937 random(3);
  for (const TermKernels& kernels : AllTermKernels()) {
    if (kernels.isa > isa) continue;
    std::printf("%s\n", kernels.name);
    for (int64_t rows = 1; rows < 10; ++rows) TestTerms(kernels, rows, random, report);
  }
}

}  // namespace splitq::test
