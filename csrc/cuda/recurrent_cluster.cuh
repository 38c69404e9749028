// Kernels in which a cluster of blocks computes all units of its 16 rows, for all steps: recurrent_block.cuh with the
// units dealt out over the blocks. A block keeps the weights of its units in shared memory and, where they are too
// many, in registers, and the whole state in shared memory; what it computes of the next state it writes to its own
// shared memory and sends from there to the other blocks'. Clusters do not wait for each other.
//
// A block goes on to a step when its own warps have written and the other blocks' bytes have come. The state of a step
// is read from one of two buffers and the next one written to the other: a warp sends its share once it has read what
// that replaces, so that whoever has a whole state knows that everybody has read the one before it. With one buffer,
// for wide gradients, a barrier of the cluster comes between reading and writing. Nothing is sent to a block without
// units: nobody waits for it, so bytes of later states could come before it has announced those of an earlier one.
#pragma once
#include "recurrent_block.cuh"

namespace pynn::cuda {
namespace {
namespace recurrent {

// Shared memory of a block: two barriers, the weights of its units, then the buffers of the state. Rows are an odd
// number of packs apart, so that eight of them lie in different banks.
struct ClusterLayout {
  int blocks;   // of a cluster; 0: no cluster is large enough
  int owners;   // the first of them, which have units
  int groups;   // of eight units, of a block
  int pairs;    // of packs, in the sum
  int kept;     // of them, the first are in registers: then a warp has one group at most
  int buffers;  // of the state

  __host__ __device__ int right_stride() const { return 32 * (pairs - kept) + 16; }
  __host__ __device__ int left_stride() const { return 32 * pairs + 16; }
  __host__ __device__ int64_t weights(int gates) const { return int64_t(groups) * 8 * gates * right_stride(); }
  __host__ __device__ int64_t bytes(int gates) const {
    return kBarrierBytes + weights(gates) + int64_t(buffers) * kStripRows * left_stride();
  }
  static constexpr int kBarrierBytes = 16;
};

// The states of a cluster on their way: state `step` + 1 is written during `step`, and counted by the barrier whose
// turn it is. Two barriers, for a block may get parts of a state while others still wait for some of the one before it.
struct Arrival {
  uint64_t* barriers;
  unsigned bytes;  // from the other blocks

  // units: of the layer, bytes: of a row of eight of them.
  __device__ __forceinline__ Arrival(void* shared, const ClusterLayout& layout, int units, int bytes)
      : barriers(static_cast<uint64_t*>(shared)) {
    const int groups = (units + 7) / 8, group0 = cluster_rank() * layout.groups,
              own = max(0, min(layout.groups, groups - group0));
    this->bytes = own > 0 ? (groups - own) * kStripRows * bytes : 0;
    if (threadIdx.x == 0)
      for (int i = 0; i < 2; ++i) mbarrier_init(barriers + i, kWarps);
  }
  __device__ __forceinline__ uint64_t* of(int64_t step) const { return barriers + step % 2; }

