// Every micro-kernel of the table against plain loops over logical codes.
#include <algorithm>
#include <vector>

#include "gemm/table.h"
#include "pack/layout.h"
#include "pack/pack.h"
#include "tests.h"

namespace splitq::test {
namespace {

enum Fill { kRandom, kLowest, kHighest, kAlternating, kFills };

int Pick(Fill fill, int low, int high, int64_t index, std::mt19937& random) {
  switch (fill) {
    case kLowest:
      return low;
    case kHighest:
      return high;
    case kAlternating:
      return index % 2 == 0 ? low : high;
    default:
      return Draw(random, low, high);
  }
}

struct Shape {
  int64_t rows, channels, panels;
  Fill code_fill, weight_fill;
  int64_t gap;  // bytes between the arrays and the forbidden page: alignments
};

struct Range {
  int64_t begin, end;
};

// The whole weight and blocks of it, as docs/ops.md's block_size makes them.
std::vector<Range> Ranges(int64_t channels) {
  std::vector<Range> ranges = {{0, channels}};
  for (const int64_t block : {16, 32, 48, 128}) {
    for (int64_t k = 0; k < channels && block < channels; k += block) {
      ranges.push_back({k, k + block < channels ? k + block : channels});
    }
  }
  return ranges;
}

struct Layer {
  int64_t rows, channels, outputs, block;
};

// run_blocks against the contract's float operations one by one, to the bit.
void TestBlocks(const GemmKernel& kernel, const Layer& layer, std::mt19937& random,
                Report& report) {
  const int half = 1 << (kernel.bits - 1);
  const int64_t panels = CeilDiv(layer.outputs, kPanel),
                blocks = CeilDiv(layer.channels, layer.block);
  std::vector<int8_t> weight(static_cast<size_t>(layer.channels * layer.outputs));
  for (int8_t& code : weight) code = static_cast<int8_t>(Draw(random, -half, half - 1));
  const int64_t panel_bytes = PanelBytes(layer.channels, kernel.bits);
  GuardedArray<uint8_t> packed(panels * panel_bytes);
  Pack({reinterpret_cast<const uint8_t*>(weight.data()), false}, layer.channels, layer.outputs,
       kernel.bits, packed.data());
  const int64_t stride = CodeRowStride(layer.channels);
  GuardedArray<int8_t> codes(layer.rows * stride);
  std::vector<int32_t> sums(static_cast<size_t>(layer.rows * blocks));
  for (int64_t i = 0; i < layer.rows * stride; ++i) {
    const int64_t k = i % stride;
    codes[i] = k < layer.channels ? static_cast<int8_t>(Draw(random, -128, 127)) : int8_t{0};
    if (k < layer.channels)
      sums[static_cast<size_t>(i / stride * blocks + k / layer.block)] += codes[i];
  }
  GuardedArray<float> scale(blocks * layer.outputs), terms(panels * layer.rows * kPanel);
  for (int64_t i = 0; i < blocks * layer.outputs; ++i) {
    scale[i] = static_cast<float>(Draw(random, 1, 100000)) / 7919.0f;
  }
  kernel.run_blocks({{codes.data(), stride, layer.rows, sums.data(), blocks, packed.data(),
                      panel_bytes, panels, 0, layer.channels, nullptr},
                     layer.block,
                     scale.data(),
                     layer.outputs,
                     layer.outputs,
                     terms.data()});
  bool same = terms.Intact() && scale.Intact() && packed.Intact() && codes.Intact();
  for (int64_t i = 0; i < panels * layer.rows * kPanel; ++i) {
    const int64_t m = i / kPanel % layer.rows;
    const int64_t n = i / (kPanel * layer.rows) * kPanel + i % kPanel;
    volatile float expected = 0.0f;  // rounded after every operation
    for (int64_t b = 0; b < blocks && n < layer.outputs; ++b) {
      int32_t sum = 0;
      for (int64_t k = b * layer.block; k < layer.channels && k < (b + 1) * layer.block; ++k) {
        sum += codes[m * stride + k] * weight[static_cast<size_t>(k * layer.outputs + n)];
      }
      const volatile float term = static_cast<float>(sum) * scale[b * layer.outputs + n];
      expected = expected + term;
    }
    same = same && terms[i] == expected;
  }
  report.Check(same, "%s: %d rows, %d channels in blocks of %d, %d outputs", kernel.name,
               static_cast<int>(layer.rows), static_cast<int>(layer.channels),
               static_cast<int>(layer.block), static_cast<int>(layer.outputs));
}

// run_terms against float operations on the sums of `run`, to the bit.
bool SameTerms(const GemmKernel& kernel, const PanelProduct& product, std::mt19937& random) {
  const int64_t size = product.panels * product.rows * kPanel;
  GuardedArray<float> row_scale(product.rows), channel_scale(product.panels * kPanel), terms(size);
  for (int64_t m = 0; m < product.rows; ++m) {
    row_scale[m] = static_cast<float>(Draw(random, 1, 100000)) / 7919.0f;
  }
  for (int64_t n = 0; n < product.panels * kPanel; ++n) {
    channel_scale[n] = static_cast<float>(Draw(random, 0, 100000)) / 6101.0f;
  }
  bool same = true;
  for (const bool add : {false, true}) {
    std::vector<float> before(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) {
      terms[i] = before[static_cast<size_t>(i)] = static_cast<float>(Draw(random, -9999, 9999));
    }
    kernel.run_terms(product, {row_scale.data(), channel_scale.data(), add, terms.data()});
    for (int64_t i = 0; i < size; ++i) {
      const int64_t m = i / kPanel % product.rows;
      const int64_t n = i / (kPanel * product.rows) * kPanel + i % kPanel;
      volatile float expected = static_cast<float>(product.sums[i]);  // rounded after every step
      expected = expected * row_scale[m];
      expected = expected * channel_scale[n];
      if (add) expected = before[static_cast<size_t>(i)] + expected;
      same = same && terms[i] == expected;
    }
  }
  return same && terms.Intact() && row_scale.Intact() && channel_scale.Intact();
}

// The codes of a product's first k_end channels on their own, with the sums that `run` makes of
// them.
class ShorterProduct {
 public:
  ShorterProduct(const GemmKernel& kernel, const PanelProduct& whole, int64_t k_end) {
    product_ = whole;
    product_.k_end = k_end;
    product_.codes_stride = CodeRowStride(k_end) + 128;
    codes_.assign(static_cast<size_t>(whole.rows * product_.codes_stride), 0);
    code_sums_.assign(static_cast<size_t>(whole.rows), 0);
    sums_.resize(static_cast<size_t>(whole.panels * whole.rows * kPanel));
    for (int64_t m = 0; m < whole.rows; ++m) {
      for (int64_t k = 0; k < k_end; ++k) {
        const int8_t code = whole.codes[m * whole.codes_stride + k];
        codes_[static_cast<size_t>(m * product_.codes_stride + k)] = code;
        code_sums_[static_cast<size_t>(m)] += code;
      }
    }
    product_.codes = codes_.data();
    product_.code_sums = code_sums_.data();
    product_.code_sums_stride = 1;
    product_.sums = sums_.data();
    kernel.run(product_);
  }
  ShorterProduct(const ShorterProduct&) = delete;
  ShorterProduct& operator=(const ShorterProduct&) = delete;

