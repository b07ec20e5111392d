// The two passes over a logits tile on a CPU. Raw pointers; the caller has checked shapes, dtypes and strides.
//
// A tile is a [rows, columns] float matrix of products hidden . weight^T. Optional pointers may be null.
// Rows are independent and each is summed by one thread, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../tile.h"

namespace spo {

// Rows have no gaps between columns; strides are in elements.
struct Tile {
  float* data;
  int64_t stride;
  int64_t rows;
  int64_t columns;
  const int64_t* labels;  // [rows], relative to the tile's first column; outside it counts as absent
  LogitTransform transform;
};

// A [rows, columns] matrix that is written, of float or bfloat16: the tile itself, or one apart from it.
struct TileOut {
  void* data;
  int64_t stride;
  Scalar scalar;
};

// Reads the tile once. Only where `rescale` asks for it, `out` receives exp(logit - max) * slope.
void tile_stats(const Tile& tile, const TileOut& out, const TokenStats& stats, int threads);

// Reads the tile once; `out` receives d loss / d product.
void tile_grad(const Tile& tile, const TileOut& out, const TokenGrads& grads, int threads);

// x[r, :] *= factors[r]
void scale_rows(const TileOut& x, int64_t rows, int64_t columns, const float* factors, int threads);

}  // namespace spo
