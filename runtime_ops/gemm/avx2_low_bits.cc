// Reads: layout 1 of 2, 3 and 4 bits. Tile: 4 rows x 16 channels, the rows left over 3, 2 or 1.
// Features: AVX2.
// Exactness: int32, exact. The stored code is the unsigned operand of vpmaddubsw, so a pair of
// products is at most 2 * 15 * 128 in magnitude; as many pairs are added in 16 bits as always fit,
// then they move to 32 bits. The zero point is taken off the sum: sum(q a) = sum(u a) - z sum(a).
// Idea: fields are masked out of the packed bytes in registers; a field is 4 k of 8 channels a
// register, and is multiplied by 4 codes of each row, broadcast.
//
// This file is compiled with -mavx2: everything in it has internal linkage and no function of a
// header is called, lest the linker keep an AVX2 copy of it for every processor.
#include <immintrin.h>

#include "gemm/avx2.h"
#include "include/prefetch.h"
#include "pack/layout.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

constexpr int64_t kHalf = kVectorBytes / 2;  // one register
constexpr int64_t kEdge = 16;                // k ranges begin and end at its multiples

// Numbers of the layout, here as constants: see the head of the file.
template <int bits>
struct Layout {
  static constexpr int64_t kStep = BlockChannels(bits);
  static constexpr int64_t kBytes = BlockBytes(bits);
  static constexpr int kFields = FieldsPerBlock(bits);
  static constexpr int kMaxCode = (1 << bits) - 1;
  // Blocks whose products a 16-bit lane is sure to hold: 10, 2 and 4 of 2, 3 and 4 bits.
  static constexpr int64_t kBlocksInShort = 32767 / (kFields * 2 * kMaxCode * 128);
};

SPLITQ_INLINE __m256i Load(const void* address) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(address));
}

SPLITQ_INLINE void Store(void* address, __m256i value) {
  _mm256_storeu_si256(static_cast<__m256i*>(address), value);
}

SPLITQ_INLINE __m256i Mask(__m256i value, int mask) {
  return _mm256_and_si256(value, _mm256_set1_epi8(static_cast<char>(mask)));
}

// Stored codes of one field, 4 k of 8 channels. half: first byte of these channels in the block.
template <int bits, int field>
SPLITQ_INLINE __m256i LoadCodes(const uint8_t* half) {
  if constexpr (bits != 3) {
    return Mask(_mm256_srli_epi16(Load(half), field * bits), Layout<bits>::kMaxCode);
  } else if constexpr (field < 6) {
    return Mask(_mm256_srli_epi16(Load(half + field / 2 * kVectorBytes), field % 2 * 3), 7);
  } else {
    const __m256i middle = Load(half + kVectorBytes);
    if constexpr (field == 6) {
      const __m256i low = Mask(_mm256_srli_epi16(Load(half), 6), 3);
      return _mm256_or_si256(low, Mask(_mm256_srli_epi16(middle, 4), 4));
    } else {
      const __m256i high = Mask(_mm256_srli_epi16(Load(half + 2 * kVectorBytes), 5), 6);
      return _mm256_or_si256(high, Mask(_mm256_srli_epi16(middle, 7), 1));
    }
  }
}

template <int rows>
struct ShortSums {
  __m256i low[rows], high[rows];  // channels 0-7 and 8-15, two 16-bit sums a channel
};

// 4 consecutive codes of a row, in every 4 bytes.
SPLITQ_INLINE __m256i BroadcastCodes(const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, sizeof(four));
  return _mm256_set1_epi32(four);
}

// Adds the products of a block, from this field on. codes: of the block's first k, row 0.
template <int bits, int rows, int field = 0>
SPLITQ_INLINE void AddBlock(const int8_t* codes, int64_t stride, const uint8_t* block,
                            ShortSums<rows>& sums) {
  const __m256i low = LoadCodes<bits, field>(block);
  const __m256i high = LoadCodes<bits, field>(block + kHalf);
  for (int m = 0; m < rows; ++m) {
    const __m256i four = BroadcastCodes(codes + m * stride + field * kQuad);
    sums.low[m] = _mm256_add_epi16(sums.low[m], _mm256_maddubs_epi16(low, four));
    sums.high[m] = _mm256_add_epi16(sums.high[m], _mm256_maddubs_epi16(high, four));
    // Keeps GCC from adding products to each other first, for which it lacks registers.
    asm("" : "+x"(sums.low[m]), "+x"(sums.high[m]));
  }
  if constexpr (field + 1 < Layout<bits>::kFields) {
    AddBlock<bits, rows, field + 1>(codes, stride, block, sums);
  }
}

