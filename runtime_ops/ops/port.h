// The inputs and outputs an op declares.
#pragma once

#include <string>

#include "ops/ort_api.h"

namespace splitq::ops {

inline constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
inline constexpr auto kFloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
inline constexpr auto kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
inline constexpr auto kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
inline constexpr auto kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
// "Any" to ONNX Runtime: weights are INT4, INT8 or UINT8, which their reader checks.
inline constexpr auto kWeightCodes = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;

struct Port {
  const char* name;
  ONNXTensorElementDataType type;
  bool required;
};

// How errors speak of a node.
struct NodeName {
  const char* op = "";
  std::string node;

  // "<op> node '<name>': expected <expected>, got <got>; <todo>"
  [[noreturn]] void Fail(const std::string& expected, const std::string& got,
                         const std::string& todo) const {
    throw OpError(std::string(op) + " node '" + node + "': expected " + expected + ", got " + got +
                  "; " + todo);
  }
};

}  // namespace splitq::ops
