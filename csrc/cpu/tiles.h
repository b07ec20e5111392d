// The two passes over a logits tile on a CPU. Raw pointers; the caller has checked shapes, dtypes and strides.
//
// A tile is a contiguous [rows, columns] float matrix of products hidden . weight^T. Optional pointers may be null.
// Rows are independent and each is summed by one thread, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../tile.h"

namespace spo {

struct Tile {
  float* data;
  int64_t rows;
  int64_t columns;
  const int64_t* labels;  // [rows], relative to the tile's first column; outside it counts as absent
  LogitTransform transform;
};

// Reads the tile once; writes it only where `rescale` asks for it.
void tile_stats(const Tile& tile, const TokenStats& stats, int threads);

// Reads and writes the tile once: it becomes d loss / d product.
void tile_grad(const Tile& tile, const TokenGrads& grads, int threads);

}  // namespace spo
