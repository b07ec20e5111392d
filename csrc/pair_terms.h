// The preference losses of one pair from its sequence sums, for a kernel: DPO, and DPO with an SFT penalty (SPO).
//
// spo_kernels/losses holds their definitions and sources; a test holds this to them. With z = β margin:
//     loss = -log σ(z) + λ max(0, NLL - v - ε)    NLL = -chosen / length (or -chosen)
// where the `nll` penalty has neither the maximum nor v and ε.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace spo {

// Token log-probs of 2 * pairs sequences, chosen ones first: rows of `width` tokens, or with `bounds` packed ones.
struct PairTokens {
  const float* logp;
  const int64_t* labels;
  const void* bounds;  // optional, [2 * pairs + 1], of int32 or int64; clamped to the tokens that there are
  bool wide_bounds;    // int64
  int64_t pairs;
  int64_t tokens;
  int64_t width;
  int64_t ignore_index;
};

// What a pair's loss is made of; see PairForm of spo_kernels/backends/pair_form.py.
enum class Penalty : int { kNone = 0, kNll = 1, kHinge = 2 };

struct PairForm {
  const float* reference;  // optional, [2 * pairs] sequence sums
  const float* value;      // optional, [pairs]: v of the hinge; else the reference's own NLL
  float beta;
  bool use_reference;
  Penalty penalty;
  float weight;
  float epsilon;
  bool mean;
  float factor;
};

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

// A pair's column of the summary [7, pairs]: loss, rewards of chosen and rejected, their difference and order, sums.
SPO_HOST_DEVICE void write_summary(const PairTerms& terms, const PairSums& sums, float* summary, int64_t pairs,
                                   int64_t pair) {
  const float rows[] = {terms.loss,
                        terms.reward_chosen,
                        terms.reward_rejected,
                        terms.reward_chosen - terms.reward_rejected,
                        terms.reward_chosen > terms.reward_rejected ? 1.0f : 0.0f,
                        sums.chosen,
                        sums.rejected};
  for (int i = 0; i < 7; ++i) summary[i * pairs + pair] = rows[i];
}

struct Segment {
  int64_t start;
  int64_t stop;
};

SPO_HOST_DEVICE int64_t bound(const PairTokens& tokens, int64_t sequence) {
  if (tokens.wide_bounds) return static_cast<const int64_t*>(tokens.bounds)[sequence];
  return static_cast<const int32_t*>(tokens.bounds)[sequence];
}

SPO_HOST_DEVICE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : (x > high ? high : x); }

// Clamped to the tokens that there are: on a GPU the bounds' values were not looked at before the launch.
SPO_HOST_DEVICE Segment segment_of(const PairTokens& tokens, int64_t sequence) {
  if (tokens.bounds == nullptr) return {sequence * tokens.width, (sequence + 1) * tokens.width};
  const int64_t start = clamp(bound(tokens, sequence), 0, tokens.tokens);
  return {start, clamp(bound(tokens, sequence + 1), start, tokens.tokens)};
}

// One sequence's log-probs in double (in float, 512 in a row would lose up to 0.004 nat) and the labels that count.
struct Total {
  double sum;
  int64_t count;
};

// The sums of a pair from the totals of its sequences.
SPO_HOST_DEVICE PairSums pair_sums(const PairTokens& tokens, const PairForm& form, const Total& chosen,
                                   const Total& rejected, int64_t pair) {
  PairSums sums{};
  sums.chosen = static_cast<float>(chosen.sum);
  sums.rejected = static_cast<float>(rejected.sum);
  sums.chosen_length = chosen.count;
  if (form.reference != nullptr) {
    sums.ref_chosen = form.reference[pair];
    sums.ref_rejected = form.reference[pair + tokens.pairs];
  }
  return sums;
}

}  // namespace spo
