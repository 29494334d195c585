// Reads: layout 1 of 6 bits. Tile: 4 rows x 16 channels, the rows left over 3, 2 or 1.
// Features: AVX2.
// Exactness: int32, exact. The stored code is the unsigned operand of vpmaddubsw, so a pair of
// products is at most 2 * 63 * 128 in magnitude: two pairs fit in 16 bits, then they move to 32.
// The zero point is taken off the sum: sum(q a) = sum(u a) - z sum(a).
// Idea: as in avx2_low_bits.cc, a block of 16 k by halves of 8 channels.
//
// As there, everything here has internal linkage.
#include <immintrin.h>

#include "gemm/avx2.h"
#include "include/prefetch.h"
#include "pack/layout.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

constexpr int kBits = 6;
constexpr int kFields = FieldsPerBlock(kBits);
constexpr int64_t kStep = BlockChannels(kBits);
constexpr int64_t kBytes = BlockBytes(kBits);
constexpr int kHalves = 2;
constexpr int64_t kHalfBytes = kVectorBytes / kHalves;  // one register
constexpr int64_t kHalfChannels = kPanel / kHalves;

SPLITQ_INLINE __m256i Load(const void* address) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(address));
}

SPLITQ_INLINE __m256i Mask(__m256i value, int mask) {
  return _mm256_and_si256(value, _mm256_set1_epi8(static_cast<char>(mask)));
}

// Stored codes of a block, each field 4 k of 8 channels.
struct Fields {
  __m256i of[kFields];
};

// half: first byte of these channels in the block.
SPLITQ_INLINE Fields LoadFields(const uint8_t* half) {
  const __m256i low = Load(half);
  const __m256i middle = Load(half + kVectorBytes);
  const __m256i high = Load(half + 2 * kVectorBytes);
  const __m256i top = _mm256_or_si256(Mask(_mm256_srli_epi16(low, 6), 3),
                                      _mm256_or_si256(Mask(_mm256_srli_epi16(middle, 4), 12),
                                                      Mask(_mm256_srli_epi16(high, 2), 48)));
  return {Mask(low, 63), Mask(middle, 63), Mask(high, 63), top};
}

// 4 consecutive codes of a row, in every 4 bytes.
SPLITQ_INLINE __m256i BroadcastCodes(const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, sizeof(four));
  return _mm256_set1_epi32(four);
}

// Products of two fields with 8 codes of a row.
SPLITQ_INLINE __m256i TwoFields(__m256i first, __m256i second, const int8_t* codes) {
  const __m256i sums =
      _mm256_add_epi16(_mm256_maddubs_epi16(first, BroadcastCodes(codes)),
                       _mm256_maddubs_epi16(second, BroadcastCodes(codes + kQuad)));
  return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

// Rows m .. m + rows of the product.
template <int rows>
SPLITQ_INLINE void RunRows(const PanelProduct& product, int64_t m) {
  const int64_t stride = product.codes_stride;
  const int8_t* codes = product.codes + m * stride;
  __m256i sums[rows][kHalves];
  for (int i = 0; i < rows; ++i) {
    const int32_t code_sum = product.code_sums[(m + i) * product.code_sums_stride];
    sums[i][0] = sums[i][1] = _mm256_set1_epi32(-(1 << (kBits - 1)) * code_sum);
  }
  for (int64_t k = product.k_begin; k < product.k_end; k += kStep) {
    const uint8_t* block = product.panel + k / kStep * kBytes;
    if (m == 0) Prefetch(block + kPrefetchAhead, kBytes);
    for (int half = 0; half < kHalves; ++half) {
      const Fields fields = LoadFields(block + half * kHalfBytes);
      for (int i = 0; i < rows; ++i) {
        const int8_t* row = codes + i * stride + k;
        const __m256i lower = TwoFields(fields.of[0], fields.of[1], row);
        const __m256i upper = TwoFields(fields.of[2], fields.of[3], row + 2 * kQuad);
        sums[i][half] = _mm256_add_epi32(sums[i][half], _mm256_add_epi32(lower, upper));
      }
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int half = 0; half < kHalves; ++half) {
      int32_t* target = product.sums + (m + i) * kPanel + half * kHalfChannels;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), sums[i][half]);
    }
  }
}

SPLITQ_INLINE void Run(const PanelProduct& product) {
  int64_t m = 0;
  for (; m + 4 <= product.rows; m += 4) RunRows<4>(product, m);
  switch (product.rows - m) {
    case 3:
      return RunRows<3>(product, m);
    case 2:
      return RunRows<2>(product, m);
    case 1:
      return RunRows<1>(product, m);
  }
}

}  // namespace

void RunAvx2Bits6(const PanelProduct& product) { RunEachPanel<Run>(product); }

}  // namespace splitq
