// Reads: layout 1, all bit widths. Tile: 8 rows x 3 panels of 16 channels; the rows left over 4, 3,
// 2, 1; panels left over, and those of up to 4 rows, one by one. Several products at once: 4 rows.
// Features: AVX-512 F, BW, VNNI.
// Exactness: int32, exact; floats as gemm/terms.h makes them. The stored code is the unsigned
// operand of vpdpbusd, which does not saturate; sums wrap around and end right, as the whole sum
// fits. The zero point is taken off the sum: sum(q a) = sum(u a) - z sum(a).
// Idea: a vector of the layout is one register, 4 k of all 16 channels; its fields are masked out
// in registers and multiplied by 4 codes of each row, broadcast from memory. Three panels a
// broadcast, because a load takes as long as a product. A sum that would wait for itself is kept in
// several parts. A few rows have only to read the weights in the order in which they lie. With
// blocks: 4 rows x 3 panels, and a single row with long ones panel by panel.
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
#include "include/prefetch.h"
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

constexpr int kPanels = 3;  // of a tile

// So few rows wait for memory, which answers soonest when panels are read one by one, as they lie
// (weights without blocks).
constexpr int64_t kSinglePanelRows = 4;

// Channels of a block: up to these, waiting for the sums of a single row costs more than reading
// three panels at once.
constexpr int64_t kShortBlock = 64;

// Parts of a sum that do not wait for each other.
constexpr int Chains(int rows, int panels) {
  return rows * panels == 1 ? 4 : rows * panels <= 4 ? 2 : 1;
}

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
  } else if constexpr (bits == 6) {
    if constexpr (field < 3) return Mask(Load(block + field * kVectorBytes), 63);
    const __m512i low = _mm512_srli_epi16(Load(block), 6);
    const __m512i middle = _mm512_srli_epi16(Load(block + kVectorBytes), 4);
    const __m512i high = _mm512_srli_epi16(Load(block + 2 * kVectorBytes), 2);
    return Mask(Select(3, low, Select(12, middle, high)), 63);
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

template <int rows, int panels>
struct Sums {
  __m512i of[rows][panels][Chains(rows, panels)];  // 16 channels
};

// 4 consecutive codes of a row, in every 4 bytes.
SPLITQ_INLINE __m512i BroadcastCodes(const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, sizeof(four));
  return _mm512_set1_epi32(four);
}

// Begins every sum with the zero point times the sum of its row's codes, subtracted.
template <int bits, int rows, int panels>
SPLITQ_INLINE void BeginSums(const int32_t* code_sums, int64_t stride, Sums<rows, panels>& sums) {
  for (int m = 0; m < rows; ++m) {
    const __m512i begin = _mm512_set1_epi32(-(1 << (bits - 1)) * code_sums[m * stride]);
    for (int p = 0; p < panels; ++p) {
      sums.of[m][p][0] = begin;
      for (int chain = 1; chain < Chains(rows, panels); ++chain) {
        sums.of[m][p][chain] = _mm512_setzero_si512();
      }
    }
  }
}

template <int rows, int panels>
SPLITQ_INLINE __m512i Total(const Sums<rows, panels>& sums, int m, int p) {
  __m512i total = sums.of[m][p][0];
  for (int chain = 1; chain < Chains(rows, panels); ++chain) {
    total = _mm512_add_epi32(total, sums.of[m][p][chain]);
  }
  return total;
}

// Where a tile stands: the next block's first k of its first row, and that block of its first
// panel.
struct Place {
  const int8_t* codes;
  int64_t stride;
  const uint8_t* block;
  int64_t panel_stride;
  bool first;                     // of those that read these panels: it waits for memory
  const uint8_t* next = nullptr;  // of eight rows: the panels after these
};