  const PanelProduct& get() const { return product_; }

 private:
  PanelProduct product_;
  std::vector<int8_t> codes_;
  std::vector<int32_t> code_sums_, sums_;
};

// run_output of a product and shorter ones, `count` in all, against float operations on the sums of
// `run`, to the bit; whatever lies beside the panels of y stays as it is.
bool SameOutput(const GemmKernel& kernel, const PanelProduct& product, int64_t count,
                bool with_bias, std::mt19937& random) {
  constexpr float kUntouched = -12345.0f;
  const int64_t width = product.panels * kPanel;
  const int64_t outputs = width + Draw(random, 1 - static_cast<int>(kPanel), 40);
  const int64_t stride = outputs + 3;
  const ShorterProduct shortest(kernel, product, std::min<int64_t>(product.k_end, 16));
  const ShorterProduct shorter(kernel, product, std::min<int64_t>(product.k_end, 48));
  GuardedArray<float> row_scale(count * product.rows), channel_scale(count * outputs);
  GuardedArray<float> terms(width * product.rows), bias(outputs), y(product.rows * stride);
  const auto fill = [&](GuardedArray<float>& values, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      values[i] = static_cast<float>(Draw(random, -99999, 99999)) / 7919.0f;
    }
  };
  fill(row_scale, count * product.rows);
  fill(channel_scale, count * outputs);
  fill(terms, width * product.rows);
  fill(bias, outputs);
  std::fill_n(y.data(), product.rows * stride, kUntouched);
  std::vector<ScaledProduct> products;
  for (const PanelProduct* part : {&shortest.get(), &product, &shorter.get()}) {
    const auto i = static_cast<int64_t>(products.size());
    if (i == count) break;
    products.push_back(
        {*part, row_scale.data() + i * product.rows, channel_scale.data() + i * outputs});
  }
  kernel.run_output({products.data(), count, terms.data(), with_bias ? bias.data() : nullptr,
                     y.data(), stride, outputs});
  bool same = y.Intact();
  for (int64_t i = 0; i < product.rows * stride; ++i) {
    const int64_t m = i / stride, n = i % stride;
    volatile float expected = kUntouched;  // rounded after every step
    if (n < std::min(outputs, width)) {
      const int64_t at = (n / kPanel * product.rows + m) * kPanel + n % kPanel;
      expected = terms[at];
      for (const ScaledProduct& part : products) {
        volatile float term = static_cast<float>(part.product.sums[at]);
        term = term * part.row_scale[m];
        term = term * part.channel_scale[n];
        expected = expected + term;
      }
      if (with_bias) expected = expected + bias[n];
    }
    same = same && y[i] == expected;
  }
  return same && row_scale.Intact() && channel_scale.Intact() && terms.Intact() && bias.Intact();
}

void TestShape(const GemmKernel& kernel, const Shape& shape, std::mt19937& random, Report& report) {
  const int half = 1 << (kernel.bits - 1);
  const int64_t outputs = shape.panels * kPanel;
  std::vector<int8_t> weight(shape.channels * outputs);  // [K, outputs]
  for (size_t i = 0; i < weight.size(); ++i) {
    weight[i] = static_cast<int8_t>(
        Pick(shape.weight_fill, -half, half - 1, i / outputs + i % outputs, random));
  }
  const int64_t panel_bytes = PanelBytes(shape.channels, kernel.bits);
  GuardedArray<uint8_t> panels(shape.panels * panel_bytes, shape.gap);
  Pack({reinterpret_cast<const uint8_t*>(weight.data()), false}, shape.channels, outputs,
       kernel.bits, panels.data());
  const int64_t stride = CodeRowStride(shape.channels);
  GuardedArray<int8_t> codes(shape.rows * stride, shape.gap);
  for (int64_t i = 0; i < shape.rows * stride; ++i) {
    const bool padding = i % stride >= shape.channels;
    codes[i] = padding ? int8_t{0}
                       : static_cast<int8_t>(Pick(shape.code_fill, -128, 127, i % stride, random));
  }
  GuardedArray<int32_t> sums(shape.rows * outputs, shape.gap / 4 * 4);
  constexpr int64_t kSumsStride = 3;
  std::vector<int32_t> code_sums(static_cast<size_t>(shape.rows * kSumsStride));
  for (const Range& range : Ranges(shape.channels)) {
    std::memset(sums.data(), 0x55, static_cast<size_t>(shape.rows * outputs) * sizeof(int32_t));
    for (int64_t m = 0; m < shape.rows; ++m) {
      int32_t& sum = code_sums[static_cast<size_t>(m * kSumsStride)];
      sum = 0;
      for (int64_t k = range.begin; k < range.end; ++k) sum += codes[m * stride + k];
    }
    const PanelProduct product = {codes.data(), stride,        shape.rows,  code_sums.data(),
                                  kSumsStride,  panels.data(), panel_bytes, shape.panels,
                                  range.begin,  range.end,     sums.data()};
    kernel.run(product);
    bool same = sums.Intact();
    if (kernel.run_terms != nullptr) same = SameTerms(kernel, product, random) && same;
    if (kernel.run_output != nullptr && range.begin == 0 && range.end == shape.channels) {
      const int64_t count = 1 + shape.rows % 3;
      for (const bool with_bias : {false, true}) {
        same = SameOutput(kernel, product, count, with_bias, random) && same;
      }
    }
    for (int64_t i = 0; i < shape.rows * outputs; ++i) {
      const int64_t m = i / kPanel % shape.rows;
      const int64_t n = i / (kPanel * shape.rows) * kPanel + i % kPanel;
      int64_t expected = 0;
      for (int64_t k = range.begin; k < range.end; ++k) {
        expected += codes[m * stride + k] * weight[k * outputs + n];
      }
      same = same && sums[i] == expected;
    }
    report.Check(same && codes.Intact() && panels.Intact(),
                 "%s: %d rows, %d channels, %d panels, k %d to %d, fills %d and %d, gap %d",
                 kernel.name, static_cast<int>(shape.rows), static_cast<int>(shape.channels),
                 static_cast<int>(shape.panels), static_cast<int>(range.begin),
                 static_cast<int>(range.end), shape.code_fill, shape.weight_fill,
                 static_cast<int>(shape.gap));
  }
}

}  // namespace

