// The library is compiled with -ffp-contract=off: a fused multiply-add in the residual would round
// once where the contract rounds twice, and codes would differ between processors.
#include <algorithm>

#include "quantize/round.h"
#include "quantize/scalar.h"

namespace splitq {
namespace {

constexpr int kLanes = 8;  // independent extremes: compilers may not reorder a float reduction

void Include(float value, float& low, float& high) {
  low = value < low ? value : low;
  high = value > high ? value : high;
}

// ordered, scaled: whether there is an order, a scale.
template <bool ordered, bool scaled>
void Gather(const ChannelGather& gather, const float* __restrict x, int64_t begin, int64_t count,
            float* __restrict out) {
  const int32_t* __restrict order = ordered ? gather.order + begin : nullptr;
  const float* __restrict scale = scaled ? gather.scale + begin : nullptr;
  for (int64_t i = 0; i < count; ++i) {
    const float value = x[ordered ? order[i] : begin + i];
    out[i] = scaled ? value * scale[i] : value;
  }
}

}  // namespace

void GatherScalar(const ChannelGather& gather, const float* x, int64_t begin, int64_t count,
                  float* out) {
  const bool ordered = gather.order != nullptr, scaled = gather.scale != nullptr;
  const auto run = ordered ? (scaled ? Gather<true, true> : Gather<true, false>)
                           : (scaled ? Gather<false, true> : Gather<false, false>);
  run(gather, x, begin, count, out);
}

Extremes FindExtremesScalar(const float* values, int64_t width) {
  float low[kLanes] = {}, high[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) Include(values[i + lane], low[lane], high[lane]);
  }
  for (; i < width; ++i) Include(values[i], low[0], high[0]);
  return {*std::min_element(low, low + kLanes), *std::max_element(high, high + kLanes)};
}

// The bounds are integers, so clamping first gives the same code and bounds what is rounded and
// converted.
void EncodeScalar(const float* __restrict values, int64_t width, Encoding encoding,
                  int8_t* __restrict codes) {
  const float inverse = encoding.inverse, low = encoding.low, high = encoding.high;
  for (int64_t i = 0; i < width; ++i) {
    const float rounded = Round(Clamp(values[i] * inverse, low, high));
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(rounded));
  }
}

int32_t SumCodesScalar(const int8_t* codes, int64_t width) {
  int32_t sum = 0;
  for (int64_t i = 0; i < width; ++i) sum += codes[i];
  return sum;
}

void SubtractCodesScalar(const float* __restrict values, const int8_t* __restrict codes,
                         float scale, int64_t width, float* __restrict out) {
  for (int64_t i = 0; i < width; ++i) {
    const float quantized = static_cast<float>(codes[i]) * scale;
    out[i] = values[i] - quantized;
  }
}

}  // namespace splitq
