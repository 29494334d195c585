// The inputs and attributes that SplitQLinear and ChannelSplitQuantize share: channel order and
// scale, Kronecker factors, clip factors, activation bits.
#pragma once

#include <vector>

#include "linear/activation.h"
#include "ops/node.h"

namespace splitq::ops {

inline constexpr const char* kGroupNames[kGroups] = {"K_m", "K_t", "K_v"};

class ChannelGroups {
 public:
  // first_input: index of channel_order; the scale, six factors and the clip follow it.
  ChannelGroups(const Node& node, size_t first_input);
  ChannelGroups(const ChannelGroups&) = delete;
  ChannelGroups& operator=(const ChannelGroups&) = delete;

  const ActivationPlan& plan() const { return plan_; }
  int64_t width(int group) const { return plan_.groups[group].width; }

 private:
  void ReadWidths(const Node& node);
  void ReadBits(const Node& node);
  void ReadOrder(const Node& node, size_t input);
  void ReadFactors(const Node& node, size_t input, int group);
  void ReadClip(const Node& node, size_t input);
  const float* Keep(const Tensor& tensor, int64_t count);

  ActivationPlan plan_;
  std::vector<int32_t> order_;
  std::vector<GatherWindow> windows_;
  std::vector<std::vector<float>> floats_;  // copies: a mapped file may not align its tensors
};

}  // namespace splitq::ops
