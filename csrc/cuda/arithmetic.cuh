// Scalar functions in the precision that results of type T need.
#pragma once
#include "dtype.h"
#include "launch.h"

namespace pynn::cuda {
namespace {

template <class T>
__device__ accumulate_t<T> exp_of(accumulate_t<T> x) {
  if constexpr (sizeof(T) == 2)
    return __expf(x);
  else if constexpr (sizeof(T) == 4)
    return expf(x);
  else
    return exp(x);
}
template <class T>
__device__ accumulate_t<T> divide(accumulate_t<T> a, accumulate_t<T> b) {
  if constexpr (sizeof(T) == 2)
    return __fdividef(a, b);
  else
    return a / b;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace pynn::cuda
