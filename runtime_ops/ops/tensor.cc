#include "ops/tensor.h"

#include <algorithm>

namespace splitq::ops {

Shape ReadShape(const OrtApi& api, const OrtTensorTypeAndShapeInfo* info) {
  size_t rank = 0;
  Check(api, api.GetDimensionsCount(info, &rank));
  Shape shape(rank);
  Check(api, api.GetDimensions(info, shape.data(), rank));
  return shape;
}

Tensor ReadTensor(const OrtApi& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(api, api.GetTensorTypeAndShape(value, &info));
  const ShapeInfo owned = Own(api, info);
  Tensor tensor;
  Check(api, api.GetTensorElementType(info, &tensor.type));
  tensor.shape = ReadShape(api, info);
  void* data = nullptr;
  // The API has no read-only accessor at this version; nothing here writes through it.
  Check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

int64_t LeadingSize(const Shape& shape) {
  if (std::find(shape.begin(), shape.end() - 1, 0) != shape.end() - 1) return 0;
  int64_t size = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) size *= shape[i];
  return size;
}

Shape WithLast(Shape shape, int64_t last) {
  shape.back() = last;
  return shape;
}

std::string ToString(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  }
  return text + "]";
}

std::string ToString(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
      return "UINT8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      return "INT8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4:
      return "INT4";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return "INT32";
    default:
      return "ONNX element type " + std::to_string(static_cast<int>(type));
  }
}

}  // namespace splitq::ops
