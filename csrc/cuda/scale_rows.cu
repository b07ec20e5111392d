// Multiplies rows: x[r, :] *= factors[r], where the factor is not 1.
//
// Of the running sums of the frozen-head forward a row's factor is 1 unless its tile raised the maximum, which tile k
// does with probability about 1/k; of kept tiles it seldom is. Bytes moved per element: its size twice in rows that
// change, none in the others.

#include "device.cuh"

namespace spo {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scale_rows_kernel(T* x, int64_t rows, int64_t stride, int columns, const float* factors, bool packed) {
  constexpr int kSize = kPack<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const float factor = factors[row];
  if (factor == 1.0f) return;
  for (int column = first_column<kSize>(0); column < columns; column += block_columns()) {
    T* at = x + row * stride + column;
    float values[kHeld];
    load_held<kSize>(at, columns - column, packed, values);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) values[i] *= factor;
    store_held<kSize>(at, columns - column, packed, values);
  }
}

template <typename T>
void scale(const Matrix& x, int64_t rows, int64_t columns, const float* factors, const Queue& queue) {
  const dim3 threads = threads_for(columns, kThreads);
  launch("scale_rows", {rows, columns}, scale_rows_kernel<T>, (rows + threads.y - 1) / threads.y, threads, queue,
         static_cast<T*>(x.data), rows, x.stride, int_columns(columns), factors,
         is_aligned(x.data, x.stride * static_cast<int64_t>(sizeof(T)), 16));
}

}  // namespace

void scale_rows(const Matrix& x, int64_t rows, int64_t columns, const float* factors, const Queue& queue) {
  switch (x.scalar) {
    case Scalar::kFloat:
      return scale<float>(x, rows, columns, factors, queue);
    case Scalar::kBFloat16:
      return scale<__nv_bfloat16>(x, rows, columns, factors, queue);
    case Scalar::kHalf:
      return scale<__half>(x, rows, columns, factors, queue);
  }
}

}  // namespace spo
