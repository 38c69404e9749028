// Neighbouring channels of one pixel, read and written at once where the tensor allows.
#pragma once
#include <algorithm>

#include "conv2d.h"
#include "launch.h"

namespace pynn::cuda {
namespace {

// `count` neighbouring elements in accesses of up to 16 bytes, which the address must be a multiple of.
template <int bytes>
struct Bits;
template <>
struct Bits<4> {
  using type = unsigned;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<16> {
  using type = uint4;
};
template <class T, int count>
constexpr int kAccess = std::min(16, count* int(sizeof(T)));
template <class T, int count>
constexpr bool kHasAccess = kAccess<T, count> >= 4 && count * sizeof(T) % kAccess<T, count> == 0;

template <class T, int count>
__device__ __forceinline__ void load_vector(T (&values)[count], const T* from) {
  using V = typename Bits<kAccess<T, count>>::type;
  constexpr int kCount = count * int(sizeof(T)) / int(sizeof(V));
  V bits[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits[i] = reinterpret_cast<const V*>(from)[i];
  memcpy(&values, bits, sizeof(values));
}
template <class T, int count>
__device__ __forceinline__ void store_vector(T* to, const T (&values)[count]) {
  using V = typename Bits<kAccess<T, count>>::type;
  constexpr int kCount = count * int(sizeof(T)) / int(sizeof(V));
  V bits[kCount];
  memcpy(bits, &values, sizeof(values));
#pragma unroll
  for (int i = 0; i < kCount; ++i) reinterpret_cast<V*>(to)[i] = bits[i];
}
// Whether vectors of `count` channels can be read or written at every pixel.
template <class T, int count>
bool has_vectors(const T* t, const Strides4& s) {
  if constexpr (!kHasAccess<T, count>) return false;
  return s.c == 1 && s.n % count == 0 && s.h % count == 0 && s.w % count == 0 &&
         reinterpret_cast<uintptr_t>(t) % kAccess<T, count> == 0;
}

// The first `valid` of `count` channels, `stride` apart; the others 0.
template <class T, int count>
__device__ __forceinline__ void load_channels(accumulate_t<T> (&to)[count], const T* from, int64_t stride, int valid,
                                              bool vectors) {
  T values[count] = {};
  if (kHasAccess<T, count> && vectors) {
    if constexpr (kHasAccess<T, count>) load_vector(values, from);
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k)
      if (k < valid) values[k] = from[k * stride];
  }
#pragma unroll
  for (int k = 0; k < count; ++k) to[k] = to_float(values[k]);
}

}  // namespace
}  // namespace pynn::cuda
