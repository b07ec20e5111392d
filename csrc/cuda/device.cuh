// What the kernels share: vectors of 16 bytes, the logits that a thread holds, reductions, and launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../scalar.h"
#include "tiles.h"

namespace spo {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Elements that a thread holds at a time: 64 bytes of float products. 2048 threads of a multiprocessor then have
// 128 KiB in flight, and 1024 of them 64 KiB, where an H100 needs 18 KiB (3.35 TB/s, 700 ns, 132 multiprocessors).
constexpr int kHeld = 16;

// e^x from the hardware's 2^x: the rounding of x log2(e) costs |x| 6e-8, as much as that of a logit of that size.
struct DeviceMath {
  static __device__ __forceinline__ float exp(float x) { return __expf(x); }
  static __device__ __forceinline__ float divide(float a, float b) { return __fdividef(a, b); }
};

// ---- memory

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void assign(float& to, float x) { to = x; }
__device__ __forceinline__ void assign(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// Neighbours that are read or written together, 16 bytes at a time where there are as many.
template <typename T, int kSize>
struct alignas(kSize * sizeof(T) < 16 ? kSize * sizeof(T) : 16) Pack {
  T values[kSize];
};

// Neighbouring products of 16 bytes.
template <typename In>
constexpr int kPack = 16 / sizeof(In);

// What a thread holds of the columns from `start` on: packs of kSize neighbours, a warp's packs side by side, so that
// each warp has 512 neighbouring columns. Only the first column is computed: the others are constants away from it.
template <int kSize>
__device__ __forceinline__ int first_column(int start) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  return start + warp * kWarp * kHeld + lane * kSize;
}

// From the first column to the i-th.
template <int kSize>
SPO_HOST_DEVICE constexpr int offset_of(int i) {
  return i / kSize * kWarp * kSize + i % kSize;
}

// The columns of a row that blockDim.x threads hold together.
__device__ __forceinline__ int block_columns() { return static_cast<int>(blockDim.x) * kHeld; }

// Reads what the thread holds: `from` is its first element and `left` the number of columns from there to the end of
// the row; -inf beyond. `packed`: every pack is aligned.
template <int kSize, typename T>
__device__ __forceinline__ void load_held(const T* from, int left, bool packed, float (&x)[kHeld]) {
  if (packed) {
    Pack<T, kSize> packs[kHeld / kSize];
    // all reads are issued before the first is waited for
#pragma unroll
    for (int i = 0; i < kHeld; i += kSize) {
      if (offset_of<kSize>(i) + kSize <= left) {
        packs[i / kSize] = *reinterpret_cast<const Pack<T, kSize>*>(from + offset_of<kSize>(i));
      }
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = to_float(packs[i / kSize].values[i % kSize]);
    if (offset_of<kSize>(kHeld - 1) < left) return;
  }
  // without packs, or at the row's end
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int offset = offset_of<kSize>(i);
    const bool loaded = packed && offset_of<kSize>(i - i % kSize) + kSize <= left;
    if (!loaded) x[i] = offset < left ? to_float(from[offset]) : kMinusInf;
  }
}

// The other way round.
template <int kSize, typename T>
__device__ __forceinline__ void store_held(T* to, int left, bool packed, const float (&x)[kHeld]) {
#pragma unroll
  for (int i = 0; i < kHeld; i += kSize) {
    const int offset = offset_of<kSize>(i);
    if (packed && offset + kSize <= left) {
      Pack<T, kSize> pack;
#pragma unroll
      for (int k = 0; k < kSize; ++k) assign(pack.values[k], x[i + k]);
      *reinterpret_cast<Pack<T, kSize>*>(to + offset) = pack;
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (offset + k < left) assign(to[offset + k], x[i + k]);
      }
    }
  }
}

// Pack by pack, for fewer registers: a bias comes from L2.
template <int kSize>
__device__ __forceinline__ void add_bias(const float* from, int left, bool packed, float (&x)[kHeld]) {
#pragma unroll
  for (int i = 0; i < kHeld; i += kSize) {
    const int offset = offset_of<kSize>(i);
    if (packed && offset + kSize <= left) {
      const Pack<float, kSize> pack = *reinterpret_cast<const Pack<float, kSize>*>(from + offset);
#pragma unroll
      for (int k = 0; k < kSize; ++k) x[i + k] += pack.values[k];
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (offset + k < left) x[i + k] += from[offset + k];
      }
    }
  }
}

// Which accesses can be packed: those whose base and rows are aligned.
struct Packed {
  bool products;
  bool bias;
  bool out;
};

