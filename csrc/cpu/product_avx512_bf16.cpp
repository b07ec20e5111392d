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

  template <Scalar kScalar>
  static inline uint16_t load(const void* data, int64_t index) {
    if constexpr (kScalar == Scalar::kBFloat16) return static_cast<const uint16_t*>(data)[index];
    const __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(to_float<kScalar>(data, index)));
    uint16_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return bits;
  }
  template <Scalar kScalar>
  static inline __m512i load_along_k(const void* data, int64_t index) {
    if constexpr (kScalar == Scalar::kBFloat16)
      return _mm512_loadu_si512(static_cast<const uint16_t*>(data) + index);
    return (__m512i)_mm512_cvtne2ps_pbh(load_floats<kScalar>(data, index + 16), load_floats<kScalar>(data, index));
  }
  template <Scalar kScalar>
  static inline __m512i load_along_lanes(const void* data, int64_t even, int64_t odd) {
    if constexpr (kScalar == Scalar::kBFloat16) {
      const auto load = [data](int64_t index) {
        const auto* from = static_cast<const uint16_t*>(data) + index;
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      };
      return _mm512_or_si512(load(even), _mm512_slli_epi32(load(odd), 16));
    }
    const __m512i one_by_one = (__m512i)_mm512_cvtne2ps_pbh(load_floats<kScalar>(data, odd),
                                                            load_floats<kScalar>(data, even));
    // word i of the even and word i of the odd k, side by side
    const __m512i pairs = _mm512_or_si512(
        _mm512_cvtepu16_epi32(_mm512_castsi512_si256(one_by_one)),
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(one_by_one, 1)), 16));
    return pairs;
  }
  static inline __m512 multiply_add(__m512i left, __m512i right, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
};

}  // namespace

ProductFunction product_avx512_bf16() { return &product<Kernel512<BFloat16s>>; }

}  // namespace spo
#else
namespace spo {
ProductFunction product_avx512_bf16() { return nullptr; }
}  // namespace spo
#endif
