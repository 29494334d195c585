// What the tests share: memory whose end is the end of what may be touched, and counting.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

namespace splitq::test {

// An array that ends `gap` bytes before a page that must not be touched. The rest of the memory
// around it holds a pattern; Intact() tells whether it still does.
template <typename T>
class GuardedArray {
 public:
  explicit GuardedArray(int64_t count, int64_t gap = 0) : count_(count), gap_(gap) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T)) + gap;
    usable_ = (bytes + page - 1) / page * page + page;
    memory_ = static_cast<uint8_t*>(
        mmap(nullptr, usable_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_ + usable_, page, PROT_NONE) != 0) std::abort();
    std::memset(memory_, kPattern, usable_);
    mapped_ = usable_ + page;
  }
  ~GuardedArray() { munmap(memory_, mapped_); }
  GuardedArray(const GuardedArray&) = delete;
  GuardedArray& operator=(const GuardedArray&) = delete;

  T* data() { return reinterpret_cast<T*>(memory_ + begin()); }
  T& operator[](int64_t i) { return data()[i]; }

  bool Intact() const { return Holds(0, begin()) && Holds(usable_ - gap_, usable_); }

 private:
  static constexpr uint8_t kPattern = 0xA5;
  int64_t begin() const { return usable_ - gap_ - count_ * static_cast<int64_t>(sizeof(T)); }

  // Whether bytes [first, last) are all the pattern: the first is, and each equals the next.
  bool Holds(int64_t first, int64_t last) const {
    if (first == last) return true;
    const uint8_t* bytes = memory_ + first;
    return *bytes == kPattern && std::memcmp(bytes, bytes + 1, last - first - 1) == 0;
  }

  int64_t count_, gap_, usable_ = 0, mapped_ = 0;
  uint8_t* memory_ = nullptr;
};

// One check of a test; tells the first failures.
class Report {
 public:
  template <typename... Values>
  void Check(bool good, const char* format, Values... values) {
    ++checks_;
    if (good) return;
    if (++failures_ > 10) return;
    std::fputs("FAILED ", stdout);
    std::printf(format, values...);
    std::fputs("\n", stdout);
  }

  int64_t checks() const { return checks_; }
  int64_t failures() const { return failures_; }

 private:
  int64_t checks_ = 0, failures_ = 0;
};

// A whole number in [low, high].
inline int Draw(std::mt19937& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

}  // namespace splitq::test
