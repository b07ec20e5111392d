// The pair loss on a CPU. Raw pointers; the caller has checked shapes, dtypes and strides.
#pragma once

#include "../pair_terms.h"

namespace spo {

// `summary` [7, pairs]: see write_summary; `coefficients`, one per token: factor * d loss / d logp.
void pair_loss(const PairTokens& tokens, const PairForm& form, float* summary, float* coefficients);

}  // namespace spo
