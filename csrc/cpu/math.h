// Branch-free functions of float, written so that the compiler vectorises loops over them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define SPO_INLINE inline __attribute__((always_inline))

namespace spo {

// e^x for x <= 88, within 2 ulp; 0 below -87 (where float results leave the normal range); nan stays nan.
// x = k ln2 + r with |r| <= ln2/2; the Taylor polynomial of degree 7 is exact to 7e-9 there.
SPO_INLINE float fast_exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  const float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = clamped * 1.44269504088896341f + kRound;
  const float k = shifted - kRound;
  // ln2 in two parts: k times the first is exact
  float r = clamped - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  float poly = 1.0f / 5040.0f;
  poly = poly * r + 1.0f / 720.0f;
  poly = poly * r + 1.0f / 120.0f;
  poly = poly * r + 1.0f / 24.0f;
  poly = poly * r + 1.0f / 6.0f;
  poly = poly * r + 0.5f;
  poly = poly * r + 1.0f;
  poly = poly * r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  // the low bits of `shifted` hold k; move k into the exponent of 1.0f
  const uint32_t exponent = (static_cast<uint32_t>(bits) << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  return x < -87.0f ? 0.0f : poly * power;
}

struct BFloat16 {
  uint16_t bits;
};

SPO_INLINE void round_to(float value, float& to) { to = value; }

// To nearest, ties to even; nan stays nan.
SPO_INLINE void round_to(float value, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

SPO_INLINE float to_float(float value) { return value; }
SPO_INLINE float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// What scalar.h needs of a CPU.
struct CpuMath {
  static SPO_INLINE float exp(float x) { return fast_exp(x); }
  static SPO_INLINE float divide(float a, float b) { return a / b; }
};

}  // namespace spo
