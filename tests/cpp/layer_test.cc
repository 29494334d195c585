// Whole layers without a transform, whose rounding is the only thing that instruction sets may
// differ in: every instruction set gives the scalar form's bits, with and without threads, and two
// layers may be used by several threads at once.
#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "gemm/table.h"
#include "linear/split_linear.h"
#include "quantize/table.h"
#include "tests.h"

namespace splitq::test {
namespace {

constexpr int kThreads = 4;

template <typename T>
std::vector<T> DrawMany(std::mt19937& random, int64_t count, int low, int high, T divisor = T{1}) {
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(static_cast<T>(Draw(random, low, high)) / divisor);
  return values;
}

struct Ranks {
  int64_t cws, mac;
  bool mac_on_text_only;
};

constexpr Ranks kNone = {0, 0, true}, kBoth = {5, 21, true};

struct Sizes {
  int64_t main, text, vision, outputs, rows, block;
  int bits, activation_bits;
  Ranks ranks;
  int extra_bits[3] = {4, 4, 4};  // of the text and vision weights, and of U and V
};

// A layer that owns its tensors.
class TestLayer {
 public:
  TestLayer(const Sizes& sizes, std::mt19937& random) : sizes_(sizes) {
    const int64_t channels = sizes.main + sizes.text + sizes.vision;
    order_ = DrawMany<int32_t>(random, channels, 0, static_cast<int>(channels) - 1);
    scale_ = DrawMany<float>(random, channels, 1, 100, 37.0f);
    const int64_t widths[kGroups] = {sizes.main, sizes.text, sizes.vision};
    for (int g = 0; g < kGroups; ++g) {
      if (widths[g] == 0) continue;
      const int bits = g == kMain ? sizes.bits : sizes.extra_bits[g - 1];
      layer_.weights[g] =
          Weight(random, widths[g], sizes.outputs, bits, g == kMain ? sizes.block : 0);
      layer_.activation.groups[g].width = widths[g];
      layer_.activation.groups[g].quantization.bits = g == kMain ? sizes.activation_bits : 8;
    }
    windows_ = GatherWindows(order_.data(), channels);
    layer_.activation.gather = {channels, order_.data(), scale_.data(), windows_.data()};
    layer_.activation.residual_bits = 4;
    if (sizes.ranks.cws + sizes.ranks.mac > 0) Correct(random);
    x_ = DrawMany<float>(random, sizes.rows * channels, -30000, 30000, 1237.0f);
    bias_ = DrawMany<float>(random, sizes.outputs, -100, 100, 7.0f);
    modality_ = DrawMany<int8_t>(random, sizes.rows, 0, 1);
  }
  TestLayer(const TestLayer&) = delete;
  TestLayer& operator=(const TestLayer&) = delete;

  std::vector<float> Run(Isa isa, const ParallelFor& parallel) const {
    SplitLinear layer = layer_;
    layer.activation.kernels = &FindRowKernels(isa);
    for (PackedWeight& weight : layer.weights) Choose(isa, weight);
    layer.correction.kernels = layer.activation.kernels;
    Choose(isa, layer.correction.u);
    Choose(isa, layer.correction.v);
    layer.correction.gate_cws = layer.correction.gate_mac = gate_.data();
    layer.bias = bias_.data();
    std::vector<float> y(static_cast<size_t>(sizes_.rows * sizes_.outputs));
    std::vector<uint8_t> scratch(static_cast<size_t>(ScratchBytes(layer, sizes_.rows)));
    RunSplitLinear(layer, {x_.data(), modality_.data(), sizes_.rows, y.data()}, scratch.data(),
                   parallel);
    return y;
  }

 private:
  // Its bytes are any bytes: every packed code is valid.
  PackedWeight Weight(std::mt19937& random, int64_t k, int64_t n, int bits, int64_t block) {
    payloads_.push_back(DrawMany<uint8_t>(random, PayloadBytes(k, n, bits), 0, 255));
    scales_.push_back(
        DrawMany<float>(random, n * (block > 0 ? CeilDiv(k, block) : 1), 1, 1000, 7919.0f));
    PackedWeight weight;
    weight.payload = payloads_.back().data();
    weight.scale = scales_.back().data();
    weight.kernel = &FindKernel(bits, Isa::kScalar);
    weight.channels_in = k;
    weight.channels_out = n;
    weight.block_size = block;
    return weight;
  }

