// Launching a kernel and reporting what went wrong. The only place with a launch expression.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pynn::cuda {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("pynn: launching ") + kernel + " failed: " + cudaGetErrorString(error));
}

#define LAUNCH(kernel, grid, block, shared, stream, ...)                                   \
  do {                                                                                     \
    kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    ::pynn::cuda::check_launch(#kernel);                                                   \
  } while (false)

#define SHARED_ARRAY(T, name, count) __shared__ T name[count]
}  // namespace pynn::cuda
