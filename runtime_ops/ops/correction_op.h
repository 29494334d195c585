// CrossModalCorrection (docs/ops.md).
#pragma once

#include "ops/correction_input.h"
#include "ops/custom_op.h"

namespace splitq::ops {

class CorrectionKernel {
 public:
  static constexpr char kOp[] = "CrossModalCorrection";
  static constexpr Port kInputs[] = {
      {"main_codes", kInt8, true},      {"main_scale", kFloat, true},
      {"residual_codes", kInt8, false}, {"residual_scale", kFloat, false},
      {"modality", kInt8, false},       {"u", kWeightCodes, true},
      {"u_scale", kFloat, true},        {"v", kWeightCodes, true},
      {"v_scale", kFloat, true},        {"gate_cws", kFloat, false},
      {"gate_mac", kFloat, false},
  };
  static constexpr Port kOutputs[] = {{"correction", kFloat, true}};

  explicit CorrectionKernel(const Node& node);
  void Compute(Call& call) const;
  const NodeName& name() const { return name_; }
  static void InferShapes(const ShapeInference& shapes);

 private:
  NodeName name_;
  CorrectionInput correction_;
  Arena arena_;
};

}  // namespace splitq::ops
