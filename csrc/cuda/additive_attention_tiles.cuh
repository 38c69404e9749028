// What the kernels of additive attention share: tiles of queries and keys in shared memory, their scores, what of them
// takes part, and what backward needs of one. See additive_attention.cuh.
#pragma once
#include "additive_attention.h"
#include "arithmetic.cuh"
#include "warp_sum.cuh"

namespace pynn::cuda {
namespace {
namespace additive {

constexpr int kWarps = 8, kThreads = kWarps * 32, kKeys = 32;
constexpr int kChunk = 64;          // columns of Q and K in shared memory at a time
constexpr int kPitch = kChunk + 1;  // of a key there: lanes read a column
constexpr int kRun = 16;            // terms of a score that are summed in the compute type; a chunk is whole runs

template <class T>
__device__ __forceinline__ accumulate_t<T> tangent(accumulate_t<T> x) {
  if constexpr (sizeof(T) == 8)
    return tanh(x);
  else if constexpr (sizeof(T) == 4)
    return tanhf(x);
  else  // absolute error 1e-7; the exponential may be infinite, the quotient is then 0
    return 1 - 2 * divide<T>(1, exp_of<T>(2 * x) + 1);
}

template <class A>
__device__ __forceinline__ A largest(A value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(kFullWarp, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// The rows of Q and K in shared memory, and the scores of the two.
template <class T>
struct Tiles {
  using A = accumulate_t<T>;
  using Score = attention_lse_t<T>;
  A *query, *key, *weight;  // (kWarps, kChunk), (kKeys, kPitch), (kChunk)

  // weight . tanh(q + k) for the query of this warp and the key of this lane; any number where one of them does not
  // exist. Called by whole blocks. Runs are summed in the precision of lse: its error would be one of all shares.
  __device__ Score score(const AdditiveOperands<T>& o, const AdditiveShape& shape, int64_t head, int64_t first_query,
                         int64_t first_key) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Score score = 0;
    for (int64_t first = 0; first < shape.dim; first += kChunk) {
      const int columns = int(min(shape.dim - first, int64_t(kChunk)));
      __syncthreads();  // the chunk before has been read
      for (int at = threadIdx.x; at < kWarps * kChunk; at += kThreads)
        query[at] = element(o.query, head, first_query + at / kChunk, shape.queries, first + at % kChunk, shape.dim);
      for (int at = threadIdx.x; at < kKeys * kChunk; at += kThreads)
        key[at / kChunk * kPitch + at % kChunk] =
            element(o.key, head, first_key + at / kChunk, shape.keys, first + at % kChunk, shape.dim);
      for (int at = threadIdx.x; at < kChunk; at += kThreads)
        weight[at] = at < columns ? A(to_float(o.weight[first + at])) : A(0);
      __syncthreads();
      for (int d = 0; d < columns; d += kRun) {
        A sums[4] = {};
#pragma unroll
        for (int i = 0; i < kRun; ++i)
          sums[i % 4] =
              fma(weight[d + i], tangent<T>(query[warp * kChunk + d + i] + key[lane * kPitch + d + i]), sums[i % 4]);
        score += Score(sums[0] + sums[1] + (sums[2] + sums[3]));
      }
    }
    return score;
  }

 private:
  // 0 outside of the matrix of a head.
  static __device__ __forceinline__ A element(const T* m, int64_t head, int64_t row, int64_t rows, int64_t column,
                                              int64_t columns) {
    return row < rows && column < columns ? A(to_float(m[(head * rows + row) * columns + column])) : A(0);
  }
};

#define ADDITIVE_TILES(T, tiles)                             \
  SHARED_ARRAY(accumulate_t<T>, query_tile, kWarps* kChunk); \
  SHARED_ARRAY(accumulate_t<T>, key_tile, kKeys* kPitch);    \
  SHARED_ARRAY(accumulate_t<T>, weight_tile, kChunk);        \
  const Tiles<T> tiles { query_tile, key_tile, weight_tile }

// Where a thread is: its query, and the key of its lane.
struct Place {
  int64_t head, query, key;
  bool exists;  // both of them
};

// Whether the score takes part, and what the mask adds to it.
template <class T>
__device__ __forceinline__ bool visible(const AdditiveOperands<T>& o, const Place& at, int64_t mask_at,
                                        accumulate_t<T>& added) {
  added = 0;
  return at.exists && o.mask.visible(mask_at + at.query * o.mask.row + at.key * o.mask.column, added);
}

// What both backward kernels need of a score.
template <class T>
struct Slope {
  accumulate_t<T> share;  // P
  double to_share;        // its gradient
};

template <class T>
__device__ Slope<T> slope_of(const AdditiveSaved<T>& saved, const AdditiveOperands<T>& o, const AdditiveShape& shape,
                             const Place& at, attention_lse_t<T> score) {
  using A = accumulate_t<T>;
  const int64_t row = at.head * shape.queries + at.query;
  const T* const grad_out = saved.grad_out + row * shape.value_dim;
  const T* const value = o.value + (at.head * shape.keys + at.key) * shape.value_dim;
  A even = 0, odd = 0;
  int64_t v = 0;
  for (; v + 1 < shape.value_dim; v += 2) {
    even = fma(A(to_float(grad_out[v])), A(to_float(value[v])), even);
    odd = fma(A(to_float(grad_out[v + 1])), A(to_float(value[v + 1])), odd);
  }
  if (v < shape.value_dim) even = fma(A(to_float(grad_out[v])), A(to_float(value[v])), even);
  double to_share = double(even) + double(odd);
  if (saved.grad_weights) to_share += double(to_float(saved.grad_weights[row * shape.keys + at.key]));
  return {exp_of<T>(A(double(score) - double(saved.lse[row]))), to_share};
}

}  // namespace additive
}  // namespace
}  // namespace pynn::cuda
