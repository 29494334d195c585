#include "quantize/gather.h"

#include <algorithm>

namespace splitq {

std::vector<GatherWindow> GatherWindows(const int32_t* order, int64_t channels) {
  std::vector<GatherWindow> windows;
  const int64_t last = channels - kGatherWindow;  // where a window may begin at the latest
  for (int64_t i = 0; i + kGatherBlock <= channels; i += kGatherBlock) {
    const auto ends = std::minmax_element(order + i, order + i + kGatherBlock);
    int64_t first = std::min<int64_t>(*ends.first, last);
    // from whole registers on, if those hold them: such loads stay within a cache line
    const int64_t whole = first / kGatherBlock * kGatherBlock;
    if (first >= 0 && *ends.second < whole + kGatherWindow) first = whole;
    const bool fits = first >= 0 && *ends.second < first + kGatherWindow;
    GatherWindow window{fits ? static_cast<int32_t>(first) : -1, {}};
    for (int64_t j = 0; fits && j < kGatherBlock; ++j) {
      window.places[j] = static_cast<uint8_t>(order[i + j] - first);
    }
    windows.push_back(window);
  }
  return windows;
}

}  // namespace splitq
