// What the AVX-512 micro-kernels share; included by one file per instruction set.
#pragma once

#include "product_blocks.h"

namespace spo {
namespace {

constexpr int kVectorLanes = 16;

// In steps of 1, 2, 4 and 8: exchange between vectors what lies across the diagonal of a square of that size.
inline void transpose_units(__m512i (&x)[kVectorLanes]) {
  __m512i y[kVectorLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  // now x[4 q + c] holds column c + 4 p of rows 4 q .. 4 q + 3 in its quarter p
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(x[c], x[c + 4], 0x44),
                  high01 = _mm512_shuffle_i32x4(x[c], x[c + 4], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(x[c + 8], x[c + 12], 0x44),
                  high23 = _mm512_shuffle_i32x4(x[c + 8], x[c + 12], 0xee);
    y[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    y[c + 4] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    y[c + 8] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    y[c + 12] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// 6 x 64: 24 of the 32 registers accumulate, 4 hold B, the rest broadcast A. Per step 24 multiply-adds (12 cycles at
// two a cycle) need 10 loads (5 cycles). Of a block of 512 or 1024 steps, a panel of B is 128 or 256 KiB (L2).
template <typename Scalars>
struct Kernel512 : Scalars {
  using Packed = typename Scalars::Packed;
  using Units = __m512i;
  static constexpr int kRows = 6, kColumns = 64, kLanes = kVectorLanes, kStep = 4 / sizeof(Packed);
  static constexpr int kDepth = Scalars::kSteps * kStep, kVectors = kColumns / kLanes;
  static constexpr bool kRowPanels = false;
  static constexpr int kGroup = 1;

  static inline Units load_units(const Packed* from) { return _mm512_loadu_si512(from); }
  static inline void store_units(Packed* to, Units units) { _mm512_store_si512(to, units); }
  static inline void transpose(Units (&units)[kLanes]) { transpose_units(units); }

  template <typename Out>
  static void multiply(const Packed* const* a, const Packed* b, int64_t steps, Out* const* c, int64_t rows,
                       int64_t columns, bool accumulate) {
    __m512 sum[kRows][kVectors];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        sum[i][j] = _mm512_setzero_ps();
        if (j * kLanes < columns) _mm_prefetch(reinterpret_cast<const char*>(c[i] + j * kLanes), _MM_HINT_T0);
      }
    for (int64_t k = 0; k < steps; ++k, b += kColumns * kStep) {
      __m512i right[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) right[j] = _mm512_load_si512(b + kLanes * kStep * j);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        int32_t unit;
        std::memcpy(&unit, a[i] + k * kStep, sizeof unit);
        const __m512i left = _mm512_set1_epi32(unit);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] = Scalars::multiply_add(left, right[j], sum[i][j]);
      }
    }
    if (rows == kRows && columns == kColumns) {
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) store(c[i] + kLanes * j, sum[i][j], 0xffff, accumulate);
      return;
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int j = 0; kLanes * j < columns; ++j) {
        const int64_t left = columns - kLanes * j;
        const __mmask16 mask = left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        store(c[i] + kLanes * j, sum[i][j], mask, accumulate);
      }
  }

  static inline void store(float* place, __m512 value, __mmask16 mask, bool accumulate) {
    if (accumulate) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, place));
    _mm512_mask_storeu_ps(place, mask, value);
  }
  // nothing is added to what has been rounded
  static inline void store(uint16_t* place, __m512 value, __mmask16 mask, bool) {
    _mm256_mask_storeu_epi16(place, mask, Scalars::rounded(value));
  }
};

// 16 elements as float
template <Scalar kScalar>
inline __m512 load_floats(const void* data, int64_t index) {
  if constexpr (kScalar == Scalar::kFloat) {
    return _mm512_loadu_ps(static_cast<const float*>(data) + index);
  } else {
    const __m256i bits =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + index));
    if constexpr (kScalar == Scalar::kHalf) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
}

}  // namespace
}  // namespace spo
