// As much of CUDA as the kernels of csrc/cuda use, on a CPU: for tests of what they compute.
//
// A block's threads are fibres that run in turn, each until it waits for others. Blocks follow each other. A barrier or
// shuffle that not all threads of the block or warp reach throws. SPO_EMULATOR_ORDER=reverse runs threads from the
// last: a result that depends on the order lacks a barrier.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// blocks run one after the other, so a kernel's shared memory can be its own
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };
using cudaStream_t = void*;
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread);
void wait_for_block();
// Hands `mine` to the lane whose number differs by `offset`, and returns that lane's.
uint64_t exchange(uint64_t mine, int offset);

}  // namespace emulator

inline void __syncthreads() { emulator::wait_for_block(); }

template <typename T>
T __shfl_xor_sync(unsigned, T x, int offset) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  bits = emulator::exchange(bits, offset);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// as the hardware does it: the product is rounded before the power
inline float __expf(float x) { return exp2f(x * 1.44269504088896341f); }
inline float __fdividef(float a, float b) { return fabsf(b) > 0x1p126f && !std::isinf(b) ? 0.0f * a : a / b; }

inline cudaError_t cudaSetDevice(int device) { return device < 0 ? cudaErrorInvalidDevice : cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidDevice"; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  emulator::run_grid(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
