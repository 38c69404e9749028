// Kernels in which one block computes all units of its 16 rows, for all steps: weights and states stay in its shared
// memory, and no block waits for another. For layers whose weights fit.
//
// A warp computes eight units at a time, all parts of their sums, so that the gates of a unit meet in a thread.
#pragma once
#include "recurrent_cells.cuh"
#include "recurrent_product.cuh"

namespace pynn::cuda {
namespace {
namespace recurrent {

// Shared memory: the weights of all units, then two buffers of the state. Rows are an odd number of packs apart, so
// that eight of them lie in different banks.
struct BlockLayout {
  int pairs;   // of packs, in the sum
  int groups;  // of eight units
  int stride;  // bytes of a row
  int64_t weights;

  // length: of the sum
  template <class T>
  static __host__ __device__ BlockLayout of(int64_t length, int units, int gates) {
    const int pairs = int((length * int64_t(sizeof(T)) + 31) / 32), groups = (units + 7) / 8, stride = 32 * pairs + 16;
    return {pairs, groups, stride, int64_t(groups) * 8 * gates * stride};
  }
  __host__ __device__ int64_t bytes() const { return weights + 2 * kStripRows * int64_t(stride); }
};

// Rows of `packs` packs to rows of `pairs` pairs of them, `stride` bytes apart; from(row) is where a row begins, or
// nullptr for zeros.
template <class T, class From>
__device__ __forceinline__ void copy_rows(unsigned char* to, int pairs, int stride, int rows, int packs,
                                          const T* tensor, const From& from) {
  const int width = 2 * pairs;
  for (int i = threadIdx.x; i < rows * width; i += kThreads) {
    const int row = i / width, pack = i % width;
    const T* const begin = from(row);
    const bool valid = begin && pack < packs;
    cp_async<16>(to + row * stride + pack * 16, valid ? begin + pack * (16 / int(sizeof(T))) : tensor, valid ? 16 : 0);
  }
}

template <class T, int gates>
__device__ __forceinline__ void load_block(const Operands<T>& o, const BlockLayout& layout, int64_t row0,
                                           unsigned char* shared) {
  const int pairs = layout.pairs, stride = layout.stride;
  copy_rows(shared, pairs, stride, layout.groups * 8 * gates, o.right_packs, o.right, [&](int row) -> const T* {
    const int gate = row / 8 % gates, unit = row / (8 * gates) * 8 + row % 8;
    return unit < o.units ? o.right + gate * o.gate_stride + unit * o.right_stride : nullptr;
  });
  for (int buffer = 0; buffer < 2; ++buffer)
    copy_rows(shared + layout.weights + buffer * kStripRows * stride, pairs, stride, kStripRows, 2 * pairs, o.left,
              [&](int row) { return row0 + row < o.rows ? o.left + (row0 + row) * o.left_stride : nullptr; });
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
}

// The sums of a warp's eight units. weights, state: where the first row of each lies, rows are right_stride and
// left_stride bytes apart. The first pairs of packs of the weights are those in `kept`, in registers.
template <class T, int gates, int kept>
__device__ __forceinline__ void block_product(accumulate_t<T> (&sum)[gates][4], int pairs,
                                              const KeptWeights<gates, kept>& weights_kept,
                                              const unsigned char* weights, int right_stride,
                                              const unsigned char* state, int left_stride) {
  using A = accumulate_t<T>;
  constexpr int kParts = Tile<T, gates>::kParts;
  A part[kParts][1][gates][4] = {};
  const auto left = [&](int row, int pack) { return state + row * left_stride + pack * 16; };
  if constexpr (kept > 0)
#pragma unroll
    for (int k = 0; k < kept; ++k) weights_kept.template multiply<T>(part[k % kParts][0], left, k);
  for (int k = kept; k < pairs; k += kParts) {
#pragma unroll
    for (int p = 0; p < kParts; ++p)
      if (k + p < pairs)
        multiply<T, 1, gates>(
            part[(kept + p) % kParts], left,
            [&](int row, int pack) { return weights + row * right_stride + (pack - 2 * kept) * 16; }, 2 * (k + p));
  }
#pragma unroll
  for (int g = 0; g < gates; ++g)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      A parts[kParts];
#pragma unroll
      for (int p = 0; p < kParts; ++p) parts[p] = part[p][0][g][i];
      sum[g][i] = add_parts(parts);
    }
}

// The longest of the block's rows.
__device__ __forceinline__ int64_t longest_row(const Clock& clock, int64_t row0) {
  int64_t longest = 0;
  for (int row = 0; row < kStripRows; ++row) longest = max(longest, clock.length(row0 + row));
  return longest;
}

template <class T, int gates>
__global__ void __launch_bounds__(kThreads, 1) forward_block_kernel(Forward<T> f, Operands<T> o) {
  using A = accumulate_t<T>;
  DYNAMIC_SHARED(unsigned char, shared);
  const BlockLayout layout = BlockLayout::of<T>(f.hidden, f.hidden, gates);
  const int64_t row0 = int64_t(blockIdx.x) * kStripRows, longest = longest_row(f.clock, row0);
  load_block<T, gates>(o, layout, row0, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned char *state = shared + layout.weights, *next = state + kStripRows * layout.stride;
  for (int64_t step = 0; step < f.clock.steps; ++step) {
    const int64_t t = f.clock.time(step);
    for (int group = warp; group < layout.groups; group += kWarps) {
      Given<T, gates> given[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = sum_row<T>(lane, i), unit = 8 * group + sum_column<T>(lane, i);
        given[i].load(f, t, row0 + row, unit, reinterpret_cast<const T*>(state + row * layout.stride) + unit);
      }
      A sum[gates][4] = {};
      if (t < longest)
        block_product<T, gates, 0>(sum, layout.pairs, {}, shared + group * (8 * gates) * layout.stride, layout.stride,
                                   state, layout.stride);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = sum_row<T>(lane, i), unit = 8 * group + sum_column<T>(lane, i);
        A own[gates];
#pragma unroll
        for (int g = 0; g < gates; ++g) own[g] = sum[g][i];
        finish_forward(f, t, row0 + row, unit, given[i], own, reinterpret_cast<T*>(next + row * layout.stride) + unit);
      }
    }
    __syncthreads();
    unsigned char* const swapped = state;
    state = next, next = swapped;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) backward_block_kernel(Backward<T> b, Operands<T> o, int length) {
  using A = accumulate_t<T>;
  DYNAMIC_SHARED(unsigned char, shared);
  const BlockLayout layout = BlockLayout::of<T>(length, b.units, 1);
  const int64_t row0 = int64_t(blockIdx.x) * kStripRows, longest = longest_row(b.clock, row0);
  load_block<T, 1>(o, layout, row0, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned char *gradients = shared + layout.weights, *next = gradients + kStripRows * layout.stride;
  for (int64_t step = 0; step <= b.clock.steps; ++step) {
    const bool fresh = b.clock.alive_back(step - 1, longest);
    for (int group = warp; group < layout.groups; group += kWarps) {
      GivenBack<T> given[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        given[i].load(b, step, row0 + sum_row<T>(lane, i), 8 * group + sum_column<T>(lane, i));
      A sum[1][4] = {};
      if (fresh)
        block_product<T, 1, 0>(sum, layout.pairs, {}, shared + group * 8 * layout.stride, layout.stride, gradients,
                               layout.stride);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = sum_row<T>(lane, i), unit = 8 * group + sum_column<T>(lane, i);
        finish_backward(b, step, row0 + row, unit, given[i], sum[0][i],
                        reinterpret_cast<T*>(next + row * layout.stride) + unit, b.units);
      }
    }
    __syncthreads();
    unsigned char* const swapped = gradients;
    gradients = next, next = swapped;
  }
}

}  // namespace recurrent
}  // namespace
}  // namespace pynn::cuda