// Adds the products of a block, from this field on.
template <int bits, int rows, int panels, int field = 0>
SPLITQ_INLINE void AddBlock(const Place& place, Sums<rows, panels>& sums) {
  constexpr int kChain = field % Chains(rows, panels);
  __m512i stored[panels];
  for (int p = 0; p < panels; ++p) {
    stored[p] = LoadCodes<bits, field>(place.block + p * place.panel_stride);
  }
  for (int m = 0; m < rows; ++m) {
    const __m512i four = BroadcastCodes(place.codes + m * place.stride + field * kQuad);
    for (int p = 0; p < panels; ++p) {
      __m512i& sum = sums.of[m][p][kChain];
      sum = _mm512_dpbusd_epi32(sum, stored[p], four);
    }
  }
  if constexpr (field + 1 < Layout<bits>::kFields) {
    AddBlock<bits, rows, panels, field + 1>(place, sums);
  }
}

// Asks for blocks that come later. Panels that are read side by side no processor foresees: eight
// rows, which multiply narrow weights for longer than memory takes to bring them, ask for the next
// panels as they lie.
template <int bits, int rows, int panels>
SPLITQ_INLINE void PrefetchAhead(Place& place) {
  constexpr int64_t kBytes = Layout<bits>::kBytes;
  if constexpr (rows == 8 && bits <= 4) {
    Prefetch(place.next, panels * kBytes);
    place.next += panels * kBytes;
  } else {
    for (int p = 0; p < panels; ++p) {
      Prefetch(place.block + p * place.panel_stride + kPrefetchAhead, kBytes);
    }
  }
}

// Adds the products of `blocks` whole blocks.
template <int bits, int rows, int panels>
SPLITQ_INLINE void AddBlocks(Place place, int64_t blocks, Sums<rows, panels>& sums) {
  for (int64_t b = 0; b < blocks; ++b) {
    if (place.first) PrefetchAhead<bits, rows, panels>(place);
    AddBlock<bits, rows, panels>(place, sums);
    place.codes += Layout<bits>::kStep;
    place.block += Layout<bits>::kBytes;
  }
}

// A block that the range covers in part: its codes are copied, zeros outside the range.
// place: of the panels' first block and k.
template <int bits, int rows, int panels>
SPLITQ_INLINE void AddPart(const PanelProduct& product, const Place& place, int64_t block,
                           Sums<rows, panels>& sums) {
  constexpr int64_t kStep = Layout<bits>::kStep;
  int8_t copy[rows * kStep];
  for (int64_t i = 0; i < kStep; i += kEdge) {
    const int64_t k = block * kStep + i;
    const bool inside = k >= product.k_begin && k < product.k_end;
    for (int m = 0; m < rows; ++m) {
      const auto* from = reinterpret_cast<const __m128i*>(place.codes + m * place.stride + k);
      const __m128i part = inside ? _mm_loadu_si128(from) : _mm_setzero_si128();
      _mm_storeu_si128(reinterpret_cast<__m128i*>(copy + m * kStep + i), part);
    }
  }
  AddBlock<bits, rows, panels>(
      {copy, kStep, place.block + block * Layout<bits>::kBytes, place.panel_stride, false}, sums);
}

template <int rows, int panels>
SPLITQ_INLINE void StoreSums(const PanelProduct& product, int64_t m, int64_t p,
                             const Sums<rows, panels>& sums) {
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < panels; ++j) {
      _mm512_storeu_si512(product.sums + ((p + j) * product.rows + m + i) * kPanel,
                          Total(sums, i, j));
    }
  }
}

// Keeps GCC from carrying the value through the loop before in a second register, of another type.
SPLITQ_INLINE void Pin(__m512i& value) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(value));
#else
  (void)value;
#endif
}

template <bool add, int rows, int panels>
SPLITQ_INLINE void StoreTerms(const PanelProduct& product, const TermsOutput& output, int64_t m,
                              int64_t p, const Sums<rows, panels>& sums) {
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    const __m512 row_scale = _mm512_set1_ps(output.row_scale[m + i]);
#pragma GCC unroll 3
    for (int j = 0; j < panels; ++j) {
      float* terms = output.terms + ((p + j) * product.rows + m + i) * kPanel;
      const __m512 channel_scale = _mm512_loadu_ps(output.channel_scale + (p + j) * kPanel);
      __m512i total = Total(sums, i, j);
      Pin(total);
      __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(total), row_scale);
      value = _mm512_mul_ps(value, channel_scale);
      if (add) value = _mm512_add_ps(_mm512_loadu_ps(terms), value);
      _mm512_storeu_ps(terms, value);
    }
  }
}

