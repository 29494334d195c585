// Features: AVX2. Idea: gate/swiglu_loop.h, eight numbers at a time.
#include "gate/avx2.h"
#include "gate/swiglu_loop.h"

namespace splitq {

void SwiGluAvx2(const float* gate, const float* up, int64_t width, float* out) {
  SwiGluLoop(gate, up, width, out);
}

}  // namespace splitq
