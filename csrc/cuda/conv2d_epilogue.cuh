// The epilogue of a convolution on a GPU: finished sums get bias, residual and activation, are rounded once and stored.
#pragma once
#include "conv2d_activation.cuh"
#include "conv2d_geometry.cuh"
#include "conv2d_vectors.cuh"

namespace pynn::cuda {
namespace {

// Where results go. T: the type they are stored in.
template <class T>
struct Output {
  using A = accumulate_t<T>;
  T* y;
  Strides4 strides;
  Conv2dEpilogue<T> epilogue;

  __device__ void store(A sum, const Element& e) const {
    A values[1] = {sum};
    store_channels(values, e, 1, false);
  }

  // Stores `valid` sums of channels e.c, e.c + 1, ... of one pixel. vectors: has_vectors<count>(), and e.c is a
  // multiple of `count`.
  template <int count>
  __device__ void store_channels(A (&sums)[count], const Element& e, int valid, bool vectors) const {
    const Conv2dEpilogue<T>& p = epilogue;
    vectors = vectors && valid == count;
    if (p.bias) {
#pragma unroll
      for (int k = 0; k < count; ++k)
        if (k < valid) sums[k] += to_float(p.bias[(e.c + k) * p.bias_stride]);
    }
    if (p.residual) {
      const T* const from = p.residual + e.at(p.residual_strides);
      A values[count];
      load_channels(values, from, p.residual_strides.c, valid, vectors);
#pragma unroll
      for (int k = 0; k < count; ++k) sums[k] += values[k];
    }
    const int64_t at = e.at(strides);
    if (p.pre) store_run(p.pre + at, sums, valid, vectors);
    with_activation(p.activation, [&]<Activation kind>() {
#pragma unroll
      for (int k = 0; k < count; ++k) sums[k] = activated<T, kind>(sums[k]);
    });
    store_run(y + at, sums, valid, vectors);
  }

  // Whether vectors of `count` channels can be stored (and the residual's loaded).
  template <int count>
  bool has_vectors() const {
    const Conv2dEpilogue<T>& p = epilogue;
    return cuda::has_vectors<T, count>(y, strides) && (!p.pre || cuda::has_vectors<T, count>(p.pre, strides)) &&
           (!p.residual || cuda::has_vectors<T, count>(p.residual, p.residual_strides));
  }

 private:
  template <int count>
  __device__ void store_run(T* to, const A (&sums)[count], int valid, bool vectors) const {
    if constexpr (kHasAccess<T, count>) {
      if (vectors) {
        T values[count];
#pragma unroll
        for (int k = 0; k < count; ++k) values[k] = from_float<T>(sums[k]);
        store_vector(to, values);
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < count; ++k)
      if (k < valid) to[k * strides.c] = from_float<T>(sums[k]);
  }
};

}  // namespace
}  // namespace pynn::cuda