  // For the state that the step reads; the first one is there.
  __device__ __forceinline__ void wait(int64_t step) const {
    if (step > 0) mbarrier_wait(of(step - 1), (step - 1) / 2 % 2);
    __syncwarp();  // its lanes need not see the end at once, and ldmatrix is for whole warps
  }
  // The warp has sent all its shares of the next state.
  __device__ __forceinline__ void arrive(int64_t step) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(of(step), threadIdx.x == 0 ? bytes : 0);
  }
};

// A block's weights and its copies of the first state.
template <class T, int gates, int kept>
__device__ __forceinline__ void load_cluster_block(KeptWeights<gates, kept>& weights_kept, const Operands<T>& o,
                                                   const ClusterLayout& layout, int group0, int64_t row0,
                                                   unsigned char* shared) {
  const auto weights = [&](int gate, int unit) -> const T* {
    return unit < o.units ? o.right + gate * o.gate_stride + unit * o.right_stride : nullptr;
  };
  constexpr int kInRegisters = kept * (32 / int(sizeof(T)));
  copy_rows(shared, layout.pairs - kept, layout.right_stride(), layout.groups * 8 * gates, o.right_packs - 2 * kept,
            o.right, [&](int row) {
              const T* const begin = weights(row / 8 % gates, (group0 + row / (8 * gates)) * 8 + row % 8);
              return begin ? begin + kInRegisters : nullptr;
            });
  for (int buffer = 0; buffer < layout.buffers; ++buffer)
    copy_rows(shared + layout.weights(gates) + buffer * kStripRows * layout.left_stride(), layout.pairs,
              layout.left_stride(), kStripRows, 2 * layout.pairs, o.left,
              [&](int row) { return row0 + row < o.rows ? o.left + (row0 + row) * o.left_stride : nullptr; });
  cp_async_commit();
  if constexpr (kept > 0) {
    const int warp = threadIdx.x / 32, unit = 8 * (group0 + warp) + threadIdx.x % 32 / 4;
    weights_kept.load([&](int gate) { return warp < layout.groups ? weights(gate, unit) : nullptr; });
  }
  cp_async_wait<0>();
  __syncthreads();
}

// To the other owners: the warp's eight units of every row, which it wrote from `units` on to its own block's buffer.
template <class T>
__device__ __forceinline__ void send(unsigned char* units, int stride, unsigned owners, uint64_t* barrier) {
  constexpr int kPacks = 8 * sizeof(T) / 16, kPlaces = kStripRows * kPacks;
  const unsigned lane = threadIdx.x % 32, place = lane % kPlaces, rank = cluster_rank();
  unsigned char* const pack = units + place / kPacks * stride + place % kPacks * 16;
  uint4 value;
  memcpy(&value, __builtin_assume_aligned(pack, 16), 16);
  for (unsigned distance = 1 + lane / kPlaces; distance < owners; distance += 32 / kPlaces)
    store_async(reinterpret_cast<uint4*>(pack), (rank + distance) % owners, value, barrier);
}

template <class T, int gates, int kept>
__global__ void __launch_bounds__(kThreads, 1)
    forward_cluster_kernel(Forward<T> f, Operands<T> o, ClusterLayout layout) {
  if constexpr (kClusters) {
    using A = accumulate_t<T>;
    DYNAMIC_SHARED(unsigned char, memory);
    const int64_t row0 = int64_t(blockIdx.x / layout.blocks) * kStripRows, longest = longest_row(f.clock, row0);
    const Arrival arrival(memory, layout, f.hidden, 8 * sizeof(T));
    unsigned char* const shared = memory + layout.kBarrierBytes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group0 = cluster_rank() * layout.groups,
              stride = layout.left_stride();
    KeptWeights<gates, kept> weights_kept;
    load_cluster_block<T, gates, kept>(weights_kept, o, layout, group0, row0, shared);
    cluster_arrive();
    cluster_wait();
    unsigned char *state = shared + layout.weights(gates), *next = state + kStripRows * stride;
    for (int64_t step = 0; step < f.clock.steps; ++step) {
      const int64_t t = f.clock.time(step);
      const bool last = step + 1 == f.clock.steps;
      for (int first = 0; first < layout.groups; first += kWarps) {
        const int group = first + warp, unit0 = 8 * (group0 + group);
        const bool mine = group < layout.groups && unit0 < f.hidden;
        Given<T, gates> given[4];
        if (mine) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = sum_row<T>(lane, i), unit = unit0 + sum_column<T>(lane, i);
            given[i].load(f, t, row0 + row, unit, reinterpret_cast<const T*>(state + row * stride) + unit);
          }
        }
        if (first == 0) arrival.wait(step);
        if (!mine) continue;
        A sum[gates][4] = {};
        if (t < longest)
          block_product<T, gates, kept>(sum, layout.pairs, weights_kept,
                                        shared + group * (8 * gates) * layout.right_stride(), layout.right_stride(),
                                        state, stride);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = sum_row<T>(lane, i), unit = unit0 + sum_column<T>(lane, i);
          A own[gates];
#pragma unroll
          for (int g = 0; g < gates; ++g) own[g] = sum[g][i];
          finish_forward(f, t, row0 + row, unit, given[i], own, reinterpret_cast<T*>(next + row * stride) + unit);
        }
        __syncwarp();
        if (!last) send<T>(next + unit0 * int(sizeof(T)), stride, layout.owners, arrival.of(step));
      }
      if (!last) arrival.arrive(step);
      unsigned char* const swapped = state;
      state = next, next = swapped;
    }
  }
}

template <class T, int kept>
__global__ void __launch_bounds__(kThreads, 1)
    backward_cluster_kernel(Backward<T> b, Operands<T> o, ClusterLayout layout) {
  if constexpr (kClusters) {
    using A = accumulate_t<T>;
    DYNAMIC_SHARED(unsigned char, memory);
    const int64_t row0 = int64_t(blockIdx.x / layout.blocks) * kStripRows, longest = longest_row(b.clock, row0);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group0 = cluster_rank() * layout.groups,
              stride = layout.left_stride(), gates = int(gates_of(b.cell));
    const Arrival arrival(memory, layout, b.units, 8 * gates * sizeof(T));
    unsigned char* const shared = memory + layout.kBarrierBytes;
    KeptWeights<1, kept> weights_kept;
    load_cluster_block<T, 1, kept>(weights_kept, o, layout, group0, row0, shared);
    cluster_arrive();
    cluster_wait();
    unsigned char *gradients = shared + layout.weights(1),
                  *next = gradients + (layout.buffers - 1) * kStripRows * stride;
    for (int64_t step = 0; step <= b.clock.steps; ++step) {
      const bool fresh = b.clock.alive_back(step - 1, longest), last = step == b.clock.steps;
      for (int first = 0; first < layout.groups; first += kWarps) {
        const int group = first + warp, unit0 = 8 * (group0 + group);
        const bool mine = group < layout.groups && unit0 < b.units;
        GivenBack<T> given[4];
        if (mine) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            given[i].load(b, step, row0 + sum_row<T>(lane, i), unit0 + sum_column<T>(lane, i));
        }
        if (first == 0) arrival.wait(step);
        A sum[1][4] = {};
        if (mine && fresh)
          block_product<T, 1, kept>(sum, layout.pairs, weights_kept, shared + group * 8 * layout.right_stride(),
                                    layout.right_stride(), gradients, stride);
        if (layout.buffers == 1) {
          cluster_arrive();
          cluster_wait();
        }
        if (!mine) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = sum_row<T>(lane, i), unit = unit0 + sum_column<T>(lane, i);
          finish_backward(b, step, row0 + row, unit, given[i], sum[0][i],
                          reinterpret_cast<T*>(next + row * stride) + unit, b.units);
        }
        __syncwarp();
        if (!last)
          for (int g = 0; g < gates; ++g)
            send<T>(next + (g * b.units + unit0) * int(sizeof(T)), stride, layout.owners, arrival.of(step));
      }
      if (!last) arrival.arrive(step);
      unsigned char* const swapped = gradients;
      gradients = next, next = swapped;
    }
  }
}

}  // namespace recurrent
}  // namespace
}  // namespace pynn::cuda
