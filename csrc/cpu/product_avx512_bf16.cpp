#include "product.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")
#include "product_avx512.h"

namespace spo {
namespace {

// A unit is a pair of k. Rounding is to nearest, ties to even; the machine flushes subnormals.
struct BFloat16s {
  using Packed = uint16_t;
  static constexpr Scalar kScalar = Scalar::kBFloat16;
  static constexpr int kSteps = 1024;

  template <Scalar kFrom>
  static inline uint16_t load(const void* data, int64_t index) {
    if constexpr (kFrom == Scalar::kBFloat16) return static_cast<const uint16_t*>(data)[index];
    const __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(to_float<kFrom>(data, index)));
    uint16_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return bits;
  }
  // 32 elements
  template <Scalar kFrom>
  static inline __m512i load_along_k(const void* data, int64_t index) {
    if constexpr (kFrom == Scalar::kBFloat16) return _mm512_loadu_si512(static_cast<const uint16_t*>(data) + index);
    return (__m512i)_mm512_cvtne2ps_pbh(load_floats<kFrom>(data, index + 16), load_floats<kFrom>(data, index));
  }
  template <Scalar kFrom>
  static inline void load_along_lanes(const void* data, int64_t even, int64_t odd, __m512i* units) {
    const __m512i first = load_along_k<kFrom>(data, even), second = load_along_k<kFrom>(data, odd);
    // words 0 and 32, 1 and 33, .. of both together; then the same from word 16 on
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i low =
        _mm512_add_epi32(_mm512_or_si512(lane, _mm512_slli_epi32(lane, 16)), _mm512_set1_epi32(32 << 16));
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(16 << 16 | 16));
    units[0] = _mm512_permutex2var_epi16(first, low, second);
    units[1] = _mm512_permutex2var_epi16(first, high, second);
  }
  static inline __m256i rounded(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }
  static inline __m512 multiply_add(__m512i left, __m512i right, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
};

}  // namespace

ProductFunction product_avx512_bf16() {
  return
      [](const Operand& a, const Operand& b, const Result& c, const ProductShape& shape, bool accumulate, int threads) {
        using Kernel = Kernel512<BFloat16s>;
        static_assert(Kernel::kDepth >= kRoundedDepth);
        const auto run = c.scalar == Scalar::kBFloat16 ? &product<Kernel, uint16_t> : &product<Kernel, float>;
        run(a, b, c, shape, accumulate, threads);
      };
}

}  // namespace spo
#else
namespace spo {
ProductFunction product_avx512_bf16() { return nullptr; }
}  // namespace spo
#endif
