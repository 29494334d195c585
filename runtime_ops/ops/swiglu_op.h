// SwiGLU (docs/ops.md).
#pragma once

#include "gate/swiglu.h"
#include "ops/custom_op.h"

namespace splitq::ops {

class SwiGluOp {
 public:
  static constexpr char kOp[] = "SwiGLU";
  static constexpr Port kInputs[] = {{"x", kFloat, true}};
  static constexpr Port kOutputs[] = {{"y", kFloat, true}};

  explicit SwiGluOp(const Node& node);
  void Compute(Call& call) const;
  const NodeName& name() const { return name_; }
  static void InferShapes(const ShapeInference& shapes);

 private:
  NodeName name_;
  int64_t width_;  // N
  const SwiGluKernel& kernel_;
};

}  // namespace splitq::ops
