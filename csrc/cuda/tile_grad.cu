// Gradient of the loss with respect to a tile of products; formula as in spo_kernels/backends/triton/tile_grad.py.
//
// Bytes moved per logit of a float tile: one read and one write, 4 + 2 into a half-precision operand or 4 + 4 in
// place; a half-precision tile: 2 + 2. Biases add 4 from L2; per-row values are not counted.

#include "device.cuh"

namespace spo {
namespace {

// Four blocks of 256 on a multiprocessor of 65536 registers: 64 for each thread.
constexpr int kMaxThreads = 256;
constexpr int kBlocks = 4;

struct Rows {
  int64_t count;
  int64_t stride;
  int64_t out_stride;
  int columns;
  unsigned pieces;  // of a row, each of them a block's
};

// No thread waits for another. In and Out may be the same memory: a thread writes what it alone has read.
template <typename In, typename Out, bool kMoments>
__global__ void __launch_bounds__(kMaxThreads, kBlocks)
    tile_grad_kernel(const In* products, Out* out, Rows rows, const int64_t* labels, LogitTransform transform,
                     TokenGrads grads, Packed packed) {
  constexpr int kSize = kPack<In>;
  const int64_t row = static_cast<int64_t>(blockIdx.x / rows.pieces) * blockDim.y + threadIdx.y;
  if (row >= rows.count) return;
  const int column = first_column<kSize>(static_cast<int>(blockIdx.x % rows.pieces) * block_columns());
  float x[kHeld];
  load_logits(products + row * rows.stride, transform, column, rows.columns, packed, x);
  const RowGrads g = row_grads(grads, row);
  const int label = label_column(labels, row, rows.columns);
  const float inverse = inverse_cap(transform);
  float slopes[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    slopes[i] = slope(x[i], transform.scale, inverse);
    x[i] = logit_grad<DeviceMath, kMoments>(x[i], g);
  }
  if (label >= 0) at_offset<kSize>(label - column, x, [&](float& value) { value += g.logp; });
#pragma unroll
  for (int i = 0; i < kHeld; ++i) x[i] *= slopes[i];
  store_held<kSize>(out + row * rows.out_stride + column, rows.columns - column, packed.out, x);
}

template <typename In, typename Out>
void run(const CudaTile& tile, const TokenGrads& grads, const Queue& queue) {
  const dim3 threads = threads_for(tile.columns, kMaxThreads);
  const int64_t step = int64_t{threads.x} * kHeld;
  const int64_t pieces = (tile.columns + step - 1) / step;
  const Rows rows{tile.rows, tile.products.stride, tile.out.stride, int_columns(tile.columns),
                  static_cast<unsigned>(pieces)};
  const auto kernel = grads.grad_entropy != nullptr || grads.grad_log_sum_p2 != nullptr
                          ? tile_grad_kernel<In, Out, true>
                          : tile_grad_kernel<In, Out, false>;
  launch("tile_grad", {tile.rows, tile.columns}, kernel, (tile.rows + threads.y - 1) / threads.y * pieces, threads,
         queue, static_cast<const In*>(tile.products.data), static_cast<Out*>(tile.out.data), rows, tile.labels,
         tile.transform, grads, packed_accesses(tile));
}

}  // namespace

void tile_grad(const CudaTile& tile, const TokenGrads& grads, const Queue& queue) {
  if (tile.products.scalar == Scalar::kHalf) {
    run<__half, __half>(tile, grads, queue);
  } else if (tile.products.scalar == Scalar::kBFloat16) {
    run<__nv_bfloat16, __nv_bfloat16>(tile, grads, queue);
  } else if (tile.out.scalar == Scalar::kFloat) {
    run<float, float>(tile, grads, queue);
  } else if (tile.out.scalar == Scalar::kHalf) {
    run<float, __half>(tile, grads, queue);
  } else {
    run<float, __nv_bfloat16>(tile, grads, queue);
  }
}

}  // namespace spo