// What becomes of the sums.
enum Result { kSums, kSet, kAdd };

// Rows m .. m + rows of the product, `panels` panels from panel p on. output: null for sums.
template <int bits, Result result, int rows, int panels>
SPLITQ_INLINE void RunTile(const PanelProduct& product, const TermsOutput* output, int64_t m,
                           int64_t p) {
  constexpr int64_t kStep = Layout<bits>::kStep, kBytes = Layout<bits>::kBytes;
  Place place{product.codes + m * product.codes_stride,
              product.codes_stride,
              product.panel + p * product.panel_stride,
              product.panel_stride,
              m == 0,
              product.panel + (p + panels) * product.panel_stride};
  Sums<rows, panels> sums;
  BeginSums<bits>(product.code_sums + m * product.code_sums_stride, product.code_sums_stride, sums);
  int64_t block = product.k_begin / kStep;
  int64_t end = (product.k_end + kStep - 1) / kStep;
  if constexpr (kStep > kEdge) {
    if (product.k_begin % kStep != 0) AddPart<bits>(product, place, block++, sums);
    if (block < end && product.k_end % kStep != 0) AddPart<bits>(product, place, --end, sums);
  }
  place.codes += block * kStep;
  place.block += block * kBytes;
  place.next += block * panels * kBytes;
  AddBlocks<bits>(place, end - block, sums);
  if constexpr (result == kSums) {
    StoreSums(product, m, p, sums);
  } else {
    StoreTerms<result == kAdd>(product, *output, m, p, sums);
  }
}

// All rows of `panels` panels from panel p on.
template <int bits, Result result, int panels>
SPLITQ_INLINE void RunRows(const PanelProduct& product, const TermsOutput* output, int64_t p) {
  int64_t m = 0;
  for (; m + 8 <= product.rows; m += 8) RunTile<bits, result, 8, panels>(product, output, m, p);
  if (m + 4 <= product.rows) {
    RunTile<bits, result, 4, panels>(product, output, m, p);
    m += 4;
  }
  switch (product.rows - m) {
    case 3:
      return RunTile<bits, result, 3, panels>(product, output, m, p);
    case 2:
      return RunTile<bits, result, 2, panels>(product, output, m, p);
    case 1:
      return RunTile<bits, result, 1, panels>(product, output, m, p);
  }
}

template <int bits, Result result>
SPLITQ_INLINE void Run(const PanelProduct& product, const TermsOutput* output) {
  int64_t p = 0;
  if (product.rows > kSinglePanelRows) {
    for (; p + kPanels <= product.panels; p += kPanels)
      RunRows<bits, result, kPanels>(product, output, p);
  }
  for (; p < product.panels; ++p) RunRows<bits, result, 1>(product, output, p);
}

template <int bits>
SPLITQ_INLINE void RunTerms(const PanelProduct& product, const TermsOutput& output) {
  if (output.add) return Run<bits, kAdd>(product, &output);
  Run<bits, kSet>(product, &output);
}

// Which of the 16 channels from `channel` on lie before `outputs`.
SPLITQ_INLINE __mmask16 Exist(int64_t channel, int64_t outputs) {
  const int64_t exist = outputs - channel;
  return static_cast<__mmask16>(exist >= kPanel ? 0xFFFF : (1 << exist) - 1);
}

// A number of each of the 16 channels from `channel` on, zeros of those that do not exist.
SPLITQ_INLINE __m512 LoadChannels(const float* values, int64_t channel, int64_t outputs) {
  return _mm512_maskz_loadu_ps(Exist(channel, outputs), values + channel);
}

