// Features: AVX2. Idea: norm/skip_norm_loop.h, eight numbers at a time.
#include "norm/avx2.h"
#include "norm/skip_norm_loop.h"

namespace splitq {

void SkipNormAvx2(const SkipNormRow& row) { SkipNormLoop(row); }

}  // namespace splitq
