// Reads: layout 1, all bit widths. Tile: 16 rows x 16 channels, the rows left over 8, 4, 3, 2, 1.
// Features: AVX-512 F, BW, VNNI.
// Exactness: int32, exact. The stored code is the unsigned operand of vpdpbusd, which does not
// saturate; sums wrap around and end right, as the whole sum fits. The zero point is taken off the
// sum: sum(q a) = sum(u a) - z sum(a).
// Idea: a vector of the layout is one register, 4 k of all 16 channels; its fields are masked out
// in registers and multiplied by 4 codes of each row, broadcast from memory. One row alone would
// wait for its own sum, so few rows have several sums each.
//
// Everything here has internal linkage, as in avx2_low_bits.cc. With SPLITQ_SIMDE the intrinsics
// are emulated: the tests run this file on every processor.
#if defined(SPLITQ_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include "gemm/avx512vnni.h"
#include "pack/layout.h"

#define SPLITQ_INLINE inline __attribute__((always_inline))

namespace splitq {
namespace {

constexpr int64_t kEdge = 16;  // k ranges begin and end at its multiples

// Numbers of the layout, here as constants: see avx2_low_bits.cc.
template <int bits>
struct Layout {
  static constexpr int64_t kStep = BlockChannels(bits);
  static constexpr int64_t kBytes = BlockBytes(bits);
  static constexpr int kFields = FieldsPerBlock(bits);
  static constexpr int kMaxCode = (1 << bits) - 1;
};

// Sums of a row that do not wait for each other.
constexpr int Chains(int rows) { return rows == 1 ? 4 : rows < 4 ? 2 : 1; }

SPLITQ_INLINE __m512i Load(const void* address) { return _mm512_loadu_si512(address); }

SPLITQ_INLINE __m512i Mask(__m512i value, int mask) {
  return _mm512_and_si512(value, _mm512_set1_epi8(static_cast<char>(mask)));
}

// Bits of a where the mask has ones, bits of b elsewhere.
SPLITQ_INLINE __m512i Select(int mask, __m512i a, __m512i b) {
  const __m512i where = _mm512_set1_epi8(static_cast<char>(mask));
  return _mm512_ternarylogic_epi32(where, a, b, 0xCA);
}

// Stored codes of one field, 4 k of 16 channels.
template <int bits, int field>
SPLITQ_INLINE __m512i LoadCodes(const uint8_t* block) {
  if constexpr (bits == 8) {
    return Load(block);
  } else if constexpr (bits != 3) {
    return Mask(_mm512_srli_epi16(Load(block), field * bits), Layout<bits>::kMaxCode);
  } else if constexpr (field < 6) {
    return Mask(_mm512_srli_epi16(Load(block + field / 2 * kVectorBytes), field % 2 * 3), 7);
  } else {
    const __m512i middle = Load(block + kVectorBytes);
    if constexpr (field == 6) {
      const __m512i low = _mm512_srli_epi16(Load(block), 6);
      return Mask(Select(3, low, _mm512_srli_epi16(middle, 4)), 7);
    } else {
      const __m512i high = _mm512_srli_epi16(Load(block + 2 * kVectorBytes), 5);
      return Mask(Select(6, high, _mm512_srli_epi16(middle, 7)), 7);
    }
  }
}

template <int rows>
struct Sums {
  __m512i of[rows][Chains(rows)];  // 16 channels
};

// 4 consecutive codes of a row, in every 4 bytes.
SPLITQ_INLINE __m512i BroadcastCodes(const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, sizeof(four));
  return _mm512_set1_epi32(four);
}

// Adds the products of a block, from this field on. codes: of the block's first k, row 0.
template <int bits, int rows, int field = 0>
SPLITQ_INLINE void AddBlock(const int8_t* codes, int64_t stride, const uint8_t* block,
                            Sums<rows>& sums) {
  const __m512i stored = LoadCodes<bits, field>(block);
  for (int m = 0; m < rows; ++m) {
    __m512i& sum = sums.of[m][field % Chains(rows)];
    sum = _mm512_dpbusd_epi32(sum, stored, BroadcastCodes(codes + m * stride + field * kQuad));
  }
  if constexpr (field + 1 < Layout<bits>::kFields) {
    AddBlock<bits, rows, field + 1>(codes, stride, block, sums);
  }
}

// Adds the products of `blocks` whole blocks.
template <int bits, int rows>
SPLITQ_INLINE void AddBlocks(const int8_t* codes, int64_t stride, const uint8_t* panel,
                             int64_t blocks, Sums<rows>& sums) {
  for (int64_t b = 0; b < blocks; ++b) {
    AddBlock<bits, rows>(codes, stride, panel, sums);
    codes += Layout<bits>::kStep;
    panel += Layout<bits>::kBytes;
  }
}

// -z sum(a) over the range, in all 16 channels.
template <int bits>
SPLITQ_INLINE __m512i BeginSum(const int8_t* codes, int64_t k_begin, int64_t k_end) {
  __m512i total = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  int64_t k = k_begin / kVectorBytes * kVectorBytes;  // a row is readable up to a multiple of 64
  for (; k < k_end; k += kVectorBytes) {
    uint64_t inside = ~uint64_t{0};
    if (k < k_begin) inside = inside << (k_begin - k);
    if (k_end - k < kVectorBytes) inside &= (uint64_t{1} << (k_end - k)) - 1;
    total = _mm512_dpbusd_epi32(total, ones, _mm512_maskz_mov_epi8(inside, Load(codes + k)));
  }
  __m128i sum = _mm_add_epi32(
      _mm_add_epi32(_mm512_extracti32x4_epi32(total, 0), _mm512_extracti32x4_epi32(total, 1)),
      _mm_add_epi32(_mm512_extracti32x4_epi32(total, 2), _mm512_extracti32x4_epi32(total, 3)));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1));
  sum = _mm_sub_epi32(_mm_setzero_si128(), _mm_slli_epi32(sum, bits - 1));
  return _mm512_broadcastd_epi32(sum);
}

