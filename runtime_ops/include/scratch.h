// Cuts one block of memory into arrays. Run once without memory to learn the size, once with it.
#pragma once

#include <cstdint>

#include "include/sizes.h"

namespace splitq {

class Scratch {
 public:
  static constexpr int64_t kAlign = 64;

  // memory: null to measure, else used() + kAlign of a measuring run bytes, of any alignment.
  explicit Scratch(void* memory = nullptr) : base_(Align(reinterpret_cast<uintptr_t>(memory))) {}

  // The sizes that come in are a small multiple of those of tensors that exist, so sums and
  // products of them cannot overflow 64 bits.
  template <typename T>
  T* Take(int64_t count) {
    const uintptr_t begin = base_ + static_cast<uintptr_t>(used_);
    used_ += RoundUp(count * static_cast<int64_t>(sizeof(T)), kAlign);
    return reinterpret_cast<T*>(begin);
  }

  int64_t used() const { return used_; }

 private:
  static uintptr_t Align(uintptr_t address) { return (address + kAlign - 1) / kAlign * kAlign; }

  uintptr_t base_;
  int64_t used_ = 0;
};

}  // namespace splitq
