// Output shapes before the run: leading axes of the first input, another last axis.
#pragma once

#include <vector>

#include "ops/tensor.h"

namespace splitq::ops {

class ShapeInference {
 public:
  ShapeInference(const OrtApi& api, OrtShapeInferContext* context) : api_(api), context_(context) {}

  // Throws if the attribute is missing.
  int64_t Int(const char* attribute) const;
  std::vector<int64_t> Ints(const char* attribute, size_t count) const;

  // Output `index`, which the node must have (runtimes do not check), is the shape of input 0 with
  // the last axis replaced; left unknown if the rank of input 0 or one of its leading axes has
  // neither a value nor a name.
  void SetLike(size_t index, ONNXTensorElementDataType type, int64_t last) const;

 private:
  const OrtApi& api_;
  OrtShapeInferContext* context_;
};

}  // namespace splitq::ops
