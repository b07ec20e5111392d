// Token log-probs to preference losses and per-token coefficients in one launch, one block per pair; formulas as in
// spo_kernels/backends/triton/pair_loss.py, written once more in csrc/pair_terms.h.
//
// Bytes moved per token: 12 read (log-prob, label), then 8 read and 4 written (label, coefficient); none per logit.

#include "../pair_terms.h"
#include "device.cuh"

namespace spo {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

__device__ __forceinline__ Total thread_total(const PairTokens& tokens, const Segment& segment) {
  Total total{};
  for (int64_t i = segment.start + threadIdx.x; i < segment.stop; i += kThreads) {
    if (tokens.labels[i] == tokens.ignore_index) continue;
    total.sum += static_cast<double>(tokens.logp[i]);
    total.count += 1;
  }
  return total;
}

// Both totals over all threads, for every thread; called once in a kernel, by all of them.
__device__ __forceinline__ void block_totals(Total (&totals)[2]) {
  __shared__ Total warps[2][kWarps];
  for (int s = 0; s < 2; ++s) {
    const Total warp{lanes_sum(totals[s].sum), lanes_sum(totals[s].count)};
    if (threadIdx.x % kWarp == 0) warps[s][threadIdx.x / kWarp] = warp;
  }
  __syncthreads();
  for (int s = 0; s < 2; ++s) {
    totals[s] = {};
    for (const Total& warp : warps[s]) {
      totals[s].sum += warp.sum;
      totals[s].count += warp.count;
    }
  }
}

__device__ __forceinline__ void store_coefficients(const PairTokens& tokens, const Segment& segment, float value,
                                                   float* coefficients) {
  for (int64_t i = segment.start + threadIdx.x; i < segment.stop; i += kThreads) {
    coefficients[i] = tokens.labels[i] == tokens.ignore_index ? 0.0f : value;
  }
}

__global__ void __launch_bounds__(kThreads)
    pair_loss_kernel(PairTokens tokens, PairForm form, float* summary, float* coefficients) {
  const int64_t pairs = tokens.pairs, pair = blockIdx.x;
  const Segment chosen = segment_of(tokens, pair), rejected = segment_of(tokens, pair + pairs);
  Total totals[2] = {thread_total(tokens, chosen), thread_total(tokens, rejected)};
  block_totals(totals);

  const PairSums sums = pair_sums(tokens, form, totals[0], totals[1], pair);
  const float value = form.value != nullptr ? form.value[pair] : 0.0f;
  const PairTerms terms = pair_terms(form, sums, value);
  if (threadIdx.x == 0) write_summary(terms, sums, summary, pairs, pair);
  store_coefficients(tokens, chosen, form.factor * terms.slope_chosen, coefficients);
  store_coefficients(tokens, rejected, form.factor * terms.slope_rejected, coefficients);
}

}  // namespace

void pair_loss(const PairTokens& tokens, const PairForm& form, float* summary, float* coefficients,
               const Queue& queue) {
  launch("pair_loss", {tokens.pairs, tokens.tokens}, pair_loss_kernel, tokens.pairs, dim3(kThreads), queue, tokens,
         form, summary, coefficients);
}

}  // namespace spo
