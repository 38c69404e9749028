// What every kernel file includes: CUDA's names, launching, shared memory. The only place with a launch expression.
//
//   LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)   an argument with a comma goes in parentheses
//   LAUNCH_COOPERATIVE(...)           the same; all blocks are resident at once, so they may wait for each other
//   SHARED_ARRAY(T, name, count)      static shared memory, `T name[count]`; T may be an array type: float[17]
//   DYNAMIC_SHARED(T, name)           `T* name`, the launch's dynamic shared memory, 128-byte aligned
//   device_now()                      processors of the device, and the shared memory that one block may ask for
//   resident_blocks(kernel, threads, shared_bytes)   of one processor: a cooperative launch may have no more
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
#include <utility>

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

template <class... Parameters, class... Arguments>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                               Arguments&&... arguments) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

struct Device {
  int processors;
  size_t shared_bytes;
};
inline Device device_now() {
  int device = 0, processors = 0, bytes = 0;
  check_launch("a kernel", cudaGetDevice(&device));
  check_launch("a kernel", cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check_launch("a kernel", cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return {processors, size_t(bytes)};
}

template <class Kernel>
int resident_blocks(Kernel* kernel, int threads, size_t shared_bytes) {
  int blocks = 0;
  allow_dynamic_shared("a kernel", kernel, shared_bytes);
  check_launch("a kernel", cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
  return blocks;
}

template <class T>
struct identity {
  using type = T;
};

}  // namespace pynn::cuda

#define LAUNCH(kernel, grid, block, shared, stream, ...)                                            \
  do {                                                                                              \
    const size_t pynn_shared_bytes = (shared);                                                      \
    ::pynn::cuda::allow_dynamic_shared(#kernel, kernel, pynn_shared_bytes);                         \
    kernel<<<(grid), (block), pynn_shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    ::pynn::cuda::check_launch(#kernel, cudaGetLastError());                                        \
  } while (false)

#define LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, ...)                                                   \
  do {                                                                                                                 \
    const size_t pynn_shared_bytes = (shared);                                                                         \
    ::pynn::cuda::allow_dynamic_shared(#kernel, kernel, pynn_shared_bytes);                                            \
    ::pynn::cuda::check_launch(                                                                                        \
        #kernel, ::pynn::cuda::launch_cooperative(kernel, (grid), (block), pynn_shared_bytes, (stream), __VA_ARGS__)); \
  } while (false)

#define SHARED_ARRAY(T, name, count) __shared__ typename ::pynn::cuda::identity<T>::type name[count]
#define DYNAMIC_SHARED(T, name)                                         \
  extern __shared__ __align__(128) unsigned char pynn_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(pynn_dynamic_shared)

#endif