void TestGemm(List<GemmKernel> kernels, Isa isa, Report& report) {
  std::mt19937 random(1);
  for (const GemmKernel& kernel : kernels) {
    if (kernel.isa > isa) continue;
    std::printf("%s\n", kernel.name);
    for (const int64_t channels :
         {1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 65, 100, 160, 257, 448}) {
      for (const int64_t rows : {1, 2, 3, 4, 5, 7, 8, 9, 14, 31, 64}) {
        if (rows > 14 && channels > 160) continue;
        const int64_t panels = 1 + (channels + rows) % 7;
        for (int code_fill = 0; code_fill < kFills; ++code_fill) {
          for (int weight_fill = 0; weight_fill < kFills; ++weight_fill) {
            if ((code_fill == kRandom) != (weight_fill == kRandom)) continue;
            const int64_t gap = (code_fill + weight_fill) % 2 == 0 ? 0 : 5;
            TestShape(kernel,
                      {rows, channels, panels, static_cast<Fill>(code_fill),
                       static_cast<Fill>(weight_fill), gap},
                      random, report);
          }
        }
      }
    }
    for (const int64_t block : {16, 32, 48, 64, 128}) {
      if (kernel.run_blocks == nullptr || block % kernel.block_step != 0) continue;
      for (const int64_t channels : {1, 17, 64, 100, 257, 448}) {
        for (const int64_t outputs : {1, 16, 31, 48, 70}) {
          for (const int64_t rows : {1, 2, 3, 4, 5, 9}) {
            TestBlocks(kernel, {rows, channels, outputs, block}, random, report);
          }
        }
      }
    }
    // The longest sum of the contract, all at the extremes.
    TestShape(kernel, {1, kMaxChannelsIn, 1, kLowest, kLowest, 0}, random, report);
  }
}

}  // namespace splitq::test
