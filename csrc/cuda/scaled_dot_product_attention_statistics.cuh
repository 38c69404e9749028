// Attention, backward: what it needs of each row of scores before it begins, and the gradient of the sinks.
#pragma once
#include "scaled_dot_product_attention_problem.cuh"

namespace pynn::cuda {
namespace {
namespace attention {

// What the backward needs of a row of scores: P = exp(S - shift) * norm. shift is lse rounded to F, norm the rest.
template <class F>
struct RowStatistics {
  F shift, norm, delta;
};

// A warp per row.
constexpr int kDeltaThreads = 256;
template <class T>
__global__ void __launch_bounds__(kDeltaThreads)
    statistics_kernel(const __grid_constant__ Problem<T> p, const __grid_constant__ Operand<const T> out,
                      const attention_lse_t<T>* lse, const attention_lse_t<T>* grad_lse,
                      RowStatistics<accumulate_t<T>>* to) {
  using F = accumulate_t<T>;
  const int64_t index = int64_t(blockIdx.x) * (kDeltaThreads / 32) + threadIdx.x / 32;
  if (index >= p.shape.heads * p.shape.queries) return;
  const int64_t head = index / p.shape.queries, row = index - head * p.shape.queries;
  const auto outputs = matrix_of(out, p.shape, head, 1, p.shape.queries, p.shape.value_dim);
  const auto grads = matrix_of(p.grad_out, p.shape, head, 1, p.shape.queries, p.shape.value_dim);
  F delta = 0;
  for (int d = threadIdx.x % 32; d < outputs.width; d += 32)
    delta = multiply_add(to_float(grads.data[row * grads.row + d * grads.column]),
                         to_float(outputs.data[row * outputs.row + d * outputs.column]), delta);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) delta += __shfl_xor_sync(kWarp, delta, distance);
  if (threadIdx.x % 32 != 0) return;
  if (grad_lse) delta -= F(grad_lse[index]);
  if constexpr (kBase2<T>) {
    to[index] = {lse[index] * kLogUnit<T>, F(1), delta};
  } else {
    const F shift = F(lse[index]);
    to[index] = {shift, is_finite(shift) ? F(exp(double(shift) - lse[index])) : F(1), delta};
  }
}

// The weight that the sink of a head has in a row.
template <class T>
__device__ __forceinline__ accumulate_t<T> sink_weight(accumulate_t<T> sink,
                                                       const RowStatistics<accumulate_t<T>>& row) {
  return shifted_exponential<T>(sink * kLogUnit<T>, row.shift) * row.norm;
}

// A block per head: grad_sinks[head] = -sum of the weights of its sink times delta.
constexpr int kSinkThreads = 256;
template <class T>
__global__ void __launch_bounds__(kSinkThreads)
    sink_gradient_kernel(accumulate_t<T>* grad_sinks, const accumulate_t<T>* sinks,
                         const RowStatistics<accumulate_t<T>>* statistics, int64_t queries) {
  using F = accumulate_t<T>;
  DYNAMIC_SHARED(double, sums);
  const F sink = sinks[blockIdx.x];
  statistics += blockIdx.x * queries;
  double sum = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < queries; i += kSinkThreads) {
    const RowStatistics<F> row = statistics[i];
    sum -= double(sink_weight<T>(sink, row)) * double(row.delta);
  }
  sums[threadIdx.x] = sum;
#pragma unroll 1
  for (int half = kSinkThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) grad_sinks[blockIdx.x] = F(sums[0]);
}

}  // namespace attention
}  // namespace
}  // namespace pynn::cuda
