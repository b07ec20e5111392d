// Token log-probs to preference losses and per-token coefficients, pair by pair; formulas in csrc/pair_terms.h.
//
// One thread: 24 bytes a token are nothing beside the products of its logits.

#include "pair_loss.h"

namespace spo {
namespace {

Total total_of(const PairTokens& tokens, const Segment& segment) {
  Total total{};
  for (int64_t i = segment.start; i < segment.stop; ++i) {
    if (tokens.labels[i] == tokens.ignore_index) continue;
    total.sum += static_cast<double>(tokens.logp[i]);
    total.count += 1;
  }
  return total;
}

void store(const PairTokens& tokens, const Segment& segment, float value, float* coefficients) {
  for (int64_t i = segment.start; i < segment.stop; ++i)
    coefficients[i] = tokens.labels[i] == tokens.ignore_index ? 0.0f : value;
}

}  // namespace

void pair_loss(const PairTokens& tokens, const PairForm& form, float* summary, float* coefficients) {
  for (int64_t pair = 0; pair < tokens.pairs; ++pair) {
    const Segment chosen = segment_of(tokens, pair), rejected = segment_of(tokens, pair + tokens.pairs);
    const PairSums sums = pair_sums(tokens, form, total_of(tokens, chosen), total_of(tokens, rejected), pair);
    const PairTerms terms = pair_terms(form, sums, form.value != nullptr ? form.value[pair] : 0.0f);
    write_summary(terms, sums, summary, tokens.pairs, pair);
    store(tokens, chosen, form.factor * terms.slope_chosen, coefficients);
    store(tokens, rejected, form.factor * terms.slope_rejected, coefficients);
  }
}

}  // namespace spo