// Rows m .. m + rows of y, `panels` panels from panel p on. The totals stay in registers through
// all products. The last block of a weight may be short: its codes end in zeros, as the block does.
template <int bits, int rows, int panels>
SPLITQ_INLINE void RunOutputTile(const OutputSum& sum, int64_t m, int64_t p) {
  constexpr int64_t kStep = Layout<bits>::kStep;
  __m512 totals[rows][panels];
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < panels; ++j) {
      const int64_t at = ((p + j) * sum.products->product.rows + m + i) * kPanel;
      totals[i][j] = _mm512_loadu_ps(sum.terms + at);
    }
  }
  for (int64_t part = 0; part < sum.count; ++part) {
    const ScaledProduct& scaled = sum.products[part];
    const PanelProduct& product = scaled.product;
    const Place place{product.codes + m * product.codes_stride, product.codes_stride,
                      product.panel + p * product.panel_stride, product.panel_stride, m == 0};
    Sums<rows, panels> sums;
    BeginSums<bits>(product.code_sums + m * product.code_sums_stride, product.code_sums_stride,
                    sums);
    AddBlocks<bits>(place, (product.k_end + kStep - 1) / kStep, sums);
#pragma GCC unroll 3
    for (int j = 0; j < panels; ++j) {
      const __m512 scales = LoadChannels(scaled.channel_scale, (p + j) * kPanel, sum.outputs);
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) {
        __m512i whole = Total(sums, i, j);
        Pin(whole);
        const __m512 row_scale = _mm512_set1_ps(scaled.row_scale[m + i]);
        const __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), row_scale);
        totals[i][j] = _mm512_add_ps(totals[i][j], _mm512_mul_ps(term, scales));
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < panels; ++j) {
      const int64_t channel = (p + j) * kPanel;
      __m512 total = totals[i][j];
      if (sum.bias != nullptr) {
        total = _mm512_add_ps(total, LoadChannels(sum.bias, channel, sum.outputs));
      }
      float* y = sum.y + (m + i) * sum.y_stride + channel;
      if (channel + kPanel <= sum.outputs) {
        _mm512_storeu_ps(y, total);
      } else {
        _mm512_mask_storeu_ps(y, Exist(channel, sum.outputs), total);
      }
    }
  }
}

// All rows of `panels` panels from panel p on. Of four rows and three panels totals and sums fit
// into the registers.
template <int bits, int panels>
SPLITQ_INLINE void RunOutputRows(const OutputSum& sum, int64_t p) {
  const int64_t rows = sum.products->product.rows;
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) RunOutputTile<bits, 4, panels>(sum, m, p);
  switch (rows - m) {
    case 3:
      return RunOutputTile<bits, 3, panels>(sum, m, p);
    case 2:
      return RunOutputTile<bits, 2, panels>(sum, m, p);
    case 1:
      return RunOutputTile<bits, 1, panels>(sum, m, p);
  }
}

template <int bits>
SPLITQ_INLINE void RunOutput(const OutputSum& sum) {
  const PanelProduct& first = sum.products->product;
  int64_t p = 0;
  if (first.rows > kSinglePanelRows) {
    for (; p + kPanels <= first.panels; p += kPanels) RunOutputRows<bits, kPanels>(sum, p);
  }
  for (; p < first.panels; ++p) RunOutputRows<bits, 1>(sum, p);
}

