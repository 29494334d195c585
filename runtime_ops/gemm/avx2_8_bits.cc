// Reads: layout 1 of 8 bits. Tile: 2 rows x 16 channels, the row left over alone. Features: AVX2.
// Exactness: int32, exact. vpmaddubsw would saturate at 8 bits, so both operands are widened to 16
// bits for vpmaddwd. The zero point is taken off the codes.
// Idea: a block is 4 k of 16 channels, four registers once widened; each is multiplied by 4 codes
// of each row, broadcast. A channel's sum lies in two lanes until the end.
//
// As in avx2_low_bits.cc, everything here has internal linkage.
#include <immintrin.h>

#include "gemm/avx2.h"
#include "include/prefetch.h"
#include "pack/layout.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

constexpr int kParts = 4;                              // registers a widened block takes
constexpr int64_t kPartBytes = kVectorBytes / kParts;  // of the packed block

SPLITQ_INLINE __m256i LoadCodes(const uint8_t* packed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  return _mm256_sub_epi16(_mm256_cvtepu8_epi16(bytes), _mm256_set1_epi16(128));
}

// 4 consecutive codes of a row, widened, in every 8 bytes.
SPLITQ_INLINE __m256i BroadcastCodes(const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, sizeof(four));
  return _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
}

// Two lanes a channel, 4 channels a register -> one lane a channel, 8 channels.
SPLITQ_INLINE void StoreSums(__m256i first, __m256i second, int32_t* sums) {
  const __m256i added = _mm256_hadd_epi32(first, second);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), _mm256_permute4x64_epi64(added, 0xD8));
}

template <int rows>
SPLITQ_INLINE void RunRows(const PanelProduct& product, int64_t m) {
  const int64_t stride = product.codes_stride;
  const int8_t* codes = product.codes + m * stride;
  __m256i sums[rows][kParts];
  for (int i = 0; i < rows; ++i) {
    for (int part = 0; part < kParts; ++part) sums[i][part] = _mm256_setzero_si256();
  }
  for (int64_t k = product.k_begin; k < product.k_end; k += kQuad) {
    const uint8_t* block = product.panel + k / kQuad * kVectorBytes;
    if (m == 0) Prefetch(block + kPrefetchAhead, kVectorBytes);
    __m256i four[rows];
    for (int i = 0; i < rows; ++i) four[i] = BroadcastCodes(codes + i * stride + k);
    for (int part = 0; part < kParts; ++part) {
      const __m256i weights = LoadCodes(block + part * kPartBytes);
      for (int i = 0; i < rows; ++i) {
        sums[i][part] = _mm256_add_epi32(sums[i][part], _mm256_madd_epi16(weights, four[i]));
      }
    }
  }
  for (int i = 0; i < rows; ++i) {
    int32_t* row = product.sums + (m + i) * kPanel;
    StoreSums(sums[i][0], sums[i][1], row);
    StoreSums(sums[i][2], sums[i][3], row + 8);
  }
}

SPLITQ_INLINE void Run(const PanelProduct& product) {
  int64_t m = 0;
  for (; m + 2 <= product.rows; m += 2) RunRows<2>(product, m);
  if (m < product.rows) RunRows<1>(product, m);
}

}  // namespace

void RunAvx2Bits8(const PanelProduct& product) { RunEachPanel<Run>(product); }

}  // namespace splitq
