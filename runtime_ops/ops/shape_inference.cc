#include "ops/shape_inference.h"

namespace splitq::ops {
namespace {

void ReadAttribute(const OrtApi& api, OrtShapeInferContext* context, const char* attribute,
                   OrtOpAttrType type, std::vector<int64_t>* values) {
  const OrtOpAttr* handle = nullptr;
  Check(api, api.ShapeInferContext_GetAttribute(context, attribute, &handle));
  size_t bytes = values->size() * sizeof(int64_t);
  const size_t expected = bytes;
  Check(api, api.ReadOpAttr(handle, type, values->data(), bytes, &bytes));
  if (bytes != expected) throw OpError(std::string("attribute ") + attribute);
}

}  // namespace

int64_t ShapeInference::Int(const char* attribute) const {
  std::vector<int64_t> values(1);
  ReadAttribute(api_, context_, attribute, ORT_OP_ATTR_INT, &values);
  return values[0];
}

std::vector<int64_t> ShapeInference::Ints(const char* attribute, size_t count) const {
  std::vector<int64_t> values(count);
  ReadAttribute(api_, context_, attribute, ORT_OP_ATTR_INTS, &values);
  return values;
}

void ShapeInference::SetLike(size_t index, ONNXTensorElementDataType type, int64_t last) const {
  OrtTensorTypeAndShapeInfo* input = nullptr;  // the context's own
  Check(api_, api_.ShapeInferContext_GetInputTypeShape(context_, 0, &input));
  Shape shape = ReadShape(api_, input);
  if (shape.size() < 2) return;
  std::vector<const char*> names(shape.size());
  Check(api_, api_.GetSymbolicDimensions(input, names.data(), names.size()));
  shape.back() = last;
  names.back() = "";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (names[i] == nullptr) names[i] = "";
    if (shape[i] < 0 && names[i][0] == '\0') return;
  }
  OrtTensorTypeAndShapeInfo* output = nullptr;
  Check(api_, api_.CreateTensorTypeAndShapeInfo(&output));
  const ShapeInfo owned_output = Own(api_, output);
  Check(api_, api_.SetTensorElementType(output, type));
  Check(api_, api_.SetDimensions(output, shape.data(), shape.size()));
  Check(api_, api_.SetSymbolicDimensions(output, names.data(), names.size()));
  Check(api_, api_.ShapeInferContext_SetOutputTypeShape(context_, index, output));
}

}  // namespace splitq::ops
