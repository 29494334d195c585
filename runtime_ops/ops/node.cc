#include "ops/node.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "include/sizes.h"
#include "pack/layout.h"

namespace splitq::ops {
namespace {

constexpr char kExportAgain[] = "export the model again";
constexpr int64_t kJoinedMultiple = 16;  // numbers; where each array in the constants begins
constexpr float kLargestWhole = 16777216.0f;

std::string Quoted(const char* name) { return "'" + std::string(name) + "'"; }

}  // namespace

Node::Node(const OrtApi& api, const OrtKernelInfo* info, const char* op, const Port* inputs,
           size_t ports)
    : api_(api), info_(info), inputs_(inputs) {
  name_.op = op;
  name_.node = ReadString(
      api, [&](char* out, size_t* size) { return api.KernelInfo_GetNodeName(info, out, size); });
  Check(api, api.KernelInfo_GetInputCount(info, &input_count_));
  Check(api, api.KernelInfo_GetOutputCount(info, &output_count_));
  const bool last_is_constants = std::strcmp(inputs[ports - 1].name, "constants") == 0;
  if (last_is_constants && HasOwnInput(ports - 1)) ReadJoined(ports);
}

void Node::ReadJoined(size_t ports) {
  const size_t place = ports - 1;
  const std::vector<int64_t> sizes = Ints("constant_sizes");
  if (sizes.size() != place) {
    Fail("attribute 'constant_sizes' of " + std::to_string(place) + " numbers",
         std::to_string(sizes.size()), kExportAgain);
  }
  const Tensor tensor = AnyConstant(place);
  if (tensor.type != kFloat || tensor.shape.size() != 1) {
    Fail("input 'constants' of type " + ToString(kFloat) + " and one axis",
         ToString(tensor.type) + " " + ToString(tensor.shape), kExportAgain);
  }
  const int64_t numbers = tensor.shape[0];
  std::vector<Joined> joined(place);
  int64_t start = 0;
  for (size_t i = 0; i < place; ++i) {
    if (sizes[i] == 0) continue;
    const bool allowed = inputs_[i].type == kInt32 || (inputs_[i].type == kFloat && i > 0);
    const bool fits = sizes[i] > 0 && sizes[i] <= numbers - start;
    if (!allowed || !fits || HasOwnInput(i)) {
      Fail("attribute 'constant_sizes' with what input 'constants' of " + std::to_string(numbers) +
               " numbers can hold and no input has of its own",
           std::to_string(sizes[i]) + " for " + Quoted(InputName(i)), kExportAgain);
    }
    joined[i] = {tensor.as<char>() + start * static_cast<int64_t>(sizeof(float)), sizes[i]};
    start = std::min(numbers, CeilDiv(start + sizes[i], kJoinedMultiple) * kJoinedMultiple);
  }
  joined_ = std::move(joined);
}

const Node::Joined* Node::FindJoined(size_t index) const {
  return index < joined_.size() && joined_[index].data != nullptr ? &joined_[index] : nullptr;
}

bool Node::HasInput(size_t index) const {
  return FindJoined(index) != nullptr || HasOwnInput(index);
}

// Omitted inputs and outputs in the middle of the list have an empty name.
bool Node::HasOwnInput(size_t index) const {
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
    Fail("attribute " + Quoted(attribute) + " out of 2, 3, 4, 6, 8", std::to_string(bits),
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

std::vector<int32_t> Node::IntConstant(size_t index, int64_t size) const {
  std::vector<int32_t> values(static_cast<size_t>(size));
  const Joined* joined = FindJoined(index);
  if (joined == nullptr) {
    const Tensor tensor = Constant(index, {size});
    std::memcpy(values.data(), tensor.data, values.size() * sizeof(int32_t));
    return values;
  }
  if (joined->size != size) {
    Fail(std::to_string(size) + " numbers of " + Quoted(InputName(index)) + " in the constants",
         std::to_string(joined->size), kExportAgain);
  }
  for (size_t i = 0; i < values.size(); ++i) {
    float value;
    std::memcpy(&value, static_cast<const char*>(joined->data) + i * sizeof(value), sizeof(value));
    const bool whole = std::fabs(value) <= kLargestWhole && value == std::nearbyint(value);
    values[i] = whole ? static_cast<int32_t>(value) : -1;  // no channel, for the caller to refuse
  }
  return values;
}

Shape Node::SquareShape(size_t index) const {
  const Joined* joined = FindJoined(index);
  if (joined == nullptr) return AnyConstant(index).shape;
  const auto side = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(joined->size))));
  if (side * side != joined->size) {
    Fail("a square number of " + Quoted(InputName(index)) + " in the constants",
         std::to_string(joined->size), kExportAgain);
  }
  return {side, side};
}

Shape Node::MatrixShape(size_t index, int64_t rows) const {
  const Joined* joined = FindJoined(index);
  if (joined == nullptr) return AnyConstant(index).shape;
  if (joined->size % rows != 0) {
    Fail(std::to_string(rows) + " rows of " + Quoted(InputName(index)) + " in the constants",
         std::to_string(joined->size) + " numbers", kExportAgain);
  }
  return {rows, joined->size / rows};
}

Tensor Node::Constant(size_t index, const Shape& shape) const {
  if (const Joined* joined = FindJoined(index)) {
    int64_t size = 1;
    for (const int64_t axis : shape) size *= axis;
    if (size != joined->size) {
      Fail(std::to_string(size) + " numbers of " + Quoted(InputName(index)) + " in the constants",
           std::to_string(joined->size), kExportAgain);
    }
    return {kFloat, shape, joined->data};
  }
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
