// CUDA C++ for g++: what csrc/cuda/launch.h includes instead of <cuda_runtime.h> when the sim is built. Keywords,
// built-in variables, barriers; the other headers here add the rest.
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>

#include "atomics.h"
#include "device_math.h"
#include "launch.h"
#include "runtime.h"
#include "vector_types.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::pynn::sim::current->index)
#define blockIdx (::pynn::sim::current->block->index)
#define blockDim (::pynn::sim::launch_now.block)
#define gridDim (::pynn::sim::launch_now.grid)
constexpr int warpSize = 32;

inline void __syncthreads(pynn::sim::Site site = pynn::sim::Site::current()) {
  pynn::sim::barrier("__syncthreads", false, site);
}
inline int __syncthreads_count(int predicate, pynn::sim::Site site = pynn::sim::Site::current()) {
  return int(pynn::sim::barrier("__syncthreads_count", predicate != 0, site));
}
inline int __syncthreads_or(int predicate, pynn::sim::Site site = pynn::sim::Site::current()) {
  return pynn::sim::barrier("__syncthreads_or", predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, pynn::sim::Site site = pynn::sim::Site::current()) {
  return pynn::sim::barrier("__syncthreads_and", predicate == 0, site) == 0;
}

// Static shared memory. The address of the variable `..._declaration` tells declarations and template instances apart.
#define SHARED_ARRAY(T, name, count)                                  \
  static const char name##_declaration = 0;                           \
  using name##_array = std::type_identity_t<T>[count];                \
  auto& name = *static_cast<name##_array*>(::pynn::sim::shared_array( \
      *::pynn::sim::current->block, &name##_declaration, sizeof(name##_array), alignof(name##_array)))
#define DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::pynn::sim::dynamic_shared())

namespace pynn::cuda {
using sim::Device;
using sim::device_now;
template <class Kernel>
int resident_blocks(Kernel*, int threads, size_t shared_bytes) {
  return sim::resident_blocks(threads, shared_bytes);
}
template <class Kernel>
int resident_clusters(Kernel*, int blocks, int threads, size_t shared_bytes) {
  return sim::resident_clusters(blocks, threads, shared_bytes);
}
}  // namespace pynn::cuda

#define LAUNCH_CLUSTERS(kernel, cluster, grid, block, shared, stream, ...) \
  ::pynn::sim::launch(#kernel, {false, unsigned(cluster)}, (grid), (block), (shared), kernel, __VA_ARGS__)
#define LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, ...) \
  ::pynn::sim::launch(#kernel, {true, 1}, (grid), (block), (shared), kernel, __VA_ARGS__)
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::pynn::sim::launch(#kernel, {false, 1}, (grid), (block), (shared), kernel, __VA_ARGS__)
