// The tile kernels on a GPU. Raw device pointers; the caller has checked shapes, dtypes and strides.
//
// Nothing here waits for the device, and nothing is allocated, so that every call can be captured in a CUDA graph.
// Sums are taken in a fixed order: same inputs, same bits. A call that could not be launched throws
// std::runtime_error, which names the kernel and the shapes.
#pragma once

#include <cstdint>
#include <string>

#include "../tile.h"

namespace spo {

// Where a kernel runs: the device's number and its stream, a cudaStream_t of any CUDA runtime in this process.
struct Queue {
  int device;
  void* stream;
};

// A [rows, columns] matrix whose rows have no gaps between columns; `stride` is in elements.
struct Matrix {
  void* data;
  int64_t stride;
  Scalar scalar;
};

// Products hidden . weight^T, and the matrix to be written: the products' own, one of the same scalar, or a
// half-precision one for float products.
struct CudaTile {
  Matrix products;
  Matrix out;
  int64_t rows;
  int64_t columns;
  const int64_t* labels;  // [rows], relative to the tile's first column; outside it counts as absent
  LogitTransform transform;
};

// Empty, or why the kernels cannot run on that device.
std::string why_not(int device);

// Merges the tile into `stats`. Only where stats.rescale asks for it, `out` receives exp(logit - max) * slope.
void tile_stats(const CudaTile& tile, const TokenStats& stats, const Queue& queue);

// `out` receives d loss / d product.
void tile_grad(const CudaTile& tile, const TokenGrads& grads, const Queue& queue);

// x[r, :] *= factors[r], where the factor is not 1.
void scale_rows(const Matrix& x, int64_t rows, int64_t columns, const float* factors, const Queue& queue);

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

// `summary` [7, pairs]: loss, rewards of chosen and rejected, their difference and order, log-probs of both;
// `coefficients`, one per token: factor * d loss / d logp.
void pair_loss(const PairTokens& tokens, const PairForm& form, float* summary, float* coefficients, const Queue& queue);

}  // namespace spo
