// The two passes over a logits tile on a CPU. Raw pointers; the caller has checked shapes, dtypes and strides.
//
// A tile is a contiguous [rows, columns] float matrix of products hidden . weight^T. Optional pointers may be null.
// Rows are independent and each is summed by one thread, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace spo {

// logit = softcap(scale * (product + bias)), softcap(x) = c tanh(x / c); softcap == 0 means none.
struct LogitTransform {
  const float* bias;  // [columns]
  float scale;
  float softcap;
};

struct Tile {
  float* data;
  int64_t rows;
  int64_t columns;
  const int64_t* labels;  // [rows], relative to the tile's first column; outside it counts as absent
  LogitTransform transform;
};

// Width of the vocabulary blocks whose mass is reported, MASS_BLOCK of spo_kernels/tiles/spec.py.
constexpr int64_t kMassBlock = 128;

// Running statistics of each row, see spo_kernels/tiles/spec.py; all [rows] but block_lse.
struct TokenStats {
  float* max;
  float* sum;
  float* label_logit;
  float* shifted_sum;  // optional, with square_sum
  float* square_sum;   // optional, with shifted_sum
  float* rescale;      // optional: also turn the tile into exp(logit - max) * slope, 0 at the label
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
};

// Reads the tile once; writes it only where `rescale` asks for it.
void tile_stats(const Tile& tile, const TokenStats& stats, int threads);

// Reads and writes the tile once: it becomes d loss / d product.
void tile_grad(const Tile& tile, const TokenGrads& grads, int threads);

}  // namespace spo
