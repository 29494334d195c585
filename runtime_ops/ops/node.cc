#include "ops/node.h"

#include <cmath>

#include "pack/layout.h"

namespace splitq::ops {
namespace {

constexpr char kExportAgain[] = "export the model again";

std::string Quoted(const char* name) { return "'" + std::string(name) + "'"; }

}  // namespace

Node::Node(const OrtApi& api, const OrtKernelInfo* info, const char* op, const Port* inputs)
    : api_(api), info_(info), inputs_(inputs) {
  name_.op = op;
  name_.node = ReadString(
      api, [&](char* out, size_t* size) { return api.KernelInfo_GetNodeName(info, out, size); });
  Check(api, api.KernelInfo_GetInputCount(info, &input_count_));
  Check(api, api.KernelInfo_GetOutputCount(info, &output_count_));
}

// Omitted inputs and outputs in the middle of the list have an empty name.
bool Node::HasInput(size_t index) const {
  return index < input_count_ &&
         !ReadString(
              api_,
              [&](char* out, size_t* size) {
                return api_.KernelInfo_GetInputName(info_, index, out, size);
              })
              .empty();
}

bool Node::HasOutput(size_t index) const {
  return index < output_count_ &&
         !ReadString(
              api_,
              [&](char* out, size_t* size) {
                return api_.KernelInfo_GetOutputName(info_, index, out, size);
              })
              .empty();
}

// The API reports a missing attribute and one of another type alike; a default must not stand in
// for the second.
bool Node::HasAttributeOfOtherType(const char* attribute) const {
  size_t size = 0;
  int64_t integer = 0;
  float real = 0;
  return Succeeded(api_, api_.KernelInfoGetAttribute_int64(info_, attribute, &integer)) ||
         Succeeded(api_, api_.KernelInfoGetAttribute_float(info_, attribute, &real)) ||
         Succeeded(api_, api_.KernelInfoGetAttribute_string(info_, attribute, nullptr, &size)) ||
         Succeeded(api_,
                   api_.KernelInfoGetAttributeArray_int64(info_, attribute, nullptr, &size)) ||
         Succeeded(api_, api_.KernelInfoGetAttributeArray_float(info_, attribute, nullptr, &size));
}

int64_t Node::Int(const char* attribute, int64_t low, int64_t high,
                  std::optional<int64_t> fallback) const {
  const std::string expected = "int attribute " + Quoted(attribute) + " in [" +
                               std::to_string(low) + ", " + std::to_string(high) + "]";
  int64_t value = 0;
  if (!Succeeded(api_, api_.KernelInfoGetAttribute_int64(info_, attribute, &value))) {
    if (HasAttributeOfOtherType(attribute)) Fail(expected, "another type", kExportAgain);
    if (!fallback) Fail(expected, "none", kExportAgain);
    value = *fallback;
  }
  if (value < low || value > high) Fail(expected, std::to_string(value), kExportAgain);
  return value;
}

int Node::BitWidth(const char* attribute, std::optional<int64_t> fallback) const {
  const int64_t bits = Int(attribute, 2, 8, fallback);
  if (!IsBitWidth(bits)) {
    Fail("attribute " + Quoted(attribute) + " out of 2, 3, 4, 8", std::to_string(bits),
         kExportAgain);
  }
  return static_cast<int>(bits);
}

float Node::Float(const char* attribute) const {
  float value = 0;
  if (!Succeeded(api_, api_.KernelInfoGetAttribute_float(info_, attribute, &value))) {
    Fail("float attribute " + Quoted(attribute), "none or another type", kExportAgain);
  }
  if (!std::isfinite(value)) {
    Fail("finite attribute " + Quoted(attribute), std::to_string(value), kExportAgain);
  }
  return value;
}

std::vector<int64_t> Node::Ints(const char* attribute) const {
  size_t size = 0;
  std::vector<int64_t> values;
  if (!Succeeded(api_, api_.KernelInfoGetAttributeArray_int64(info_, attribute, nullptr, &size))) {
    Fail("ints attribute " + Quoted(attribute), "none or another type", kExportAgain);
  }
  values.resize(size);
  Check(api_, api_.KernelInfoGetAttributeArray_int64(info_, attribute, values.data(), &size));
  return values;
}

std::string Node::String(const char* attribute, const char* fallback) const {
  size_t size = 0;
  if (!Succeeded(api_, api_.KernelInfoGetAttribute_string(info_, attribute, nullptr, &size))) {
    if (HasAttributeOfOtherType(attribute)) {
      Fail("string attribute " + Quoted(attribute), "another type", kExportAgain);
    }
    return fallback;
  }
  return ReadString(api_, [&](char* out, size_t* length) {
    return api_.KernelInfoGetAttribute_string(info_, attribute, out, length);
  });
}

Tensor Node::AnyConstant(size_t index) const {
  const std::string input = "input " + Quoted(InputName(index));
  if (!HasInput(index)) Fail(input, "none", kExportAgain);
  int is_constant = 0;
  const OrtValue* value = nullptr;
  Check(api_, api_.KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
  if (is_constant == 0 || value == nullptr) {
    Fail(input + " to be a constant initializer", "a computed tensor or a graph input",
         "store it as an initializer, or run without the native library");
  }
  return ReadTensor(api_, value);
}

Tensor Node::Constant(size_t index, const Shape& shape) const {
  Tensor tensor = AnyConstant(index);
  const ONNXTensorElementDataType type = inputs_[index].type;
  if (tensor.type != type || tensor.shape != shape) {
    Fail("input " + Quoted(InputName(index)) + " of type " + ToString(type) + " and shape " +
             ToString(shape),
         ToString(tensor.type) + " " + ToString(tensor.shape), kExportAgain);
  }
  return tensor;
}

void Node::CheckPresence(size_t index, bool needed, const std::string& why) const {
  const bool present = HasInput(index);
  if (present == needed) return;
  const std::string input = "input " + Quoted(InputName(index));
  if (needed) Fail(input + " because " + why, "none", "add the input or correct the attributes");
  Fail("no " + input + " because " + why, "one", "omit the input or correct the attributes");
}

}  // namespace splitq::ops
