#include "ops/split_linear_op.h"

#include <cstring>

namespace splitq::ops {
namespace {

enum Input : size_t { kX = 0, kModality = 1, kOrder = 2, kWeightMain = 11, kU = 17, kBias = 23 };

constexpr int64_t kMaxBlockSize = int64_t{1} << 30;

int64_t BlockSize(const Node& node) {
  const int64_t block_size = node.Int("block_size", 0, kMaxBlockSize, 0);
  if (block_size % 16 != 0) {
    node.Fail("attribute 'block_size' 0 or a multiple of 16", std::to_string(block_size),
              "export the model again");
  }
  return block_size;
}

}  // namespace

SplitLinearKernel::SplitLinearKernel(const Node& node)
    : name_(node.name()),
      groups_(node, kOrder),
      correction_(node),
      arena_(node.api(), node.info()) {
  const int64_t outputs = node.Int("N", 1, kMaxChannelsOut);
  ReadWeights(node, outputs);
  ReadBias(node, outputs);
  layer_.activation = groups_.plan();
  if (correction_.needs_modality()) {
    node.CheckPresence(kModality, true, "mac_rows is \"text\" and mac_rank is above 0");
  }
}

void SplitLinearKernel::ReadWeights(const Node& node, int64_t outputs) {
  const int main_bits = node.BitWidth("bits");
  const int outlier_bits = node.BitWidth("outlier_bits", 4);
  const int correction_bits = node.BitWidth("correction_bits", 4);
  const int64_t block_size = BlockSize(node);
  WeightForm form = WeightForm::kUnknown;
  for (int g = 0; g < kGroups; ++g) {
    const size_t input = kWeightMain + 2 * static_cast<size_t>(g);
    const int64_t width = groups_.width(g);
    const std::string why = std::string(kGroupNames[g]) + " is " + std::to_string(width);
    node.CheckPresence(input, width > 0, why);
    node.CheckPresence(input + 1, width > 0, why);
    if (width == 0) continue;
    const bool main = g == kMain;
    weights_[g].Read(node, input,
                     {width, outputs, main ? main_bits : outlier_bits, main ? block_size : 0},
                     &form);
    layer_.weights[g] = weights_[g].weight();
  }
  correction_.Read(node, kU, groups_.width(kMain), outputs, correction_bits, &form);
  layer_.corrected = correction_.present();
  layer_.correction = correction_.correction();
}

void SplitLinearKernel::ReadBias(const Node& node, int64_t outputs) {
  if (!node.HasInput(kBias)) return;
  const Tensor bias = node.Constant(kBias, {outputs});
  bias_.resize(static_cast<size_t>(outputs));
  std::memcpy(bias_.data(), bias.data, bias_.size() * sizeof(float));
  layer_.bias = bias_.data();
}

void SplitLinearKernel::Compute(Call& call) const {
  const Tensor x = call.Rows(kX, layer_.activation.gather.channels);
  SplitLinearRows data;
  data.x = x.as<float>();
  data.rows = LeadingSize(x.shape);
  if (correction_.needs_modality()) {
    const Shape tokens(x.shape.begin(), x.shape.end() - 1);
    data.modality = call.Input(kModality, tokens).as<int8_t>();
  }
  data.y = call.Output<float>(0, WithLast(x.shape, layer_.channels_out()));
  if (data.rows == 0) return;
  const Arena::Block scratch = arena_.Allocate(ScratchBytes(layer_, data.rows));
  RunSplitLinear(layer_, data, scratch.data(), call.Parallel());
}

void SplitLinearKernel::InferShapes(const ShapeInference& shapes) {
  shapes.SetLike(0, kFloat, shapes.Int("N"));
}

}  // namespace splitq::ops
