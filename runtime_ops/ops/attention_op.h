// CachedAttention (docs/ops.md).
#pragma once

#include "attention/attention.h"
#include "ops/custom_op.h"

namespace splitq::ops {

// What does not depend on the type of the cache.
class CachedAttentionBase {
 public:
  static constexpr char kOp[] = "CachedAttention";

  void Compute(Call& call) const;
  const NodeName& name() const { return name_; }
  static void InferShapes(const ShapeInference& shapes);

 protected:
  CachedAttentionBase(const Node& node, bool half_cache);

 private:
  AttentionData ReadInputs(const Call& call) const;
  void CheckPositions(const AttentionData& data, int64_t places) const;

  NodeName name_;
  Attention attention_;
  Arena arena_;
};

// Two ops of one name, of which ONNX Runtime takes the one whose types a node has.
template <ONNXTensorElementDataType cache>
class CachedAttentionOp : public CachedAttentionBase {
 public:
  static constexpr Port kInputs[] = {
      {"qkv", kFloat, true},        {"past_key", cache, true},      {"past_value", cache, true},
      {"last_key", kInt32, true},   {"total_length", kInt32, true}, {"cosine", kFloat, true},
      {"sine", kFloat, true},       {"position_ids", kInt64, true}, {"bias", kFloat, true},
      {"new_tokens", kInt32, true},
  };
  static constexpr Port kOutputs[] = {
      {"y", kFloat, true}, {"present_key", cache, true}, {"present_value", cache, true}};

  explicit CachedAttentionOp(const Node& node) : CachedAttentionBase(node, cache == kFloat16) {}
};

}  // namespace splitq::ops