// sums[m] += the products of `blocks` whole blocks. first: of those that read this panel, it waits
// for memory
template <int bits, int rows>
SPLITQ_INLINE void AddBlocks(const int8_t* codes, int64_t stride, const uint8_t* panel,
                             int64_t blocks, bool first, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  while (blocks > 0) {
    constexpr int64_t kMost = Layout<bits>::kBlocksInShort;
    const int64_t count = blocks < kMost ? blocks : kMost;
    ShortSums<rows> shorts;
    for (int m = 0; m < rows; ++m) shorts.low[m] = shorts.high[m] = _mm256_setzero_si256();
    for (int64_t b = 0; b < count; ++b) {
      if (first) Prefetch(panel + kPrefetchAhead, Layout<bits>::kBytes);
      AddBlock<bits, rows>(codes, stride, panel, shorts);
      codes += Layout<bits>::kStep;
      panel += Layout<bits>::kBytes;
    }
    blocks -= count;
    for (int m = 0; m < rows; ++m) {
      int32_t* row = sums + m * kPanel;
      const __m256i low = _mm256_madd_epi16(shorts.low[m], ones);
      const __m256i high = _mm256_madd_epi16(shorts.high[m], ones);
      Store(row, _mm256_add_epi32(Load(row), low));
      Store(row + 8, _mm256_add_epi32(Load(row + 8), high));
    }
  }
}

// Begins the sums of one row: the zero point times the sum of its codes, subtracted.
template <int bits>
SPLITQ_INLINE void BeginSums(int32_t code_sum, int32_t* sums) {
  const __m256i begin = _mm256_set1_epi32(-(1 << (bits - 1)) * code_sum);
  Store(sums, begin);
  Store(sums + 8, begin);
}

// A block that the range covers in part: its codes are copied, zeros outside the range.
template <int bits, int rows>
SPLITQ_INLINE void AddPart(const PanelProduct& product, const int8_t* codes, int64_t block,
                           int32_t* sums) {
  constexpr int64_t kStep = Layout<bits>::kStep;
  int8_t copy[rows * kStep];
  for (int64_t i = 0; i < kStep; i += kEdge) {
    const int64_t k = block * kStep + i;
    const bool inside = k >= product.k_begin && k < product.k_end;
    for (int m = 0; m < rows; ++m) {
      const auto* from = reinterpret_cast<const __m128i*>(codes + m * product.codes_stride + k);
      const __m128i part = inside ? _mm_loadu_si128(from) : _mm_setzero_si128();
      _mm_storeu_si128(reinterpret_cast<__m128i*>(copy + m * kStep + i), part);
    }
  }
  AddBlocks<bits, rows>(copy, kStep, product.panel + block * Layout<bits>::kBytes, 1, false, sums);
}

// Rows m .. m + rows of the product.
template <int bits, int rows>
SPLITQ_INLINE void RunRows(const PanelProduct& product, int64_t m) {
  constexpr int64_t kStep = Layout<bits>::kStep, kBytes = Layout<bits>::kBytes;
  const int64_t stride = product.codes_stride;
  const int8_t* codes = product.codes + m * stride;
  int32_t* sums = product.sums + m * kPanel;
  for (int i = 0; i < rows; ++i) {
    BeginSums<bits>(product.code_sums[(m + i) * product.code_sums_stride], sums + i * kPanel);
  }
  int64_t block = product.k_begin / kStep;
  int64_t end = (product.k_end + kStep - 1) / kStep;
  if constexpr (kStep > kEdge) {
    if (product.k_begin % kStep != 0) AddPart<bits, rows>(product, codes, block++, sums);
    if (block < end && product.k_end % kStep != 0) {
      AddPart<bits, rows>(product, codes, --end, sums);
    }
  }
  AddBlocks<bits, rows>(codes + block * kStep, stride, product.panel + block * kBytes, end - block,
                        m == 0, sums);
}

template <int bits>
SPLITQ_INLINE void Run(const PanelProduct& product) {
  int64_t m = 0;
  for (; m + 4 <= product.rows; m += 4) RunRows<bits, 4>(product, m);
  switch (product.rows - m) {
    case 3:
      return RunRows<bits, 3>(product, m);
    case 2:
      return RunRows<bits, 2>(product, m);
    case 1:
      return RunRows<bits, 1>(product, m);
  }
}

