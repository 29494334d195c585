// The only thing the layers know about threads. ops/ hands in ONNX Runtime's pool, a benchmark its
// own.
#pragma once

#include <cstdint>

namespace splitq {

class ParallelFor {
 public:
  using Task = void (*)(void* body, int64_t index);
  // Calls task(body, i) for each i in [0, count), in any order, on any thread; returns when done.
  using Runner = void (*)(void* pool, int64_t count, Task task, void* body);

  // threads: how many there may be; work is cut accordingly.
  ParallelFor(Runner runner, void* pool, int64_t threads)
      : runner_(runner), pool_(pool), threads_(threads) {}

  int64_t threads() const { return threads_; }

  // body(index) must not throw. `serial` keeps work that is cheaper than waking a thread here.
  template <typename Body>
  void operator()(int64_t count, bool serial, const Body& body) const {
    if (serial || count == 1) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    const Task task = [](void* opaque, int64_t i) { (*static_cast<const Body*>(opaque))(i); };
    runner_(pool_, count, task, const_cast<Body*>(&body));
  }

 private:
  Runner runner_;
  void* pool_;
  int64_t threads_;
};

}  // namespace splitq
