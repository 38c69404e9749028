// What every kernel file includes: CUDA's names, launching, shared memory. The only place with a launch expression.
//
//   LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)   an argument with a comma goes in parentheses
//   SHARED_ARRAY(T, name, count)      static shared memory, `T name[count]`; T may be an array type: float[17]
//   DYNAMIC_SHARED(T, name)           `T* name`, the launch's dynamic shared memory, 128-byte aligned
//
// Built by nvcc they are CUDA's; built by g++ with PYNN_SIM they run the kernel on the CPU (csrc/sim/README.md).
#pragma once

#ifdef PYNN_SIM
#include "../sim/cuda.h"
#else
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace pynn::cuda {

inline void check_launch(const char* kernel, cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("pynn: launching ") + kernel + " failed: " + cudaGetErrorString(error));
}

// More than 48 KB of dynamic shared memory has to be asked for.
template <class Kernel>
void allow_dynamic_shared(const char* name, Kernel* kernel, size_t bytes) {
  if (bytes > 48 * 1024)
    check_launch(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

template <class T>
struct identity {
  using type = T;
};

}  // namespace pynn::cuda

#define LAUNCH(kernel, grid, block, shared, stream, ...)                                       \
  do {                                                                                         \
    const size_t shared_bytes = (shared);                                                      \
    ::pynn::cuda::allow_dynamic_shared(#kernel, kernel, shared_bytes);                         \
    kernel<<<(grid), (block), shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    ::pynn::cuda::check_launch(#kernel, cudaGetLastError());                                   \
  } while (false)

#define SHARED_ARRAY(T, name, count) __shared__ typename ::pynn::cuda::identity<T>::type name[count]
#define DYNAMIC_SHARED(T, name)                                         \
  extern __shared__ __align__(128) unsigned char pynn_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(pynn_dynamic_shared)

#endif
