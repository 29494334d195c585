#include "quantize/rows.h"

#include <algorithm>

#include "quantize/round.h"

namespace splitq {
namespace {

constexpr float kScaleFloor = 1e-12f;  // keeps the inverse scale of an all-zero row finite

struct Scaling {
  float scale;
  Encoding encoding;
};

Scaling Symmetric(const Extremes& extremes, int bits, float clip) {
  const float top = static_cast<float>((1 << (bits - 1)) - 1);
  const float largest = std::max(extremes.high, -extremes.low);
  const float scale = std::max(largest * clip / top, kScaleFloor);
  return {scale, {1.0f / scale, -top - 1.0f, top}};
}

Scaling Asymmetric(const Extremes& extremes, int bits, float clip) {
  const float top = static_cast<float>((1 << bits) - 1);
  const float high = extremes.high * clip;
  const float low = extremes.low * clip;
  const float scale = std::max((high - low) / top, kScaleFloor);
  const float inverse = 1.0f / scale;
  const float zero = Round(Clamp(-low * inverse, 0.0f, top));
  // clamp(round(v) + zero, 0, top) - zero, with the zero point moved into the bounds
  return {scale, {inverse, -zero, top - zero}};
}

Scaling ScalingOf(const RowQuantization& how, const Extremes& extremes) {
  return how.symmetric ? Symmetric(extremes, how.bits, how.clip)
                       : Asymmetric(extremes, how.bits, how.clip);
}

void Store(float scale, int32_t sum, const CodeTarget& target) {
  *target.scale = scale;
  if (target.sum != nullptr) *target.sum = sum;
}

void Quantize(const RowKernels& kernels, const Scaling& scaling, const float* values, int64_t width,
              const CodeTarget& target) {
  Store(scaling.scale, kernels.encode(values, width, scaling.encoding, target.codes), target);
}

}  // namespace

void QuantizeRowValues(const RowKernels& kernels, const RowQuantization& how, const float* values,
                       int64_t width, const CodeTarget& target) {
  Quantize(kernels, ScalingOf(how, kernels.find_extremes(values, width)), values, width, target);
}

void QuantizeWithResidual(const RowKernels& kernels, const RowQuantization& how, int residual_bits,
                          const float* values, int64_t width, float* rest, const CodeTarget& target,
                          const CodeTarget& residual) {
  const Scaling scaling = ScalingOf(how, kernels.find_extremes(values, width));
  const Encoded encoded =
      kernels.encode_with_rest(values, width, scaling.encoding, scaling.scale, target.codes, rest);
  Store(scaling.scale, encoded.sum, target);
  Quantize(kernels, ScalingOf({residual_bits}, encoded.rest), rest, width, residual);
}

}  // namespace splitq