struct Scales {
  __m256 low, high;  // channels 0-7 and 8-15
};

// Scales of 16 channels; those at and after `exist` are zero.
SPLITQ_INLINE Scales LoadScales(const float* scale, int64_t exist) {
  if (exist >= kPanel) return {_mm256_loadu_ps(scale), _mm256_loadu_ps(scale + 8)};
  const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_set1_epi32(static_cast<int>(exist));
  const __m256i high = _mm256_set1_epi32(static_cast<int>(exist - 8));
  return {_mm256_maskload_ps(scale, _mm256_cmpgt_epi32(low, places)),
          _mm256_maskload_ps(scale + 8, _mm256_cmpgt_epi32(high, places))};
}

// sum * scale of 8 channels, added.
SPLITQ_INLINE __m256 AddTerm(__m256 terms, const int32_t* sums, __m256 scale) {
  return _mm256_add_ps(terms, _mm256_mul_ps(_mm256_cvtepi32_ps(Load(sums)), scale));
}

// As RunRows, of panel p. The last block may be short: its codes end in zeros, as its weights' do.
template <int bits, int rows>
SPLITQ_INLINE void RunBlockRows(const BlockProduct& product, int64_t m, int64_t p) {
  constexpr int64_t kStep = Layout<bits>::kStep, kBytes = Layout<bits>::kBytes;
  const PanelProduct& all = product.panels;
  const int8_t* codes = all.codes + m * all.codes_stride;
  const int32_t* code_sums = all.code_sums + m * all.code_sums_stride;
  const uint8_t* panel = all.panel + p * all.panel_stride;
  const float* scale = product.scale + p * kPanel;
  __m256 low[rows], high[rows];
  for (int i = 0; i < rows; ++i) low[i] = high[i] = _mm256_setzero_ps();
  for (int64_t k = 0; k < all.k_end; k += product.block_size) {
    const int64_t left = all.k_end - k;
    const int64_t channels = left < product.block_size ? left : product.block_size;
    const int64_t blocks = (channels + kStep - 1) / kStep;
    int32_t sums[rows * kPanel];
    for (int i = 0; i < rows; ++i) {
      BeginSums<bits>(code_sums[i * all.code_sums_stride], sums + i * kPanel);
    }
    AddBlocks<bits, rows>(codes, all.codes_stride, panel, blocks, rows == 1, sums);
    // The last of the next panel's, as in avx512vnni.cc.
    if constexpr (rows == 1) _mm_prefetch(scale + 2 * kPanel - 1, _MM_HINT_T0);
    const Scales scales = LoadScales(scale, product.outputs - p * kPanel);
    for (int i = 0; i < rows; ++i) {
      low[i] = AddTerm(low[i], sums + i * kPanel, scales.low);
      high[i] = AddTerm(high[i], sums + i * kPanel + 8, scales.high);
    }
    codes += blocks * kStep;
    panel += blocks * kBytes;
    scale += product.scale_stride;
    ++code_sums;
  }
  float* terms = product.terms + (p * all.rows + m) * kPanel;
  for (int i = 0; i < rows; ++i, terms += kPanel) {
    _mm256_storeu_ps(terms, low[i]);
    _mm256_storeu_ps(terms + 8, high[i]);
  }
}

template <int bits>
SPLITQ_INLINE void RunBlocks(const BlockProduct& product) {
  for (int64_t p = 0; p < product.panels.panels; ++p) {
    int64_t m = 0;
    for (; m + 4 <= product.panels.rows; m += 4) RunBlockRows<bits, 4>(product, m, p);
    for (; m < product.panels.rows; ++m) RunBlockRows<bits, 1>(product, m, p);
  }
}

}  // namespace

void RunAvx2Bits2(const PanelProduct& product) { RunEachPanel<Run<2>>(product); }
void RunAvx2Bits3(const PanelProduct& product) { RunEachPanel<Run<3>>(product); }
void RunAvx2Bits4(const PanelProduct& product) { RunEachPanel<Run<4>>(product); }

void RunBlocksAvx2Bits2(const BlockProduct& product) { RunBlocks<2>(product); }
void RunBlocksAvx2Bits3(const BlockProduct& product) { RunBlocks<3>(product); }
void RunBlocksAvx2Bits4(const BlockProduct& product) { RunBlocks<4>(product); }

}  // namespace splitq
