// Whether this module's kernels can run on a device at all: asked once, before the first launch there.

#include "device.cuh"

namespace spo {
namespace {

__global__ void probe_kernel() {}

}  // namespace

std::string why_not(int device) {
  cudaError_t error = cudaSetDevice(device);
  cudaFuncAttributes attributes{};
  // fails where the module was built for other architectures, and with no PTX that this one could take
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

}  // namespace spo
