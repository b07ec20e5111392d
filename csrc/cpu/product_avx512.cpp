#include "product.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#include "product_blocks.h"

namespace spo {
namespace {

constexpr int kLanes = 16;

template <int kRows, int kVectors>
inline void store_block(const __m512 (&sum)[kRows][kVectors], float* const* c, int64_t rows, int64_t columns,
                        bool accumulate) {
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; kLanes * j < columns; ++j) {
      const int64_t left = columns - kLanes * j;
      const __mmask16 mask = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      float* place = c[i] + kLanes * j;
      __m512 value = sum[i][j];
      if (accumulate) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, place));
      _mm512_mask_storeu_ps(place, mask, value);
    }
}

// 6 x 64: 24 of the 32 registers accumulate, 4 hold B, the rest broadcast A. Per k 24 multiply-adds (12 cycles at
// two a cycle) need 10 loads (5 cycles). A panel of A is 6 x 512 x 4 = 12 KiB (L1), one of B 128 KiB (L2).
struct FloatKernel {
  using Packed = float;
  static constexpr int kRows = 6, kColumns = 64, kDepth = 512, kStep = 1;
  static constexpr int kVectors = kColumns / kLanes;

  template <Scalar kScalar>
  static inline float load(const void* data, int64_t index) {
    return to_float<kScalar>(data, index);
  }

  static inline void multiply(const float* a, const float* b, int64_t steps, float* const* c, int64_t rows,
                              int64_t columns, bool accumulate) {
    __m512 sum[kRows][kVectors];
    for (auto& row : sum)
      for (auto& vector : row) vector = _mm512_setzero_ps();
    for (int64_t k = 0; k < steps; ++k, a += kRows, b += kColumns) {
      __m512 right[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) right[j] = _mm512_load_ps(b + kLanes * j);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const __m512 left = _mm512_set1_ps(a[i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_fmadd_ps(left, right[j], sum[i][j]);
      }
    }
    store_block(sum, c, rows, columns, accumulate);
  }
};

// The same shape; a step multiplies pairs of k, so a panel of A is 6 x 1024 x 2 = 12 KiB and one of B 128 KiB.
struct BFloat16Kernel {
  using Packed = uint16_t;
  static constexpr int kRows = 6, kColumns = 64, kDepth = 1024, kStep = 2;
  static constexpr int kVectors = kColumns / kLanes;

  template <Scalar kScalar>
  static inline uint16_t load(const void* data, int64_t index) {
    if constexpr (kScalar == Scalar::kBFloat16) return static_cast<const uint16_t*>(data)[index];
    const float value = to_float<kScalar>(data, index);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // to nearest, ties to even; rounding a nan's bits could carry into its sign
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return static_cast<uint16_t>((value != value ? (bits | 0x400000u) : rounded) >> 16);
  }

  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c"))) static void multiply(
      const uint16_t* a, const uint16_t* b, int64_t steps, float* const* c, int64_t rows, int64_t columns,
      bool accumulate) {
    __m512 sum[kRows][kVectors];
    for (auto& row : sum)
      for (auto& vector : row) vector = _mm512_setzero_ps();
    for (int64_t k = 0; k < steps; ++k, a += kRows * kStep, b += kColumns * kStep) {
      __m512bh right[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) right[j] = (__m512bh)_mm512_load_si512(b + kLanes * kStep * j);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        int32_t pair;
        std::memcpy(&pair, a + kStep * i, sizeof pair);
        const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
      }
    }
    store_block(sum, c, rows, columns, accumulate);
  }
};

}  // namespace

ProductFunction product_avx512() { return &product<FloatKernel>; }
ProductFunction product_avx512_bf16() { return &product<BFloat16Kernel>; }

}  // namespace spo
#else
namespace spo {
ProductFunction product_avx512() { return nullptr; }
ProductFunction product_avx512_bf16() { return nullptr; }
}  // namespace spo
#endif
