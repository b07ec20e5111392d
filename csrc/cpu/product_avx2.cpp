#include "product.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#pragma GCC target("avx2,fma,f16c")
#include "product_blocks.h"

namespace spo {
namespace {

// 6 x 16: 12 of the 16 registers accumulate, 2 hold B, 2 broadcast A. Per k 12 multiply-adds (6 cycles at two a
// cycle) need 8 loads (4 cycles). Of a K block, 6 rows of A are 12 KiB (L1), 8 panels of B 256 KiB (L2).
struct FloatKernel {
  using Packed = float;
  static constexpr Scalar kScalar = Scalar::kFloat;
  using Units = __m256;
  static constexpr int kRows = 6, kColumns = 16, kDepth = 512, kStep = 1, kLanes = 8;
  static constexpr bool kRowPanels = true;
  static constexpr int kGroup = 8;

  template <Scalar kFrom>
  static inline float load(const void* data, int64_t index) {
    return to_float<kFrom>(data, index);
  }
  template <Scalar kFrom>
  static inline __m256 load_along_k(const void* data, int64_t index) {
    if constexpr (kFrom == Scalar::kFloat) return _mm256_loadu_ps(static_cast<const float*>(data) + index);
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + index));
    if constexpr (kFrom == Scalar::kHalf) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  template <Scalar kFrom>
  static inline void load_along_lanes(const void* data, int64_t index, int64_t, __m256* units) {
    units[0] = load_along_k<kFrom>(data, index);
    units[1] = load_along_k<kFrom>(data, index + kLanes);
  }
  static inline __m256 load_units(const float* from) { return _mm256_loadu_ps(from); }
  static inline void store_units(float* to, __m256 units) { _mm256_storeu_ps(to, units); }

  static inline void transpose(__m256 (&x)[kLanes]) {
    __m256 y[kLanes];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
      y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
        x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
      }
    // now x[4 q + c] holds column c + 4 p of rows 4 q .. 4 q + 3 in its half p
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      y[c] = _mm256_permute2f128_ps(x[c], x[c + 4], 0x20);
      y[c + 4] = _mm256_permute2f128_ps(x[c], x[c + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) x[i] = y[i];
  }

  // Four k take 83 instructions here, and 108 as a compiler made them of intrinsics. In a virtual machine on Zen 3
  // those fell at times to 0.75 of the speed, these to 0.85: probably while another thread took its half of the core's
  // six instructions a cycle. A k is 24 bytes of `a` and 64 of `b`.
  // clang-format off
#define SPO_ZERO(r) "vxorps %%xmm" #r ", %%xmm" #r ", %%xmm" #r "\n\t"
#define SPO_ROW(k, row, left, sum0, sum1)                             \
  "vbroadcastss 24*" #k "+4*" #row "(%[a]), %%ymm" #left "\n\t"       \
  "vfmadd231ps %%ymm0, %%ymm" #left ", %%ymm" #sum0 "\n\t"            \
  "vfmadd231ps %%ymm1, %%ymm" #left ", %%ymm" #sum1 "\n\t"
#define SPO_STEP(k)                                                   \
  "vmovaps 64*" #k "(%[b]), %%ymm0\n\t"                               \
  "vmovaps 64*" #k "+32(%[b]), %%ymm1\n\t"                            \
  SPO_ROW(k, 0, 2, 4, 5) SPO_ROW(k, 1, 3, 6, 7)                       \
  SPO_ROW(k, 2, 2, 8, 9) SPO_ROW(k, 3, 3, 10, 11)                     \
  SPO_ROW(k, 4, 2, 12, 13) SPO_ROW(k, 5, 3, 14, 15)
#define SPO_STORE(row, sum0, sum1)                                    \
  "vmovaps %%ymm" #sum0 ", 64*" #row "(%[sums])\n\t"                  \
  "vmovaps %%ymm" #sum1 ", 64*" #row "+32(%[sums])\n\t"
  static void sum_up(const float* a, const float* b, int64_t steps, float* sums) {
    int64_t fours = steps / 4, ones = steps % 4;
    asm volatile(
        SPO_ZERO(4) SPO_ZERO(5) SPO_ZERO(6) SPO_ZERO(7) SPO_ZERO(8) SPO_ZERO(9)
        SPO_ZERO(10) SPO_ZERO(11) SPO_ZERO(12) SPO_ZERO(13) SPO_ZERO(14) SPO_ZERO(15)
        "test %[fours], %[fours]\n\t"
        "jz 2f\n\t"
        ".p2align 5\n"
        "1:\n\t"
        SPO_STEP(0) SPO_STEP(1) SPO_STEP(2) SPO_STEP(3)
        "add $96, %[a]\n\t"
        "add $256, %[b]\n\t"
        "dec %[fours]\n\t"
        "jnz 1b\n"
        "2:\n\t"
        "test %[ones], %[ones]\n\t"
        "jz 4f\n"
        "3:\n\t"
        SPO_STEP(0)
        "add $24, %[a]\n\t"
        "add $64, %[b]\n\t"
        "dec %[ones]\n\t"
        "jnz 3b\n"
        "4:\n\t"
        SPO_STORE(0, 4, 5) SPO_STORE(1, 6, 7) SPO_STORE(2, 8, 9)
        SPO_STORE(3, 10, 11) SPO_STORE(4, 12, 13) SPO_STORE(5, 14, 15)
        : [a] "+r"(a), [b] "+r"(b), [fours] "+r"(fours), [ones] "+r"(ones)
        : [sums] "r"(sums)
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
          "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
  }
#undef SPO_ZERO
#undef SPO_ROW
#undef SPO_STEP
#undef SPO_STORE
  // clang-format on

  // Rows of A lie side by side, in a panel that begins with the first.
  static void multiply(const float* const* a, const float* b, int64_t steps, float* const* c, int64_t rows,
                       int64_t columns, bool accumulate) {
    for (int i = 0; i < kRows; ++i) {  // 16 columns are on one cache line or two
      _mm_prefetch(reinterpret_cast<const char*>(c[i]), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(c[i] + columns - 1), _MM_HINT_T0);
    }
    alignas(64) float sums[kRows][kColumns];
    sum_up(a[0], b, steps, sums[0]);
    if (rows == kRows && columns == kColumns) {
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < kColumns; j += kLanes) {
          const __m256 sum = _mm256_load_ps(sums[i] + j);
          _mm256_storeu_ps(c[i] + j, accumulate ? _mm256_add_ps(_mm256_loadu_ps(c[i] + j), sum) : sum);
        }
      return;
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) c[i][j] = accumulate ? c[i][j] + sums[i][j] : sums[i][j];
  }
};

}  // namespace

ProductFunction product_avx2() { return &product<FloatKernel, float>; }

}  // namespace spo
#else
namespace spo {
ProductFunction product_avx2() { return nullptr; }
}  // namespace spo
#endif