// As RunTile. The last block may be short: its codes end in zeros, as its weights' block does.
template <int bits, int rows, int panels>
SPLITQ_INLINE void RunBlockTile(const BlockProduct& product, int64_t m, int64_t p) {
  constexpr int64_t kStep = Layout<bits>::kStep, kBytes = Layout<bits>::kBytes;
  const PanelProduct& all = product.panels;
  Place place{all.codes + m * all.codes_stride, all.codes_stride, all.panel + p * all.panel_stride,
              all.panel_stride, rows == 1};
  const int32_t* code_sums = all.code_sums + m * all.code_sums_stride;
  const float* scale = product.scale;
  __m512 terms[rows][panels];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < panels; ++j) terms[i][j] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < all.k_end; k += product.block_size) {
    const int64_t left = all.k_end - k;
    const int64_t channels = left < product.block_size ? left : product.block_size;
    const int64_t blocks = (channels + kStep - 1) / kStep;
    Sums<rows, panels> sums;
    BeginSums<bits>(code_sums, all.code_sums_stride, sums);
    AddBlocks<bits>(place, blocks, sums);
    place.codes += blocks * kStep;
    place.block += blocks * kBytes;
    for (int j = 0; j < panels; ++j) {
      if constexpr (rows == 1) {
        // The scales of a panel lie a row of channels apart, where no processor foresees them: here
        // the next panels' of this block, the last of each: the first may lie in a line already
        // read.
        const float* next = scale + (p + panels + j + 1) * kPanel - 1;
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
      }
      const __m512 scales = LoadChannels(scale, (p + j) * kPanel, product.outputs);
      for (int i = 0; i < rows; ++i) {
        const __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(Total(sums, i, j)), scales);
        terms[i][j] = _mm512_add_ps(terms[i][j], term);
      }
    }
    scale += product.scale_stride;
    ++code_sums;
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < panels; ++j) {
      _mm512_storeu_ps(product.terms + ((p + j) * all.rows + m + i) * kPanel, terms[i][j]);
    }
  }
}

template <int bits, int panels>
SPLITQ_INLINE void RunBlockRows(const BlockProduct& product, int64_t p) {
  int64_t m = 0;
  for (; m + 4 <= product.panels.rows; m += 4) RunBlockTile<bits, 4, panels>(product, m, p);
  for (; m < product.panels.rows; ++m) RunBlockTile<bits, 1, panels>(product, m, p);
}

template <int bits>
SPLITQ_INLINE void RunBlocks(const BlockProduct& product) {
  int64_t p = 0;
  if (product.panels.rows > 1 || product.block_size <= kShortBlock) {
    for (; p + kPanels <= product.panels.panels; p += kPanels) {
      RunBlockRows<bits, kPanels>(product, p);
    }
  }
  for (; p < product.panels.panels; ++p) RunBlockRows<bits, 1>(product, p);
}

}  // namespace

void RunAvx512VnniBits2(const PanelProduct& product) { Run<2, kSums>(product, nullptr); }
void RunAvx512VnniBits3(const PanelProduct& product) { Run<3, kSums>(product, nullptr); }
void RunAvx512VnniBits4(const PanelProduct& product) { Run<4, kSums>(product, nullptr); }
void RunAvx512VnniBits6(const PanelProduct& product) { Run<6, kSums>(product, nullptr); }
void RunAvx512VnniBits8(const PanelProduct& product) { Run<8, kSums>(product, nullptr); }

void RunTermsAvx512VnniBits2(const PanelProduct& product, const TermsOutput& output) {
  RunTerms<2>(product, output);
}
void RunTermsAvx512VnniBits3(const PanelProduct& product, const TermsOutput& output) {
  RunTerms<3>(product, output);
}
void RunTermsAvx512VnniBits4(const PanelProduct& product, const TermsOutput& output) {
  RunTerms<4>(product, output);
}
void RunTermsAvx512VnniBits6(const PanelProduct& product, const TermsOutput& output) {
  RunTerms<6>(product, output);
}
void RunTermsAvx512VnniBits8(const PanelProduct& product, const TermsOutput& output) {
  RunTerms<8>(product, output);
}

// The weights beside the main one have 4 bits with every preset; others take the products one by
// one.
void RunOutputAvx512VnniBits4(const OutputSum& sum) { RunOutput<4>(sum); }

void RunBlocksAvx512VnniBits2(const BlockProduct& product) { RunBlocks<2>(product); }
void RunBlocksAvx512VnniBits3(const BlockProduct& product) { RunBlocks<3>(product); }
void RunBlocksAvx512VnniBits4(const BlockProduct& product) { RunBlocks<4>(product); }
void RunBlocksAvx512VnniBits6(const BlockProduct& product) { RunBlocks<6>(product); }
void RunBlocksAvx512VnniBits8(const BlockProduct& product) { RunBlocks<8>(product); }

}  // namespace splitq
