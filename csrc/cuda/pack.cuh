// Packs: what a thread reads or writes at once, in 16-byte accesses where the tensor allows.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "launch.h"
#include "primitives.cuh"

namespace pynn::cuda {

template <class T, int count>
struct alignas(16) PackOf {
  T element[count];
};

// The first `valid` elements of a pack, the others 0. aligned: `from` is, to 16 bytes.
template <class T, int count>
__device__ __forceinline__ void load_pack(PackOf<T, count>& pack, const T* from, int valid, bool aligned) {
  if (aligned && valid == count) {
    constexpr int kVectors = sizeof(pack) / 16;
    uint4 vector[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) vector[v] = load_streaming(reinterpret_cast<const uint4*>(from) + v);
    memcpy(&pack, vector, sizeof(pack));
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k) pack.element[k] = k < valid ? from[k] : T{};
  }
}

// Writes the first `valid` elements.
template <class T, int count>
__device__ __forceinline__ void store_pack(T* to, const PackOf<T, count>& pack, int valid, bool aligned) {
  if (aligned && valid == count) {
    constexpr int kVectors = sizeof(pack) / 16;
    uint4 vector[kVectors];
    memcpy(vector, &pack, sizeof(pack));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) reinterpret_cast<uint4*>(to)[v] = vector[v];
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k)
      if (k < valid) to[k] = pack.element[k];
  }
}

// Whether every tensor begins on 16 bytes; null ones do not count.
inline bool is_aligned(std::initializer_list<const void*> tensors) {
  uintptr_t bits = 0;
  for (const void* tensor : tensors) bits |= reinterpret_cast<uintptr_t>(tensor);
  return bits % 16 == 0;
}

}  // namespace pynn::cuda
