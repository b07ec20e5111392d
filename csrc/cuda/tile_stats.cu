// Softmax statistics of a tile, merged into running ones; formulas as in spo_kernels/backends/triton/tile_stats.py.
//
// Bytes moved per logit of a float tile: 4, one read; a half-precision tile: 2. With `rescale` one read and one write,
// 4 + 2 into a half-precision operand or 4 + 4 in place: the row waits in registers for its maximum, which up to
// 512 threads of 16 elements can hold, 8192 columns. A wider row is read twice, 4 + 4 + 2, the second time mostly
// from L2, because the same block does both. Block masses add 4 / 128, biases 4 from L2; per-row values not counted.

#include "device.cuh"

namespace spo {
namespace {

// Two blocks of 512 on a multiprocessor of 65536 registers: 64 for each thread.
constexpr int kMaxThreads = 512;
constexpr int kBlocks = 2;
// A row that need not wait in registers takes fewer threads, so that more rows overlap their reductions.
constexpr int kStreamingThreads = 256;

// Maximum of the logits seen, and their sums about it.
struct Running {
  float max;
  Sums<float> sums;
};

template <bool kMoments>
__device__ __forceinline__ void accumulate(const float (&logits)[kHeld], Running& running) {
  float max = running.max;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) max = fmaxf(max, logits[i]);
  const float base = finite_base(max), drop = running.max - base;
  Sums<float> sums{};
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const float shifted = logits[i] - base;
    const float exponential = DeviceMath::exp(shifted);
    sums.sum += exponential;
    if (kMoments) {
      sums.shifted += moment(exponential, shifted);
      sums.square += exponential * exponential;
    }
  }
  running = {max, rebased(running.sums, drop, DeviceMath::exp(drop)) + sums};
}

// Log-sum-exp of every kMassBlock columns: a pack of each of kMassBlock / kSize neighbouring threads.
template <int kSize>
__device__ __forceinline__ void store_masses(const float (&logits)[kHeld], int column, int columns, float* row) {
  constexpr int kLanes = kMassBlock / kSize;
#pragma unroll
  for (int i = 0; i < kHeld; i += kSize) {
    float max = kMinusInf;
#pragma unroll
    for (int k = 0; k < kSize; ++k) max = fmaxf(max, logits[i + k]);
    const float base = finite_base(lanes_max(max, kLanes));
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum += DeviceMath::exp(logits[i + k] - base);
    sum = lanes_sum(sum, kLanes);
    const int first = column + offset_of<kSize>(i);
    if (first % kMassBlock == 0 && first < columns) row[first / kMassBlock] = base + logf(sum);
  }
}

// The maximum of a block's warps, and each warp's own in `warps`. Every thread of the block takes part.
__device__ __forceinline__ float share(const Running& mine, Running* warps) {
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  float max = kMinusInf;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) max = fmaxf(max, warps[w].max);
  return max;
}

__device__ __forceinline__ Sums<float> sums_about(float base, const Running& running) {
  const float drop = running.max - base;
  return rebased(running.sums, drop, DeviceMath::exp(drop));
}

// By the row's first thread: `sums` of this tile, about the base of the new maximum, join the row's.
template <bool kMoments>
__device__ __forceinline__ void merge_row(const TokenStats& stats, int64_t row, float max, const Sums<float>& sums) {
  const float base = finite_base(max), drop = stats.max[row] - base, shrink = DeviceMath::exp(drop);
  Sums<float> old{stats.sum[row], 0.0f, 0.0f};
  if (kMoments) {
    old.shifted = stats.shifted_sum[row];
    old.square = stats.square_sum[row];
  }
  const Sums<float> merged = rebased(old, drop, shrink) + sums;
  stats.max[row] = max;
  stats.sum[row] = merged.sum;
  if (kMoments) {
    stats.shifted_sum[row] = merged.shifted;
    stats.square_sum[row] = merged.square;
  }
  if (stats.rescale != nullptr) stats.rescale[row] = shrink;
}

// exp(logit - base) * slope, 0 at the label.
template <int kSize, typename Out>
__device__ __forceinline__ void store_operand(float (&logits)[kHeld], Out* row, const LogitTransform& f, float base,
                                              int label, int column, int columns, bool packed) {
  const float inverse = inverse_cap(f);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) logits[i] = DeviceMath::exp(logits[i] - base) * slope(logits[i], f.scale, inverse);
  at_offset<kSize>(label - column, logits, [](float& value) { value = 0.0f; });
  store_held<kSize>(row + column, columns - column, packed, logits);
}

