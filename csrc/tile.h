// What every C++ and CUDA tile kernel is given: see spo_kernels/backends/contract.py for the meaning of each value.
#pragma once

#include <cstdint>

namespace spo {

// What a matrix holds, by the numbers of Scalar in spo_kernels/backends/contract.py.
enum class Scalar : int { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

// logit = softcap(scale * (product + bias)), softcap(x) = c tanh(x / c); softcap == 0 means none.
struct LogitTransform {
  const float* bias;  // [columns]
  float scale;
  float softcap;
};

// Width of the vocabulary blocks whose mass is reported, MASS_BLOCK of spo_kernels/backends/contract.py.
constexpr int64_t kMassBlock = 128;

// Running statistics of each row; all [rows] but block_lse.
struct TokenStats {
  float* max;
  float* sum;
  float* label_logit;
  float* shifted_sum;  // optional, with square_sum
  float* square_sum;   // optional, with shifted_sum
  float* rescale;      // optional: also write exp(logit - max) * slope, 0 at the label
  float* block_lse;    // optional, [rows, columns / kMassBlock rounded up]: log-sum-exp of each block of columns
  int64_t block_lse_stride;
};

// Upstream gradients of each row and the statistics they need; all [rows], all but lse optional.
struct TokenGrads {
  const float* lse;
  const float* grad_logp;
  const float* grad_lse;
  const float* grad_entropy;
  const float* entropy;
  const float* grad_log_sum_p2;
  const float* log_sum_p2;
  const float* lse_rest;
};

}  // namespace spo
