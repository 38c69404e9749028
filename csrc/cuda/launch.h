// What every kernel file includes: CUDA's names, launching, shared memory. The only place with a launch expression.
//
//   LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)   an argument with a comma goes in parentheses
//   LAUNCH_COOPERATIVE(...)           the same; all blocks are resident at once, so they may wait for each other
//   LAUNCH_CLUSTERS(kernel, cluster, grid, ...)   the same; so many blocks, neighbours in x, form a cluster (sm_90)
//   SHARED_ARRAY(T, name, count)      static shared memory, `T name[count]`; T may be an array type: float[17]
//   DYNAMIC_SHARED(T, name)           `T* name`, the launch's dynamic shared memory, 128-byte aligned
//   device_now()                      processors of the device, and what one block or cluster may ask for
//   resident_blocks(kernel, threads, shared_bytes)   of one processor: a cooperative launch may have no more
//   resident_clusters(kernel, blocks, threads, shared_bytes)   of the device; 0 where the kernel cannot run in clusters
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

// The error is taken back, or the next launch would report it once more.
inline void check_launch(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("pynn: launching ") + kernel + " failed: " + cudaGetErrorString(error));
}

// More than 48 KB of dynamic shared memory has to be asked for.
template <class Kernel>
void allow_dynamic_shared(const char* name, Kernel* kernel, size_t bytes) {
  if (bytes > 48 * 1024)
    check_launch(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

inline cudaLaunchAttribute cooperative_attribute() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return attribute;
}

inline cudaLaunchAttribute cluster_attribute(unsigned blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// `attribute` has to live as long as the result.
inline cudaLaunchConfig_t launch_config(dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                                        cudaLaunchAttribute& attribute) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_with(cudaLaunchAttribute attribute, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                        size_t shared_bytes, void* stream, Arguments&&... arguments) {
  const cudaLaunchConfig_t config = launch_config(grid, block, shared_bytes, stream, attribute);
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

struct Device {
  int processors;
  size_t shared_bytes;
  int cluster_blocks;  // of a cluster, at most; 0 where the device has none
};
inline Device device_now() {
  int device = 0, processors = 0, bytes = 0, clusters = 0;
  check_launch("a kernel", cudaGetDevice(&device));
  check_launch("a kernel", cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check_launch("a kernel", cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check_launch("a kernel", cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
  return {processors, size_t(bytes), clusters ? 8 : 0};  // 8: what every device with clusters has
}

template <class Kernel>
int resident_blocks(Kernel* kernel, int threads, size_t shared_bytes) {
  int blocks = 0;
  allow_dynamic_shared("a kernel", kernel, shared_bytes);
  check_launch("a kernel", cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
  return blocks;
}

template <class Kernel>
int resident_clusters(Kernel* kernel, int blocks, int threads, size_t shared_bytes) {
  cudaFuncAttributes compiled{};
  check_launch("a kernel", cudaFuncGetAttributes(&compiled, kernel));
  if (compiled.ptxVersion < 90) return 0;  // for an older device: there the kernel is empty
  allow_dynamic_shared("a kernel", kernel, shared_bytes);
  cudaLaunchAttribute attribute = cluster_attribute(unsigned(blocks));
  const cudaLaunchConfig_t config =
      launch_config(unsigned(blocks), unsigned(threads), shared_bytes, nullptr, attribute);
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error == cudaErrorInvalidClusterSize) return cudaGetLastError(), 0;  // a part of a GPU may have no room for one
  check_launch("a kernel", error);
  return clusters;
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

#define PYNN_LAUNCH_WITH(attribute, kernel, grid, block, shared, stream, ...)                                 \
  do {                                                                                                        \
    const size_t pynn_shared_bytes = (shared);                                                                \
    ::pynn::cuda::allow_dynamic_shared(#kernel, kernel, pynn_shared_bytes);                                   \
    ::pynn::cuda::check_launch(#kernel, ::pynn::cuda::launch_with((attribute), kernel, (grid), (block),       \
                                                                  pynn_shared_bytes, (stream), __VA_ARGS__)); \
  } while (false)
#define LAUNCH_COOPERATIVE(kernel, ...) PYNN_LAUNCH_WITH(::pynn::cuda::cooperative_attribute(), kernel, __VA_ARGS__)
#define LAUNCH_CLUSTERS(kernel, cluster, ...) \
  PYNN_LAUNCH_WITH(::pynn::cuda::cluster_attribute(unsigned(cluster)), kernel, __VA_ARGS__)

#define SHARED_ARRAY(T, name, count) __shared__ typename ::pynn::cuda::identity<T>::type name[count]
#define DYNAMIC_SHARED(T, name)                                         \
  extern __shared__ __align__(128) unsigned char pynn_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(pynn_dynamic_shared)

#endif
