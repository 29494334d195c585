// Tells ThreadSanitizer what ONNX Runtime, which is not compiled with it, orders between threads:
// the steps of a parallel loop come after what was done before the loop, and before what is done
// after it.
#pragma once

#if defined(__SANITIZE_THREAD__)
#define SPLITQ_THREAD_SANITIZER
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SPLITQ_THREAD_SANITIZER
#endif
#endif

#if defined(SPLITQ_THREAD_SANITIZER)
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#endif

namespace splitq::ops {

// What this thread did is seen by those that take `object` over afterwards.
inline void HandOver([[maybe_unused]] const void* object) {
#if defined(SPLITQ_THREAD_SANITIZER)
  __tsan_release(const_cast<void*>(object));
#endif
}

inline void TakeOver([[maybe_unused]] const void* object) {
#if defined(SPLITQ_THREAD_SANITIZER)
  __tsan_acquire(const_cast<void*>(object));
#endif
}

}  // namespace splitq::ops
