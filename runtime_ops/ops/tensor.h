// A tensor value: type, shape, data.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops/ort_api.h"

namespace splitq::ops {

using Shape = std::vector<int64_t>;

struct Tensor {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  Shape shape;
  const void* data = nullptr;

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

Tensor ReadTensor(const OrtApi& api, const OrtValue* value);
Shape ReadShape(const OrtApi& api, const OrtTensorTypeAndShapeInfo* info);

// Product of all dimensions but the last; 0 if one of them is 0. shape: at least rank 1, and of a
// tensor that exists, so that the product cannot overflow unless a dimension is 0.
int64_t LeadingSize(const Shape& shape);

// The shape with another last dimension.
Shape WithLast(Shape shape, int64_t last);

std::string ToString(const Shape& shape);
std::string ToString(ONNXTensorElementDataType type);

}  // namespace splitq::ops
