// The tile kernels on a GPU. Raw device pointers; the caller has checked shapes, dtypes and strides.
//
// Nothing here waits for the device, and nothing is allocated, so that every call can be captured in a CUDA graph.
// Sums are taken in a fixed order: same inputs, same bits. A call that could not be launched throws
// std::runtime_error, which names the kernel and the shapes.
#pragma once

#include <cstdint>
#include <string>

#include "../pair_terms.h"
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

// `summary` [7, pairs]: loss, rewards of chosen and rejected, their difference and order, log-probs of both;
// `coefficients`, one per token: factor * d loss / d logp.
void pair_loss(const PairTokens& tokens, const PairForm& form, float* summary, float* coefficients, const Queue& queue);

}  // namespace spo
