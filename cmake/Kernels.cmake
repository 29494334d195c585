# The kernels: what knows no ONNX Runtime. One list for the library and for tests/cpp.
#
# splitq_add_kernels(NAME) makes the object library NAME of them.

get_filename_component(SPLITQ_KERNEL_DIR ${CMAKE_CURRENT_LIST_DIR}/../runtime_ops ABSOLUTE)

# Flags of an instruction set belong to its own files and to no other: the library must run on
# other processors than the one that built it. No -march=native.
include(CheckCXXSourceCompiles)
set(CMAKE_REQUIRED_FLAGS "-mavx2 -mfma")
check_cxx_source_compiles("
  #if !defined(__GNUC__) || !defined(__x86_64__)
  #error the AVX2 kernels are for x86-64, GCC and Clang
  #endif
  #include <immintrin.h>
  int main() { return _mm256_movemask_epi8(_mm256_abs_epi8(_mm256_set1_epi8(1))); }
" SPLITQ_HAS_AVX2)
set(CMAKE_REQUIRED_FLAGS "-march=armv8.2-a+dotprod+i8mm")
check_cxx_source_compiles("
  #if !defined(__GNUC__) || !defined(__aarch64__) || defined(__AARCH64EB__)
  #error the NEON kernels are for little-endian ARM64, GCC and Clang
  #endif
  #include <arm_neon.h>
  int main() {
    const int8x16_t ones = vdupq_n_s8(1);
    int32x4_t sums = vdotq_laneq_s32(vdupq_n_s32(0), ones, ones, 0);
    return vaddvq_s32(vmmlaq_s32(sums, ones, ones));
  }
" SPLITQ_HAS_NEON)
unset(CMAKE_REQUIRED_FLAGS)

set(SPLITQ_AVX512VNNI_FLAGS -mfma -mavx512f -mavx512bw -mavx512vl -mavx512vnni)
string(JOIN " " CMAKE_REQUIRED_FLAGS ${SPLITQ_AVX512VNNI_FLAGS})
check_cxx_source_compiles("
  #if !defined(__GNUC__) || !defined(__x86_64__)
  #error the AVX-512 kernels are for x86-64, GCC and Clang
  #endif
  #include <immintrin.h>
  int main() {
    const __m512i one = _mm512_set1_epi8(1);
    return _mm_cvtsi128_si32(_mm512_castsi512_si128(_mm512_dpbusd_epi32(one, one, one)));
  }
" SPLITQ_HAS_AVX512VNNI)
unset(CMAKE_REQUIRED_FLAGS)

function(splitq_add_kernels name)
  set(sources
    attention/attention.cc
    attention/table.cc
    cpu/features.cc
    gate/swiglu.cc
    gemm/scalar.cc
    gemm/scalar_terms.cc
    gemm/table.cc
    norm/skip_norm.cc
    pack/checksum.cc
    pack/pack.cc
    pack/shared_payload.cc
    quantize/gather.cc
    quantize/kronecker.cc
    quantize/rows.cc
    quantize/scalar_product.cc
    quantize/scalar_rows.cc
    quantize/table.cc
    linear/activation.cc
    linear/apply_correction.cc
    linear/code_rows.cc
    linear/correction.cc
    linear/panel_terms.cc
    linear/split_linear.cc
  )
  set(avx2
    gemm/avx2_6_bits.cc
    gemm/avx2_8_bits.cc
    gemm/avx2_low_bits.cc
    gemm/avx2_terms.cc
    quantize/avx2_rows.cc
  )
  set(avx2_fma quantize/avx2_product.cc)
  set(avx2_loops attention/avx2_attention.cc gate/avx2_swiglu.cc norm/avx2_skip_norm.cc)
  set(avx512vnni_loops attention/avx512vnni_attention.cc)
  set(avx512vnni gemm/avx512vnni.cc quantize/avx512vnni_product.cc quantize/avx512vnni_rows.cc)
  set(neon
    gemm/neon_gemm.cc
    gemm/neon_terms.cc
    quantize/neon_product.cc
    quantize/neon_rows.cc
  )
  set(dotprod gemm/dotprod_gemm.cc)
  set(i8mm gemm/i8mm_gemm.cc)
  list(TRANSFORM sources PREPEND ${SPLITQ_KERNEL_DIR}/)
  list(TRANSFORM avx2 PREPEND ${SPLITQ_KERNEL_DIR}/)
  list(TRANSFORM avx2_fma PREPEND ${SPLITQ_KERNEL_DIR}/)
  list(TRANSFORM avx2_loops PREPEND ${SPLITQ_KERNEL_DIR}/)
  list(TRANSFORM neon PREPEND ${SPLITQ_KERNEL_DIR}/)
  list(TRANSFORM dotprod PREPEND ${SPLITQ_KERNEL_DIR}/)
  list(TRANSFORM i8mm PREPEND ${SPLITQ_KERNEL_DIR}/)
  list(TRANSFORM avx512vnni PREPEND ${SPLITQ_KERNEL_DIR}/)
  list(TRANSFORM avx512vnni_loops PREPEND ${SPLITQ_KERNEL_DIR}/)
  add_library(${name} OBJECT ${sources})
  if(NOT MSVC)  # its loop has a minimum and a maximum, which GCC else leaves as branches
    set_source_files_properties(${SPLITQ_KERNEL_DIR}/attention/table.cc
      ${SPLITQ_KERNEL_DIR}/gate/swiglu.cc PROPERTIES
      COMPILE_OPTIONS -fno-trapping-math)
  endif()
  if(SPLITQ_HAS_AVX2)
    target_sources(${name} PRIVATE ${avx2} ${avx2_fma} ${avx2_loops})
    set_source_files_properties(${avx2} PROPERTIES COMPILE_OPTIONS "-mavx2;-fno-exceptions")
    set_source_files_properties(${avx2_fma} PROPERTIES
      COMPILE_OPTIONS "-mavx2;-mfma;-fno-exceptions")
    set_source_files_properties(${avx2_loops} PROPERTIES
      COMPILE_OPTIONS "-mavx2;-fno-exceptions;-fno-trapping-math")
    target_compile_definitions(${name} PRIVATE SPLITQ_AVX2)
  endif()
  if(SPLITQ_HAS_NEON)  # plain NEON needs no flag on ARM64
    target_sources(${name} PRIVATE ${neon} ${dotprod} ${i8mm})
    set(options -fno-exceptions)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # It moves loads ahead before registers are given out; the sums of a tile then go to memory.
      list(APPEND options -fno-schedule-insns)
    endif()
    set_source_files_properties(${neon} PROPERTIES COMPILE_OPTIONS "${options}")
    set_source_files_properties(${dotprod} PROPERTIES
      COMPILE_OPTIONS "-march=armv8.2-a+dotprod;${options}")
    set_source_files_properties(${i8mm} PROPERTIES
      COMPILE_OPTIONS "-march=armv8.2-a+i8mm;${options}")
    target_compile_definitions(${name} PRIVATE SPLITQ_NEON)
  endif()
  if(SPLITQ_HAS_AVX512VNNI)
    target_sources(${name} PRIVATE ${avx512vnni} ${avx512vnni_loops})
    # GCC takes the undefined operands inside its own intrinsics for a mistake.
    set(quiet "-Wno-uninitialized;-Wno-maybe-uninitialized")
    set_source_files_properties(${avx512vnni} PROPERTIES COMPILE_OPTIONS
      "${SPLITQ_AVX512VNNI_FLAGS};-fno-exceptions;${quiet}")
    set_source_files_properties(${avx512vnni_loops} PROPERTIES COMPILE_OPTIONS
      "${SPLITQ_AVX512VNNI_FLAGS};-mprefer-vector-width=512;-fno-exceptions;-fno-trapping-math;${quiet}")
    target_compile_definitions(${name} PRIVATE SPLITQ_AVX512VNNI)
  endif()
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  splitq_compile_options(${name})
endfunction()

# No fused multiply-add but where a file asks for one, and no reordering: the integers must be the
# same on every processor.
function(splitq_compile_options name)
  set_target_properties(${name} PROPERTIES
    CXX_STANDARD 17
    CXX_STANDARD_REQUIRED ON
    CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
  )
  target_include_directories(${name} PRIVATE ${SPLITQ_KERNEL_DIR})
  if(MSVC)
    target_compile_options(${name} PRIVATE /W4 /fp:precise)
  else()
    target_compile_options(${name} PRIVATE -Wall -Wextra -ffp-contract=off)
  endif()
endfunction()