// The logits of what the thread holds from `column` on, in a row of `columns` products.
template <typename In>
__device__ __forceinline__ void load_logits(const In* row, const LogitTransform& f, int column, int columns,
                                            const Packed& packed, float (&x)[kHeld]) {
  constexpr int kSize = kPack<In>;
  const int left = columns - column;
  load_held<kSize>(row + column, left, packed.products, x);
  if (f.bias != nullptr) add_bias<kSize>(f.bias + column, left, packed.bias, x);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) x[i] *= f.scale;
  if (f.softcap != 0.0f) {
    const float inverse = inverse_cap(f);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = f.softcap * tanh_of<DeviceMath>(x[i] * inverse);
  }
  // beyond the last column scale and softcap have made something else of -inf
  if (offset_of<kSize>(kHeld - 1) >= left) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (offset_of<kSize>(i) >= left) x[i] = kMinusInf;
    }
  }
}

// The row's label as a column of the tile; -1, which no thread holds, where it lies outside.
__device__ __forceinline__ int label_column(const int64_t* labels, int64_t row, int columns) {
  const int64_t label = labels[row];
  return label >= 0 && label < columns ? static_cast<int>(label) : -1;
}

// Calls f with the element `offset` columns after the thread's first, if the thread holds it.
template <int kSize, typename Function>
__device__ __forceinline__ void at_offset(int offset, float (&x)[kHeld], const Function& f) {
  if (offset < 0 || offset >= kWarp * kHeld) return;
  // a subscript that is not a constant would put the array into local memory
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (offset == offset_of<kSize>(i)) f(x[i]);
  }
}

// ---- reductions over `lanes` neighbouring threads, a power of two up to a warp; every thread gets the result

__device__ __forceinline__ float lanes_max(float x, int lanes = kWarp) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

template <typename T>
__device__ __forceinline__ T lanes_sum(T x, int lanes = kWarp) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ __forceinline__ Sums<float> lanes_sum(const Sums<float>& x) {
  return {lanes_sum(x.sum), lanes_sum(x.shifted), lanes_sum(x.square)};
}

// ---- launching

// Launches, and throws where that fails. `device` becomes current for the statically linked runtime of this module;
// the caller holds torch's guard of the same device, so for the rest of the process nothing changes. That runtime
// has a last error of its own: nobody else's is read or cleared. A failure that an earlier kernel left behind in
// the context, which every later call returns, is reported here and cannot be cleared.
template <typename... Parameters, typename... Arguments>
void launch(const std::string& name, std::initializer_list<int64_t> shape, void (*kernel)(Parameters...),
            int64_t blocks, dim3 threads, const Queue& queue, const Arguments&... arguments) {
  if (blocks == 0) return;
  cudaError_t error = cudaErrorInvalidConfiguration;
  if (blocks < (int64_t{1} << 31)) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = threads;
    config.stream = static_cast<cudaStream_t>(queue.stream);
    error = cudaSetDevice(queue.device);
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error == cudaSuccess) return;
  cudaGetLastError();
  std::string sizes;
  for (const int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  throw std::runtime_error(name + " of [" + sizes + "] on device " + std::to_string(queue.device) + ": " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Threads of a block: whole warps for one row of up to `most`, 32 for each of 4 rows of up to 512 columns.
inline dim3 threads_for(int64_t columns, int most) {
  if (columns <= int64_t{kWarp} * kHeld) return dim3(kWarp, 4);
  int64_t threads = 128;
  while (threads < most && threads * kHeld < columns) threads *= 2;
  return dim3(static_cast<unsigned>(threads));
}

// Columns are counted in 32 bits inside a row, a block's step beyond the last included; rows in 64.
inline int int_columns(int64_t columns) {
  if (columns > (int64_t{1} << 30)) {
    throw std::invalid_argument("expected at most 2^30 columns, got " + std::to_string(columns));
  }
  return static_cast<int>(columns);
}

inline int64_t scalar_bytes(Scalar scalar) { return scalar == Scalar::kFloat ? 4 : 2; }

inline bool is_aligned(const void* data, int64_t stride_bytes, int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(bytes) == 0 && stride_bytes % bytes == 0;
}

inline Packed packed_accesses(const CudaTile& tile) {
  const int64_t in = scalar_bytes(tile.products.scalar), out = scalar_bytes(tile.out.scalar);
  // a pack of 16 bytes of products is written as one of at most 16 bytes
  const int64_t out_pack = out < in ? 16 * out / in : 16;
  return {is_aligned(tile.products.data, tile.products.stride * in, 16), is_aligned(tile.transform.bias, 0, 16),
          is_aligned(tile.out.data, tile.out.stride * out, out_pack)};
}

}  // namespace spo
