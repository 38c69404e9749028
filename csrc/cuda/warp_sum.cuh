// Sums over lanes of a warp, in an order that does not depend on anything else.
#pragma once
#include "launch.h"

namespace pynn::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Adds the values of lanes that differ in the bits from `least` to `most`, powers of two: of the whole warp by default.
// Every lane gets the sum. Called by whole warps.
__device__ __forceinline__ double sum_lanes(double value, int most = 16, int least = 1) {
#pragma unroll
  for (int distance = most; distance >= least; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

}  // namespace pynn::cuda
