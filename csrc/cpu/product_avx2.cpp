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
// cycle) need 8 loads (4 cycles). Of a K block, 6 rows of A are 12 KiB (L1), a panel of B 32 KiB (L2).
struct FloatKernel {
  using Packed = float;
  static constexpr Scalar kScalar = Scalar::kFloat;
  using Units = __m256;
  static constexpr int kRows = 6, kColumns = 16, kDepth = 512, kStep = 1, kLanes = 8;
  static constexpr int kVectors = kColumns / kLanes;

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
  static inline void store_units(float* to, __m256 units) { _mm256_store_ps(to, units); }

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

  static void multiply(const float* const* a, const float* b, int64_t steps, float* const* c, int64_t rows,
                       int64_t columns, bool accumulate) {
    __m256 sum[kRows][kVectors];
    for (auto& row : sum)
      for (auto& vector : row) vector = _mm256_setzero_ps();
    for (int64_t k = 0; k < steps; ++k, b += kColumns) {
      const __m256 first = _mm256_load_ps(b), second = _mm256_load_ps(b + kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const __m256 left = _mm256_broadcast_ss(a[i] + k);
        sum[i][0] = _mm256_fmadd_ps(left, first, sum[i][0]);
        sum[i][1] = _mm256_fmadd_ps(left, second, sum[i][1]);
      }
    }
    float block[kRows][kColumns];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) _mm256_storeu_ps(block[i] + kLanes * j, sum[i][j]);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) c[i][j] = accumulate ? c[i][j] + block[i][j] : block[i][j];
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
