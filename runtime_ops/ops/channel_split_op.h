// ChannelSplitQuantize (docs/ops.md).
#pragma once

#include "ops/channel_groups.h"
#include "ops/custom_op.h"

namespace splitq::ops {

class ChannelSplitKernel {
 public:
  static constexpr char kOp[] = "ChannelSplitQuantize";
  static constexpr Port kInputs[] = {
      {"x", kFloat, true},
      {"channel_order", kInt32, false},
      {"channel_scale", kFloat, false},
      {"p1_main", kFloat, false},
      {"p2_main", kFloat, false},
      {"p1_text", kFloat, false},
      {"p2_text", kFloat, false},
      {"p1_vision", kFloat, false},
      {"p2_vision", kFloat, false},
      {"activation_clip", kFloat, false},
  };
  static constexpr Port kOutputs[] = {
      {"main_codes", kInt8, true},      {"main_scale", kFloat, true},
      {"text_codes", kInt8, false},     {"text_scale", kFloat, false},
      {"vision_codes", kInt8, false},   {"vision_scale", kFloat, false},
      {"residual_codes", kInt8, false}, {"residual_scale", kFloat, false},
  };

  explicit ChannelSplitKernel(const Node& node);
  void Compute(Call& call) const;
  const NodeName& name() const { return name_; }
  static void InferShapes(const ShapeInference& shapes);

 private:
  NodeName name_;
  ChannelGroups groups_;
  bool wanted_[kGroups + 1] = {};  // main, text, vision, residual
  Arena arena_;
};

}  // namespace splitq::ops
