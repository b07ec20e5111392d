// Branch-free exp and tanh for float, written so that the compiler vectorises loops over them.
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

// tanh(x), relative error below 2e-7. Near 0 an odd polynomial (minimax fit of (tanh(x)/x - 1)/x^2 on
// |x| < 0.625, 2e-8), elsewhere 1 - 2/(e^{2|x|} + 1), which would cancel near 0.
SPO_INLINE float fast_tanh(float x) {
  const float a = std::fabs(x);
  const float t = x * x;
  float poly = -6.104945778791928e-3f;
  poly = poly * t + 2.100363925866059e-2f;
  poly = poly * t - 5.385249689370352e-2f;
  poly = poly * t + 1.3332782257758055e-1f;
  poly = poly * t - 3.333332909943444e-1f;
  const float near = x + x * t * poly;
  const float far = std::copysign(1.0f - 2.0f / (fast_exp(2.0f * a) + 1.0f), x);
  return a < 0.625f ? near : far;
}

}  // namespace spo
