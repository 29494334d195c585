#include "ops/channel_groups.h"

#include <cstring>
#include <utility>

#include "pack/layout.h"
#include "quantize/table.h"

namespace splitq::ops {
namespace {

constexpr char kExportAgain[] = "export the model again";

bool IsPermutation(const std::vector<int32_t>& order) {
  std::vector<bool> seen(order.size());
  for (const int32_t channel : order) {
    if (channel < 0 || static_cast<size_t>(channel) >= order.size() || seen[channel]) return false;
    seen[channel] = true;
  }
  return true;
}

}  // namespace

ChannelGroups::ChannelGroups(const Node& node, size_t first_input) {
  plan_.kernels = &FindRowKernels(ChooseIsa().isa);
  ReadWidths(node);
  ReadBits(node);
  ReadOrder(node, first_input);
  if (node.HasInput(first_input + 1)) {
    plan_.gather.scale =
        Keep(node.Constant(first_input + 1, {plan_.gather.channels}), plan_.gather.channels);
  }
  for (int g = 0; g < kGroups; ++g) {
    ReadFactors(node, first_input + 2 + 2 * static_cast<size_t>(g), g);
  }
  ReadClip(node, first_input + 8);
}

void ChannelGroups::ReadWidths(const Node& node) {
  plan_.gather.channels = node.Int("K", 1, kGroups * kMaxChannelsIn);
  const std::vector<int64_t> widths = node.Ints("group_widths");
  int64_t total = 0;
  bool good = widths.size() == kGroups && widths[kMain] > 0;
  for (const int64_t width : widths) {
    good = good && width >= 0 && width <= kMaxChannelsIn;
    if (good) total += width;
  }
  if (!good || total != plan_.gather.channels) {
    node.Fail("group_widths [K_m, K_t, K_v] with K_m > 0, none above " +
                  std::to_string(kMaxChannelsIn) +
                  " and the sum K = " + std::to_string(plan_.gather.channels),
              ToString(widths), kExportAgain);
  }
  for (int g = 0; g < kGroups; ++g) plan_.groups[g].width = widths[g];
}

void ChannelGroups::ReadBits(const Node& node) {
  const int main_bits = node.BitWidth("activation_bits");
  const int outlier_bits = node.BitWidth("outlier_activation_bits", 8);
  for (int g = 0; g < kGroups; ++g) {
    plan_.groups[g].quantization.bits = g == kMain ? main_bits : outlier_bits;
  }
  plan_.residual_bits = node.BitWidth("residual_bits", 8);
  plan_.groups[kMain].quantization.symmetric = node.Int("activation_symmetric", 0, 1, 1) == 1;
  if (!plan_.groups[kMain].quantization.symmetric && main_bits == 8) {
    node.Fail("activation_bits below 8 with activation_symmetric = 0", "8", kExportAgain);
  }
}

void ChannelGroups::ReadOrder(const Node& node, size_t input) {
  if (!node.HasInput(input)) return;
  order_ = node.IntConstant(input, plan_.gather.channels);
  if (!IsPermutation(order_)) {
    node.Fail("channel_order to be a permutation of 0 .. K-1", "a channel out of range or twice",
              kExportAgain);
  }
  windows_ = GatherWindows(order_.data(), plan_.gather.channels);
  plan_.gather.order = order_.data();
  plan_.gather.windows = windows_.data();
}

void ChannelGroups::ReadFactors(const Node& node, size_t input, int group) {
  const std::string names =
      std::string(node.InputName(input)) + " and " + node.InputName(input + 1);
  const bool first = node.HasInput(input), second = node.HasInput(input + 1);
  if (first != second) node.Fail("both or neither of " + names, "one", kExportAgain);
  if (!first) return;
  const int64_t width = plan_.groups[group].width;
  const Shape p2 = node.SquareShape(input + 1);
  // The sizes divide the width, so that no product of them can overflow before it is compared.
  const bool divides = p2.size() == 2 && p2[0] > 0 && width > 0 && width % p2[0] == 0;
  const std::string expected =
      names + " of shapes [B * a, a] and [b, b] with B * a * b = " + kGroupNames[group] + " = " +
      std::to_string(width);
  if (!divides) node.Fail(expected, "b of " + ToString(p2), kExportAgain);
  const int64_t rows = width / p2[0];
  const Shape p1 = node.MatrixShape(input, rows);
  if (p1.size() != 2 || p1[0] != rows || p1[1] <= 0 || rows % p1[1] != 0) {
    node.Fail(expected, ToString(p1) + " and " + ToString(p2), kExportAgain);
  }
  KroneckerFactors& factors = plan_.groups[group].factors;
  factors.blocks = p1[0] / p1[1];
  factors.a = p1[1];
  factors.b = p2[0];
  factors.p1 = Keep(node.Constant(input, p1), p1[0] * p1[1]);
  factors.p2 = Keep(node.Constant(input + 1, {p2[0], p2[0]}), p2[0] * p2[0]);
}

void ChannelGroups::ReadClip(const Node& node, size_t input) {
  if (!node.HasInput(input)) return;
  const float* clip = Keep(node.Constant(input, {kGroups}), kGroups);
  for (int g = 0; g < kGroups; ++g) {
    if (!(clip[g] > 0.0f && clip[g] <= 1.0f)) {
      node.Fail("activation_clip in (0, 1]", std::to_string(clip[g]), kExportAgain);
    }
    plan_.groups[g].quantization.clip = clip[g];
  }
}

const float* ChannelGroups::Keep(const Tensor& tensor, int64_t count) {
  std::vector<float> copy(static_cast<size_t>(count));
  std::memcpy(copy.data(), tensor.data, copy.size() * sizeof(float));
  floats_.push_back(std::move(copy));
  return floats_.back().data();
}

}  // namespace splitq::ops
