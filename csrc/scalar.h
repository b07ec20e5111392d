// The tile kernels' arithmetic on one logit or one row, the same on a CPU and on a GPU.
//
// `Math` brings what differs between them: static `exp(x)` and `divide(a, b)`.
#pragma once

#include <cmath>
#include <cstdint>

#include "tile.h"

#ifdef __CUDACC__
#define SPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPO_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace spo {

constexpr float kMinusInf = -HUGE_VALF;

// tanh(x), relative error below 2e-7. Near 0 an odd polynomial (minimax fit of (tanh(x)/x - 1)/x^2 on
// |x| < 0.625, 2e-8), elsewhere 1 - 2/(e^{2|x|} + 1), which would cancel near 0.
template <typename Math>
SPO_HOST_DEVICE float tanh_of(float x) {
  const float a = fabsf(x);
  const float t = x * x;
  float poly = -6.104945778791928e-3f;
  poly = poly * t + 2.100363925866059e-2f;
  poly = poly * t - 5.385249689370352e-2f;
  poly = poly * t + 1.3332782257758055e-1f;
  poly = poly * t - 3.333332909943444e-1f;
  const float near = x + x * t * poly;
  const float far = copysignf(1.0f - Math::divide(2.0f, Math::exp(2.0f * a) + 1.0f), x);
  return a < 0.625f ? near : far;
}

// 1 / softcap, or 0 without one.
SPO_HOST_DEVICE float inverse_cap(const LogitTransform& f) { return f.softcap != 0.0f ? 1.0f / f.softcap : 0.0f; }

// d logit / d product, from the logit; without a softcap (inverse_cap 0) the logit may be -inf.
SPO_HOST_DEVICE float slope(float logit, float scale, float inverse_cap) {
  const float ratio = inverse_cap == 0.0f ? 0.0f : logit * inverse_cap;
  return scale * (1.0f - ratio * ratio);
}

// What exponentials are taken relative to: a row whose columns so far are all -inf would otherwise give
// exp(-inf + inf) = nan.
SPO_HOST_DEVICE float finite_base(float max) { return max == kMinusInf ? 0.0f : max; }

// e^s s for s = logit - base, where exp(-inf) * -inf counts as 0.
SPO_HOST_DEVICE float moment(float exponential, float shifted) {
  return exponential == 0.0f ? 0.0f : exponential * shifted;
}

// Σ e^s, Σ e^s s and Σ e^2s of some logits, with s = logit - base.
template <typename Real>
struct Sums {
  Real sum;
  Real shifted;
  Real square;
};

// The same sums about another base: `drop` is the old base minus the new, `shrink` its exponential.
template <typename Real>
SPO_HOST_DEVICE Sums<Real> rebased(const Sums<Real>& s, float drop, float shrink) {
  // with no column seen, drop is -inf and nothing moves
  const Real moved = s.sum == 0 ? 0 : s.sum * drop;
  return {s.sum * shrink, (s.shifted + moved) * shrink, s.square * shrink * shrink};
}

template <typename Real>
SPO_HOST_DEVICE Sums<Real> operator+(const Sums<Real>& a, const Sums<Real>& b) {
  return {a.sum + b.sum, a.shifted + b.shifted, a.square + b.square};
}

// One row of TokenGrads: what flows into its logp, entropy and log Σ p², and `weight`, the factor of p.
struct RowGrads {
  float lse;
  float lse_rest;
  float weight;
  float logp;
  float to_entropy;
  float entropy;
  float to_log_sum_p2;
  float log_sum_p2;
};

SPO_HOST_DEVICE float value_or_zero(const float* values, int64_t row) { return values != nullptr ? values[row] : 0.0f; }

SPO_HOST_DEVICE RowGrads row_grads(const TokenGrads& grads, int64_t row) {
  RowGrads g{};
  g.lse = grads.lse[row];
  g.lse_rest = value_or_zero(grads.lse_rest, row);
  g.logp = value_or_zero(grads.grad_logp, row);
  g.to_entropy = value_or_zero(grads.grad_entropy, row);
  g.entropy = value_or_zero(grads.entropy, row);
  g.to_log_sum_p2 = value_or_zero(grads.grad_log_sum_p2, row);
  g.log_sum_p2 = value_or_zero(grads.log_sum_p2, row);
  g.weight = value_or_zero(grads.grad_lse, row) - g.logp - 2.0f * g.to_log_sum_p2;
  return g;
}

// d loss / d logit, but for logp's part at the label; kMoments: something flows into entropy or log Σ p².
template <typename Math, bool kMoments>
SPO_HOST_DEVICE float logit_grad(float logit, const RowGrads& g) {
  const float log_p = (logit - g.lse) - g.lse_rest;
  const float p = Math::exp(log_p);
  float grad = p * g.weight;
  if (kMoments) {
    // where p is 0, p log p is 0 too, not 0 * -inf
    grad -= p == 0.0f ? 0.0f : g.to_entropy * p * (log_p + g.entropy);
    grad += 2.0f * g.to_log_sum_p2 * Math::exp(2.0f * log_p - g.log_sum_p2);
  }
  return grad;
}

}  // namespace spo
