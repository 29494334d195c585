// What a kernel may ask about its node when it is created.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/port.h"
#include "ops/tensor.h"

namespace splitq::ops {

class Node {
 public:
  // inputs: `ports` of them
  Node(const OrtApi& api, const OrtKernelInfo* info, const char* op, const Port* inputs,
       size_t ports);

  const OrtApi& api() const { return api_; }
  const OrtKernelInfo* info() const { return info_; }
  const NodeName& name() const { return name_; }
  const char* InputName(size_t index) const { return inputs_[index].name; }

  // Whether the node is given this input, by itself or in the constants.
  bool HasInput(size_t index) const;
  bool HasOutput(size_t index) const;

  // Attributes. Without a fallback the attribute must be there; a value outside [low, high] and an
  // attribute of another type are errors either way.
  int64_t Int(const char* attribute, int64_t low, int64_t high,
              std::optional<int64_t> fallback = std::nullopt) const;
  int BitWidth(const char* attribute, std::optional<int64_t> fallback = std::nullopt) const;
  // A finite number.
  float Float(const char* attribute) const;
  std::vector<int64_t> Ints(const char* attribute) const;
  std::string String(const char* attribute, const char* fallback) const;

  // A constant initializer of this shape and of the port's type, which is not kWeightCodes.
  Tensor Constant(size_t index, const Shape& shape) const;
  // A constant initializer, unchecked.
  Tensor AnyConstant(size_t index) const;
  // Shape of a constant that should be a square matrix; only in the constants it is known to be
  // one.
  Shape SquareShape(size_t index) const;
  // Likewise of a matrix of so many rows, rows > 0.
  Shape MatrixShape(size_t index, int64_t rows) const;
  // A constant vector of int32.
  std::vector<int32_t> IntConstant(size_t index, int64_t size) const;

  // Error unless the input is there or absent, as `needed` says. why: "K_t is 8", for instance.
  void CheckPresence(size_t index, bool needed, const std::string& why) const;

  [[noreturn]] void Fail(const std::string& expected, const std::string& got,
                         const std::string& todo) const {
    name_.Fail(expected, got, todo);
  }

 private:
  // An input that lies in the input `constants` (docs/ops.md); null data: it does not.
  struct Joined {
    const void* data = nullptr;  // floats, not necessarily aligned
    int64_t size = 0;
  };

  bool HasOwnInput(size_t index) const;
  bool HasAttributeOfOtherType(const char* attribute) const;
  void ReadJoined(size_t ports);
  const Joined* FindJoined(size_t index) const;

  const OrtApi& api_;
  const OrtKernelInfo* info_;
  const Port* inputs_;
  NodeName name_;
  std::vector<Joined> joined_;  // by input; empty without `constants`
  size_t input_count_ = 0;
  size_t output_count_ = 0;
};

}  // namespace splitq::ops
