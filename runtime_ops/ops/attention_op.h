// CachedAttention (docs/ops.md).
#pragma once

#include "attention/attention.h"
#include "ops/custom_op.h"

namespace splitq::ops {

class CachedAttentionOp {
 public:
  static constexpr char kOp[] = "CachedAttention";
  static constexpr Port kInputs[] = {
      {"qkv", kFloat, true},        {"past_key", kFloat, true},     {"past_value", kFloat, true},
      {"last_key", kInt32, true},   {"total_length", kInt32, true}, {"cosine", kFloat, true},
      {"sine", kFloat, true},       {"position_ids", kInt64, true}, {"bias", kFloat, true},
      {"new_tokens", kInt32, true},
  };
  static constexpr Port kOutputs[] = {
      {"y", kFloat, true}, {"present_key", kFloat, true}, {"present_value", kFloat, true}};

  explicit CachedAttentionOp(const Node& node);
  void Compute(Call& call) const;
  const NodeName& name() const { return name_; }
  static void InferShapes(const ShapeInference& shapes);

 private:
  AttentionData ReadInputs(const Call& call) const;
  void CheckPositions(const AttentionData& data, int64_t places) const;

  NodeName name_;
  Attention attention_;
  Arena arena_;
};

}  // namespace splitq::ops
