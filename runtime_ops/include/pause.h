// For loops that wait for another thread.
#pragma once

#if defined(_MSC_VER) && defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace splitq {

// Leaves a core that two threads share to the other one for a moment.
inline void Pause() {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
  __builtin_ia32_pause();
#elif defined(__GNUC__) && (defined(__aarch64__) || defined(__arm__))
  __asm__ volatile("yield");
#elif defined(_MSC_VER) && defined(_M_X64)
  _mm_pause();
#endif
}

}  // namespace splitq
