// The preference losses of one pair from its sequence sums, for a kernel: DPO, and DPO with an SFT penalty (SPO).
//
// spo_kernels/losses holds their definitions and sources; a test holds this to them. With z = β margin:
//     loss = -log σ(z) + λ max(0, NLL - v - ε)    NLL = -chosen / length (or -chosen)
// where the `nll` penalty has neither the maximum nor v and ε.
#pragma once

#include "cuda/tiles.h"
#include "scalar.h"

namespace spo {

struct PairSums {
  float chosen;
  float rejected;
  float ref_chosen;
  float ref_rejected;
  int64_t chosen_length;
};

struct PairTerms {
  float loss;
  float slope_chosen;  // d loss / d chosen
  float slope_rejected;
  float reward_chosen;
  float reward_rejected;
};

// log(1 + e^x)
SPO_HOST_DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

SPO_HOST_DEVICE PairTerms pair_terms(const PairForm& form, const PairSums& s, float value) {
  float margin = s.chosen - s.rejected;
  if (form.use_reference) margin -= s.ref_chosen - s.ref_rejected;
  const float z = form.beta * margin;
  PairTerms terms{};
  terms.loss = softplus(-z);
  terms.slope_rejected = form.beta / (1.0f + expf(z));
  terms.slope_chosen = -terms.slope_rejected;
  if (form.penalty != Penalty::kNone) {
    float share = form.mean ? 1.0f / static_cast<float>(s.chosen_length > 1 ? s.chosen_length : 1) : 1.0f;
    float excess = -s.chosen * share;
    if (form.penalty == Penalty::kHinge) {
      excess -= (form.value != nullptr ? value : -s.ref_chosen * share) + form.epsilon;
      // nan stays nan; at 0 the gradient flows, as through clamp_min
      share = excess >= 0.0f ? share : 0.0f;
      excess = excess < 0.0f ? 0.0f : excess;
    }
    terms.loss += form.weight * excess;
    terms.slope_chosen -= form.weight * share;
  }
  terms.reward_chosen = form.beta * (s.chosen - s.ref_chosen);
  terms.reward_rejected = form.beta * (s.rejected - s.ref_rejected);
  return terms;
}

}  // namespace spo
