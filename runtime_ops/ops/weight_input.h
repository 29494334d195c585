// A weight and its scales from the node's initializers, in either form of docs/ops.md.
#pragma once

#include <string>
#include <vector>

#include "linear/weight.h"
#include "ops/node.h"
#include "pack/shared_payload.h"

namespace splitq::ops {

// What the node says about a weight; the initializers must agree.
struct WeightSpec {
  int64_t channels_in = 0;
  int64_t channels_out = 0;
  int bits = 0;
  int64_t block_size = 0;
};

// N of an attribute: bounded so that no size computed from it overflows.
inline constexpr int64_t kMaxChannelsOut = int64_t{1} << 31;

// All weights of a node have one form; it is settled by the first that is read.
enum class WeightForm { kUnknown, kPortable, kPacked };

// Packed codes are used where they lie; portable ones are packed into memory that equal weights of
// other sessions share.
class WeightInput {
 public:
  // input: index of the codes; the scales follow.
  void Read(const Node& node, size_t input, const WeightSpec& spec, WeightForm* form);

  const PackedWeight& weight() const { return weight_; }

 private:
  void ReadPacked(const Node& node, const std::string& name, const Tensor& codes,
                  const WeightSpec& spec);
  void ReadPortable(const Node& node, const std::string& name, const Tensor& codes,
                    const WeightSpec& spec);
  void ReadScale(const Node& node, size_t input, const WeightSpec& spec);

  PackedWeight weight_;
  SharedPayload packed_;
  std::vector<float> scale_;
};

}  // namespace splitq::ops
