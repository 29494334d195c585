// A constant array that knows its length.
#pragma once

#include <cstddef>

namespace splitq {

template <typename T>
struct List {
  const T* first;
  size_t count;

  const T* begin() const { return first; }
  const T* end() const { return first + count; }
};

}  // namespace splitq
