// SplitQLinear (docs/ops.md).
#pragma once

#include <vector>

#include "linear/split_linear.h"
#include "ops/channel_groups.h"
#include "ops/correction_input.h"
#include "ops/custom_op.h"

namespace splitq::ops {

class SplitLinearKernel {
 public:
  static constexpr char kOp[] = "SplitQLinear";
  static constexpr Port kInputs[] = {
      {"x", kFloat, true},
      {"modality", kInt8, false},
      {"channel_order", kInt32, false},
      {"channel_scale", kFloat, false},
      {"p1_main", kFloat, false},
      {"p2_main", kFloat, false},
      {"p1_text", kFloat, false},
      {"p2_text", kFloat, false},
      {"p1_vision", kFloat, false},
      {"p2_vision", kFloat, false},
      {"activation_clip", kFloat, false},
      {"weight_main", kWeightCodes, true},
      {"scale_main", kFloat, false},
      {"weight_text", kWeightCodes, false},
      {"scale_text", kFloat, false},
      {"weight_vision", kWeightCodes, false},
      {"scale_vision", kFloat, false},
      {"u", kWeightCodes, false},
      {"u_scale", kFloat, false},
      {"v", kWeightCodes, false},
      {"v_scale", kFloat, false},
      {"gate_cws", kFloat, false},
      {"gate_mac", kFloat, false},
      {"bias", kFloat, false},
      {"constants", kFloat, false},
  };
  static constexpr Port kOutputs[] = {{"y", kFloat, true}};

  explicit SplitLinearKernel(const Node& node);
  void Compute(Call& call) const;
  const NodeName& name() const { return name_; }
  static void InferShapes(const ShapeInference& shapes);

 private:
  void ReadWeights(const Node& node, int64_t outputs);
  void ReadBias(const Node& node, int64_t outputs);

  NodeName name_;
  ChannelGroups groups_;
  CorrectionInput correction_;
  WeightInput weights_[kGroups];
  std::vector<float> bias_;
  SplitLinear layer_;
  Arena arena_;
};

}  // namespace splitq::ops