  void Correct(std::mt19937& random) {
    Correction& correction = layer_.correction;
    layer_.corrected = true;
    correction.cws_rank = sizes_.ranks.cws;
    correction.mac_rank = sizes_.ranks.mac;
    correction.mac_on_text_only = sizes_.ranks.mac_on_text_only;
    const int64_t rank = std::max(correction.cws_rank, correction.mac_rank);
    correction.u = Weight(random, sizes_.main, rank, sizes_.extra_bits[2], 0);
    correction.v = Weight(random, rank, sizes_.outputs, sizes_.extra_bits[2], 0);
    gate_ = DrawMany<float>(random, rank, 1, 100, 50.0f);
  }

  static void Choose(Isa isa, PackedWeight& weight) {
    if (weight.payload == nullptr) return;
    weight.kernel = &FindKernel(weight.kernel->bits, isa);
    weight.terms = &FindTermKernels(isa);
  }

  Sizes sizes_;
  SplitLinear layer_;
  std::vector<int32_t> order_;
  std::vector<GatherWindow> windows_;
  std::vector<float> scale_, x_, bias_, gate_;
  std::vector<int8_t> modality_;
  std::vector<std::vector<uint8_t>> payloads_;
  std::vector<std::vector<float>> scales_;
};

void RunSerially(void*, int64_t count, ParallelFor::Task task, void* body) {
  for (int64_t i = 0; i < count; ++i) task(body, i);
}

void RunOnThreads(void*, int64_t count, ParallelFor::Task task, void* body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < count; i = next++) task(body, i);
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void TestLayers(Isa isa, Report& report) {
  std::mt19937 random(4);
  const ParallelFor serial(RunSerially, nullptr, 1), threaded(RunOnThreads, nullptr, kThreads);
  std::vector<Isa> isas;
  for (const GemmKernel& kernel : AllKernels()) {
    if (kernel.isa <= isa && (isas.empty() || isas.back() != kernel.isa))
      isas.push_back(kernel.isa);
  }
  std::vector<std::unique_ptr<TestLayer>> layers;
  for (const Sizes& sizes : {
           Sizes{96, 0, 0, 40, 1, 0, 4, 8, kNone},
           Sizes{672, 16, 16, 200, 70, 0, 4, 8, kBoth},
           Sizes{1500, 20, 12, 100, 3, 0, 3, 3, kBoth},
           Sizes{640, 16, 16, 77, 17, 32, 3, 4, kBoth},
           Sizes{640, 0, 16, 77, 130, 48, 2, 2, kNone},
           Sizes{333, 3, 5, 33, 9, 64, 8, 8, kBoth},
           Sizes{560, 8, 8, 1700, 1, 0, 4, 8, kBoth},
           Sizes{560, 8, 8, 300, 8, 0, 3, 4, kBoth},
           Sizes{2040, 4, 4, 96, 1, 0, 2, 8, kBoth},
           Sizes{300, 8, 8, 90, 257, 0, 4, 8, Ranks{4, 20, false}},
           Sizes{300, 8, 8, 90, 40, 0, 4, 4, Ranks{12, 0, true}},
           Sizes{300, 0, 8, 90, 40, 0, 3, 4, Ranks{0, 20, false}},
           Sizes{300, 8, 8, 90, 20, 0, 3, 4, kBoth, {4, 8, 4}},
           Sizes{300, 8, 8, 90, 20, 0, 3, 4, kBoth, {4, 4, 6}},
           Sizes{560, 200, 8, 170, 1, 0, 4, 8, kBoth},
           Sizes{176, 16, 16, 1605, 2, 0, 4, 8, kBoth},
           Sizes{176, 16, 16, 805, 4, 0, 3, 3, kBoth},
       }) {
    layers.push_back(std::make_unique<TestLayer>(sizes, random));
    const std::vector<float> expected = layers.back()->Run(Isa::kScalar, serial);
    for (const Isa each : isas) {
      for (const bool alone : {true, false}) {
        const std::vector<float> y = layers.back()->Run(each, alone ? serial : threaded);
        const bool same = std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)) == 0;
        report.Check(same, "layer %d on %s, %s", static_cast<int>(layers.size()), IsaName(each),
                     alone ? "alone" : "with threads");
      }
    }
  }
  std::vector<std::vector<float>> expected;
  for (int i = 0; i < 2; ++i)
    expected.push_back(layers[static_cast<size_t>(i) + 1]->Run(isa, serial));
  std::atomic<int> wrong{0};
  std::vector<std::thread> users;
  for (int user = 0; user < kThreads; ++user) {
    users.emplace_back([&, user] {
      const auto which = static_cast<size_t>(user % 2);
      for (int round = 0; round < 3; ++round) {
        if (layers[which + 1]->Run(isa, threaded) != expected[which]) ++wrong;
      }
    });
  }
  for (std::thread& user : users) user.join();
  report.Check(wrong == 0, "two layers used by %d threads", kThreads);
}

}  // namespace splitq::test
