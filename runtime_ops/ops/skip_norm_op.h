// SkipRMSNorm (docs/ops.md).
#pragma once

#include "norm/skip_norm.h"
#include "ops/custom_op.h"

namespace splitq::ops {

class SkipNormOp {
 public:
  static constexpr char kOp[] = "SkipRMSNorm";
  static constexpr Port kInputs[] = {
      {"x", kFloat, true}, {"skip", kFloat, true}, {"weight", kFloat, true}};
  static constexpr Port kOutputs[] = {{"y", kFloat, true}, {"sum", kFloat, true}};

  explicit SkipNormOp(const Node& node);
  void Compute(Call& call) const;
  const NodeName& name() const { return name_; }
  static void InferShapes(const ShapeInference& shapes);

 private:
  NodeName name_;
  int64_t width_;  // N
  float epsilon_;
  const SkipNormKernel& kernel_;
};

}  // namespace splitq::ops
