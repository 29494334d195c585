#include "ops/attention_op.h"

#include <algorithm>

#include "include/sizes.h"
#include "quantize/table.h"

namespace splitq::ops {
namespace {

enum { kQkv, kPastKey, kPastValue, kLastKey, kTotal, kCosine, kSine, kPositions, kBias, kNew };

constexpr int64_t kMostHeads = 1 << 12;
constexpr int64_t kMostWidth = 1 << 12;
constexpr char kFeedAgain[] = "correct the tensor that feeds it";

}  // namespace

CachedAttentionBase::CachedAttentionBase(const Node& node, bool half_cache)
    : name_(node.name()), arena_(node.api(), node.info()) {
  attention_.half_cache = half_cache;
  attention_.kv_heads = node.Int("kv_num_heads", 1, kMostHeads);
  attention_.heads = node.Int("num_heads", attention_.kv_heads, kMostHeads);
  attention_.width = node.Int("head_size", 2, kMostWidth);
  attention_.scale = node.Float("scale");
  if (attention_.heads % attention_.kv_heads != 0 || attention_.width % 2 != 0) {
    node.Fail("num_heads a multiple of kv_num_heads and head_size even",
              std::to_string(attention_.heads) + ", " + std::to_string(attention_.kv_heads) +
                  " and " + std::to_string(attention_.width),
              "export the model again");
  }
  attention_.kernels = &FindRowKernels(ChooseIsa().isa);
  attention_.loops = &FindAttentionKernels(ChooseIsa().isa);
}

AttentionData CachedAttentionBase::ReadInputs(const Call& call) const {
  AttentionData data;
  const Tensor qkv = call.Rows(kQkv, attention_.channels());
  if (qkv.shape.size() != 3) {
    name_.Fail("input 'qkv' of shape [batch, tokens, channels]", ToString(qkv.shape), kFeedAgain);
  }
  data.batch = qkv.shape[0];
  data.tokens = qkv.shape[1];
  data.qkv = qkv.as<float>();
  const Tensor total = call.Input(kTotal);
  if (total.shape.size() > 1 || (total.shape.size() == 1 && total.shape[0] != 1)) {
    name_.Fail("input 'total_length' of one number", ToString(total.shape), kFeedAgain);
  }
  data.total = *total.as<int32_t>();
  const Tensor key = call.Input(kPastKey);
  if (key.shape.size() != 4) {
    name_.Fail("input 'past_key' of 4 axes", ToString(key.shape), kFeedAgain);
  }
  data.past_capacity = key.shape[2];
  const Shape past{data.batch, attention_.kv_heads, data.past_capacity, attention_.width};
  data.past_key = call.Input(kPastKey, past).data;
  data.past_value = call.Input(kPastValue, past).data;
  if (data.total < data.tokens || data.total - data.tokens > data.past_capacity) {
    name_.Fail("input 'total_length' from " + std::to_string(data.tokens) + " to " +
                   std::to_string(data.tokens + data.past_capacity),
               std::to_string(data.total), kFeedAgain);
  }
  for (const size_t index : {size_t{kLastKey}, size_t{kNew}}) {
    const int64_t expected = index == kNew ? data.tokens : data.total - 1;
    const Tensor lengths = call.Input(index, {data.batch});
    for (int64_t b = 0; b < data.batch; ++b) {
      const int32_t length = lengths.as<int32_t>()[b];
      if (length == expected) continue;
      name_.Fail("input '" + std::string(CachedAttentionOp<kFloat>::kInputs[index].name) + "' of " +
                     std::to_string(expected) + " in every row, as all have the same tokens",
                 std::to_string(length), kFeedAgain);
    }
  }
  data.positions = call.Input(kPositions, {data.batch, data.tokens}).as<int64_t>();
  const Tensor cosine = call.Input(kCosine);
  const int64_t places = cosine.shape.empty() ? 0 : cosine.shape[0];
  const Shape table{places, attention_.width / 2};
  data.cosine = call.Input(kCosine, table).as<float>();
  data.sine = call.Input(kSine, table).as<float>();
  CheckPositions(data, places);
  const Tensor bias = call.Input(kBias);
  const bool shared = !bias.shape.empty() && bias.shape[0] == 1;
  data.bias = call.Input(kBias, {shared ? 1 : data.batch, 1, data.tokens, data.total}).as<float>();
  data.bias_step = shared ? 0 : data.tokens * data.total;
  return data;
}

void CachedAttentionBase::CheckPositions(const AttentionData& data, int64_t places) const {
  for (int64_t i = 0; i < data.batch * data.tokens; ++i) {
    if (data.positions[i] >= 0 && data.positions[i] < places) continue;
    name_.Fail("input 'position_ids' in [0, " + std::to_string(places) + ")",
               std::to_string(data.positions[i]), "shorten the prompt");
  }
}

void CachedAttentionBase::Compute(Call& call) const {
  AttentionData data = ReadInputs(call);
  data.capacity = std::max(data.past_capacity, data.total);
  const Shape present{data.batch, attention_.kv_heads, data.capacity, attention_.width};
  data.y = call.Output<float>(0, {data.batch, data.tokens, attention_.heads * attention_.width});
  data.present_key = call.Output<void>(1, present);
  data.present_value = call.Output<void>(2, present);
  if (data.batch == 0 || data.tokens == 0) return;
  const bool same_key = data.present_key == data.past_key;
  if (same_key != (data.present_value == data.past_value) ||
      (same_key && data.capacity != data.past_capacity)) {
    name_.Fail("past and present in one buffer for keys and values alike", "for one of them",
               "bind both or neither");
  }
  const ParallelFor parallel = call.Parallel();
  const Arena::Block memory = arena_.Allocate(ScratchBytes(attention_, data, parallel));
  RunAttention(attention_, data, memory.data(), parallel);
}

void CachedAttentionBase::InferShapes(const ShapeInference& shapes) {
  shapes.SetLike(0, kFloat, shapes.Int("num_heads") * shapes.Int("head_size"));
}

}  // namespace splitq::ops
