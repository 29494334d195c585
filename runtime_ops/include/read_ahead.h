// Memory to be loaded into the caches while there is arithmetic to do that needs none.
#pragma once

#include <cstdint>

namespace splitq {

struct ReadAhead {
  static constexpr int64_t kLine = 64;  // bytes that are asked for at once

  const char* next = nullptr;
  const char* end = nullptr;
  const char* then = nullptr;  // what follows
  const char* then_end = nullptr;
};

}  // namespace splitq
