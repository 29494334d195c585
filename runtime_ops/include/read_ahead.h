// Memory to be loaded into the caches while there is arithmetic to do that needs none.
#pragma once

#include <cstdint>

namespace splitq {

struct MemoryRange {
  const void* data;
  int64_t bytes;
};

struct ReadAhead {
  MemoryRange now, then;
};

}  // namespace splitq
