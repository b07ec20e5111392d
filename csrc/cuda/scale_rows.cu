// Rescales the running sums of the frozen-head forward: x[r, :] *= factors[r], where the factor is not 1.
//
// A row's factor is 1 unless its tile raised the maximum, which tile k does with probability about 1/k. Bytes moved
// per element: 4 + 4 in rows that change, none in the others.

#include "device.cuh"

namespace spo {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    scale_rows_kernel(float* x, int64_t rows, int64_t stride, int columns, const float* factors, bool packed) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const float factor = factors[row];
  if (factor == 1.0f) return;
  for (int column = first_column<4>(0); column < columns; column += block_columns()) {
    float* at = x + row * stride + column;
    float values[kHeld];
    load_held<4>(at, columns - column, packed, values);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) values[i] *= factor;
    store_held<4>(at, columns - column, packed, values);
  }
}

}  // namespace

void scale_rows(const Matrix& x, int64_t rows, int64_t columns, const float* factors, const Queue& queue) {
  const dim3 threads = threads_for(columns, kThreads);
  launch("scale_rows", {rows, columns}, scale_rows_kernel, (rows + threads.y - 1) / threads.y, threads, queue,
         static_cast<float*>(x.data), rows, x.stride, int_columns(columns), factors,
         is_aligned(x.data, x.stride * 4, 16));
}

}  // namespace spo
