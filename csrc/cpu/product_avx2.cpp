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

constexpr int kLanes = 8;

// 6 x 16: 12 of the 16 registers accumulate, 2 hold B, 2 broadcast A. Per k 12 multiply-adds (6 cycles at two a
// cycle) need 8 loads (4 cycles). A panel of A is 6 x 512 x 4 = 12 KiB (L1), one of B 32 KiB (L2).
struct FloatKernel {
  using Packed = float;
  static constexpr int kRows = 6, kColumns = 16, kDepth = 512, kStep = 1;
  static constexpr int kVectors = kColumns / kLanes;

  template <Scalar kScalar>
  static inline float load(const void* data, int64_t index) {
    return to_float<kScalar>(data, index);
  }

  static inline void multiply(const float* a, const float* b, int64_t steps, float* const* c, int64_t rows,
                              int64_t columns, bool accumulate) {
    __m256 sum[kRows][kVectors];
    for (auto& row : sum)
      for (auto& vector : row) vector = _mm256_setzero_ps();
    for (int64_t k = 0; k < steps; ++k, a += kRows, b += kColumns) {
      const __m256 first = _mm256_load_ps(b), second = _mm256_load_ps(b + kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const __m256 left = _mm256_broadcast_ss(a + i);
        sum[i][0] = _mm256_fmadd_ps(left, first, sum[i][0]);
        sum[i][1] = _mm256_fmadd_ps(left, second, sum[i][1]);
      }
    }
    float block[kRows][kColumns];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) _mm256_storeu_ps(block[i] + kLanes * j, sum[i][j]);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        c[i][j] = accumulate ? c[i][j] + block[i][j] : block[i][j];
  }
};

}  // namespace

ProductFunction product_avx2() { return &product<FloatKernel>; }

}  // namespace spo
#else
namespace spo {
ProductFunction product_avx2() { return nullptr; }
}  // namespace spo
#endif