// A block that the range covers in part: its codes are copied, zeros outside the range.
template <int bits, int rows>
SPLITQ_INLINE void AddPart(const PanelProduct& product, const int8_t* codes, int64_t block,
                           Sums<rows>& sums) {
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
  AddBlock<bits, rows>(copy, kStep, product.panel + block * Layout<bits>::kBytes, sums);
}

// Rows m .. m + rows of the product.
template <int bits, int rows>
SPLITQ_INLINE void RunRows(const PanelProduct& product, int64_t m) {
  constexpr int64_t kStep = Layout<bits>::kStep, kBytes = Layout<bits>::kBytes;
  constexpr int kChains = Chains(rows);
  const int64_t stride = product.codes_stride;
  const int8_t* codes = product.codes + m * stride;
  Sums<rows> sums;
  for (int i = 0; i < rows; ++i) {
    sums.of[i][0] = BeginSum<bits>(codes + i * stride, product.k_begin, product.k_end);
    for (int chain = 1; chain < kChains; ++chain) sums.of[i][chain] = _mm512_setzero_si512();
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
                        sums);
  for (int i = 0; i < rows; ++i) {
    __m512i total = sums.of[i][0];
    for (int chain = 1; chain < kChains; ++chain) {
      total = _mm512_add_epi32(total, sums.of[i][chain]);
    }
    _mm512_storeu_si512(product.sums + (m + i) * kPanel, total);
  }
}

template <int bits>
SPLITQ_INLINE void Run(const PanelProduct& product) {
  int64_t m = 0;
  for (; m + 16 <= product.rows; m += 16) RunRows<bits, 16>(product, m);
  if (m + 8 <= product.rows) {
    RunRows<bits, 8>(product, m);
    m += 8;
  }
  if (m + 4 <= product.rows) {
    RunRows<bits, 4>(product, m);
    m += 4;
  }
  switch (product.rows - m) {
    case 3:
      return RunRows<bits, 3>(product, m);
    case 2:
      return RunRows<bits, 2>(product, m);
    case 1:
      return RunRows<bits, 1>(product, m);
  }
}

}  // namespace

void RunAvx512VnniBits2(const PanelProduct& product) { Run<2>(product); }
void RunAvx512VnniBits3(const PanelProduct& product) { Run<3>(product); }
void RunAvx512VnniBits4(const PanelProduct& product) { Run<4>(product); }
void RunAvx512VnniBits8(const PanelProduct& product) { Run<8>(product); }

}  // namespace splitq