struct Rows {
  int64_t count;
  int64_t stride;
  int64_t out_stride;
  int columns;
};

// A row belongs to a block of whole warps, or to one warp of a block that has a row for each.
// In and Out may be the same memory: a thread writes what it alone has read, after its last read of it.
template <typename In, typename Out, bool kOperand, bool kMoments>
__global__ void __launch_bounds__(kMaxThreads, kBlocks)
    tile_stats_kernel(const In* products, Out* out, Rows rows, const int64_t* labels, LogitTransform transform,
                      TokenStats stats, Packed packed) {
  __shared__ Running warps[kMaxThreads / kWarp];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // whole warps leave, and only where a row is one warp's: there is no barrier then
  if (row >= rows.count) return;
  const In* from = products + row * rows.stride;
  const int columns = rows.columns, label = label_column(labels, row, columns);
  const int first = first_column<kPack<In>>(0), step = block_columns();

  float logits[kHeld];
  // the row's old maximum takes part through its first thread, its old sums at the end
  Running mine{threadIdx.x == 0 ? stats.max[row] : kMinusInf, {}};
  for (int start = 0; start < columns; start += step) {
    const int column = start + first;
    load_logits(from, transform, column, columns, packed, logits);
    // from the same registers as the maximum: equal means equal, to the bit
    if (label >= 0) {
      at_offset<kPack<In>>(label - column, logits, [&](float value) { stats.label_logit[row] = value; });
    }
    accumulate<kMoments>(logits, mine);
    if (!kOperand && stats.block_lse != nullptr) {
      store_masses<kPack<In>>(logits, column, columns, stats.block_lse + row * stats.block_lse_stride);
    }
  }

  const float warp_max = lanes_max(mine.max);
  const Running warp{warp_max, lanes_sum(sums_about(finite_base(warp_max), mine))};
  const bool one_warp = blockDim.x == kWarp;
  const float max = one_warp ? warp_max : share(warp, warps);
  const float base = finite_base(max);
  if (threadIdx.x == 0) {
    Sums<float> sums = warp.sums;
    if (!one_warp) {
      sums = {};
      for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sums = sums + sums_about(base, warps[w]);
    }
    merge_row<kMoments>(stats, row, max, sums);
  }

  if (kOperand) {
    Out* to = out + row * rows.out_stride;
    for (int start = 0; start < columns; start += step) {
      if (columns > step) load_logits(from, transform, start + first, columns, packed, logits);
      store_operand<kPack<In>>(logits, to, transform, base, label, start + first, columns, packed.out);
    }
  }
}

template <typename In, typename Out, bool kOperand>
void run(const CudaTile& tile, const TokenStats& stats, const Queue& queue) {
  const Rows rows{tile.rows, tile.products.stride, tile.out.stride, int_columns(tile.columns)};
  const dim3 threads = threads_for(tile.columns, kOperand ? kMaxThreads : kStreamingThreads);
  const int64_t blocks = (tile.rows + threads.y - 1) / threads.y;
  const auto kernel = stats.shifted_sum != nullptr ? tile_stats_kernel<In, Out, kOperand, true>
                                                   : tile_stats_kernel<In, Out, kOperand, false>;
  launch("tile_stats", {tile.rows, tile.columns}, kernel, blocks, threads, queue,
         static_cast<const In*>(tile.products.data), static_cast<Out*>(tile.out.data), rows, tile.labels,
         tile.transform, stats, packed_accesses(tile));
}

template <typename In>
void run_like(const CudaTile& tile, const TokenStats& stats, const Queue& queue) {
  stats.rescale == nullptr ? run<In, In, false>(tile, stats, queue) : run<In, In, true>(tile, stats, queue);
}

}  // namespace

void tile_stats(const CudaTile& tile, const TokenStats& stats, const Queue& queue) {
  if (tile.products.scalar == Scalar::kHalf) {
    run_like<__half>(tile, stats, queue);
  } else if (tile.products.scalar == Scalar::kBFloat16) {
    run_like<__nv_bfloat16>(tile, stats, queue);
  } else if (stats.rescale == nullptr || tile.out.scalar == Scalar::kFloat) {
    run_like<float>(tile, stats, queue);
  } else if (tile.out.scalar == Scalar::kHalf) {
    run<float, __half, true>(tile, stats, queue);
  } else {
    run<float, __nv_bfloat16, true>(tile, stats, queue);
  }
}

}  // namespace spo
