// Reads: row-major float matrices of any size. Tile: 8 rows x 32 columns, smaller at the edges.
// Features: AVX-512 F.
// Exactness: the bits of the AVX2 form.
// Idea: quantize/matrix_product.h.
#include "quantize/avx2_vectors.h"
#include "quantize/avx512vnni.h"

namespace splitq {
namespace {

struct Sixteen {
  using Register = __m512;
  static constexpr int kCount = 16, kRows = 8, kVectors = 2;
  static SPLITQ_INLINE __m512 Zero() { return _mm512_setzero_ps(); }
  static SPLITQ_INLINE __m512 Load(const float* p) { return _mm512_loadu_ps(p); }
  static SPLITQ_INLINE __m512 Broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static SPLITQ_INLINE void Store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
  static SPLITQ_INLINE __m512 MultiplyAdd(__m512 a, __m512 b, __m512 c) {
    return _mm512_fmadd_ps(a, b, c);
  }
};

}  // namespace

void MultiplyAvx512Vnni(const MatrixProduct& product) {
  Multiply<Sixteen, Eight, Four, One>(product);
}

}  // namespace splitq
