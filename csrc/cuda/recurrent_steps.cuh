// Kernels whose blocks own the units and rows of a tile: one launch per step, or one cooperative launch for all steps.
//
// A step's launch reads the weights from the L2 cache; the launch boundary is the barrier between steps. In the
// cooperative launch the weights of a block's 16 units stay in its shared memory. There a block says by a flag which
// steps of a strip of rows it has finished, and waits for the flags of the blocks with the same rows only.
//
// The state of step s, forward, is read from one of two buffers and written to the other one: a block writes the state
// that follows s once every block has written the one before it, and so has read the one that is replaced.
#pragma once
#include "recurrent_cells.cuh"
#include "recurrent_product.cuh"

namespace pynn::cuda {
namespace {
namespace recurrent {

// Where a kernel writes the state that is the next product's left operand: rows of `stride` elements; the gates of a
// unit are `pitch` apart.
template <class T>
struct Next {
  T* to;
  int64_t stride;
  int pitch;
  __device__ __forceinline__ T* at(int64_t row, int unit) const { return to + row * stride + unit; }
};

// The part of a tile's epilogue that a thread computes: of each strip one row and one unit.
__device__ __forceinline__ int own_row(int strip) { return kStripRows * strip + threadIdx.x / kTileUnits; }
__device__ __forceinline__ int own_unit() { return threadIdx.x % kTileUnits; }

struct NoWait {
  __device__ void operator()() const {}
};

// One step of a tile. wait: called before the state is read.
template <class T, int gates, int strips, bool resident, class Wait>
__device__ __forceinline__ void forward_tile(const Forward<T>& f, const Operands<T>& o, const Next<T>& next,
                                             int64_t step, int64_t row0, int unit0, unsigned char* shared,
                                             const unsigned char* right, const Wait& wait) {
  using Pipeline = recurrent::Pipeline<T, gates, strips, resident>;
  const int64_t t = f.clock.time(step);
  const int unit = unit0 + own_unit();
  Given<T, gates> given[strips];
  bool alive = false;
#pragma unroll
  for (int m = 0; m < strips; ++m) {
    const int64_t row = row0 + own_row(m);
    given[m].load(f, t, row, unit, o.left + row * o.left_stride + unit);
    alive |= given[m].alive;
  }
  if (__syncthreads_or(alive)) {
    wait();
    Pipeline::run(o, row0, unit0, shared, right);
  }
#pragma unroll
  for (int m = 0; m < strips; ++m) {
    const int64_t row = row0 + own_row(m);
    accumulate_t<T> sum[gates] = {};
    if (given[m].alive) {
#pragma unroll
      for (int g = 0; g < gates; ++g) sum[g] = Pipeline::sum(shared, own_row(m), own_unit(), g);
    }
    finish_forward(f, t, row, unit, given[m], sum, next.at(row, unit));
  }
}

template <class T, int strips, bool resident, class Wait>
__device__ __forceinline__ void backward_tile(const Backward<T>& b, const Operands<T>& o, const Next<T>& next,
                                              int64_t step, int64_t row0, int unit0, unsigned char* shared,
                                              const unsigned char* right, const Wait& wait) {
  using Pipeline = recurrent::Pipeline<T, 1, strips, resident>;
  const int unit = unit0 + own_unit();
  GivenBack<T> given[strips];
  bool product = false;
#pragma unroll
  for (int m = 0; m < strips; ++m) {
    given[m].load(b, step, row0 + own_row(m), unit);
    product |= b.stage == Stage::hidden ? given[m].alive : given[m].fresh;
  }
  const bool multiplied = __syncthreads_or(product);
  if (multiplied) {
    wait();
    Pipeline::run(o, row0, unit0, shared, right);
  }
#pragma unroll
  for (int m = 0; m < strips; ++m) {
    const int64_t row = row0 + own_row(m);
    const accumulate_t<T> sum = multiplied ? Pipeline::sum(shared, own_row(m), own_unit(), 0) : 0;
    finish_backward(b, step, row, unit, given[m], sum, next.at(row, unit), next.pitch);
  }
}

// ---------------------------------------------------------------- one launch per step

template <class T, int strips>
constexpr int kStepBlocks = strips == 1 && sizeof(T) < 8 ? 2 : 1;  // of a processor

// gates: 4 lstm, 3 gru, 1 rnn and projections.
template <class T, int gates, int strips>
__global__ void __launch_bounds__(kThreads, kStepBlocks<T, strips>)
    forward_step_kernel(Forward<T> f, Operands<T> o, Next<T> next, int64_t step) {
  DYNAMIC_SHARED(unsigned char, shared);
  const int unit_tiles = (o.units + kTileUnits - 1) / kTileUnits;
  const int64_t row0 = int64_t(blockIdx.x / unit_tiles) * (kStripRows * strips);
  const int unit0 = blockIdx.x % unit_tiles * kTileUnits;
  forward_tile<T, gates, strips, false>(f, o, next, step, row0, unit0, shared, nullptr, NoWait());
}

template <class T, int strips>
__global__ void __launch_bounds__(kThreads, kStepBlocks<T, strips>)
    backward_step_kernel(Backward<T> b, Operands<T> o, Next<T> next, int64_t step) {
  DYNAMIC_SHARED(unsigned char, shared);
  const int unit_tiles = (o.units + kTileUnits - 1) / kTileUnits;
  const int64_t row0 = int64_t(blockIdx.x / unit_tiles) * (kStripRows * strips);
  const int unit0 = blockIdx.x % unit_tiles * kTileUnits;
  backward_tile<T, strips, false>(b, o, next, step, row0, unit0, shared, nullptr, NoWait());
}

// ---------------------------------------------------------------- one cooperative launch

// Blocks own a tile of units and every `groups`-th strip of rows.
struct Team {
  int unit_tiles, groups;
  unsigned* flags;  // (strips of rows, unit_tiles): steps that the block has finished

  __device__ __forceinline__ void wait(int64_t strip, int64_t step) const {
    for (int i = threadIdx.x; i < unit_tiles; i += kThreads)
      while (load_acquire(flags + strip * unit_tiles + i) < unsigned(step)) {
      }
    __syncthreads();
  }
  // Called by all threads of the block.
  __device__ __forceinline__ void finish(int64_t strip, int64_t step) const {
    __syncthreads();
    if (threadIdx.x == 0) store_release(flags + strip * unit_tiles + blockIdx.x % unit_tiles, unsigned(step + 1));
  }
};

template <class T, int gates>
constexpr size_t kTeamBytes = Pipeline<T, gates, 1, true>::kSharedBytes;

// The weights of the block's units to shared memory. The copies have arrived when the first product has waited for its
// own.
template <class T, int gates>
__device__ __forceinline__ unsigned char* resident_weights(const Operands<T>& o, int unit0, unsigned char* shared) {
  using Pipeline = recurrent::Pipeline<T, gates, 1, true>;
  unsigned char* const right = shared + kTeamBytes<T, gates>;
  for (int s = 0; s < o.stages; ++s) Pipeline::template copy_right<1>(right + s * Pipeline::kRightBytes, o, s, unit0);
  cp_async_commit();
  return right;
}

template <class T, int gates>
__global__ void __launch_bounds__(kThreads, 1)
    forward_team_kernel(Forward<T> f, Operands<T> o, T* states, T* states_after, Team team) {
  DYNAMIC_SHARED(unsigned char, shared);
  const int unit0 = blockIdx.x % team.unit_tiles * kTileUnits;
  const unsigned char* const right = resident_weights<T, gates>(o, unit0, shared);
  const int64_t strips = (f.clock.batch + kStripRows - 1) / kStripRows;
  for (int64_t step = 0; step < f.clock.steps; ++step) {
    o.left = step % 2 == 0 ? states : states_after;
    const Next<T> next{step % 2 == 0 ? states_after : states, o.left_stride, 0};
    for (int64_t strip = blockIdx.x / team.unit_tiles; strip < strips; strip += team.groups) {
      forward_tile<T, gates, 1, true>(f, o, next, step, strip * kStripRows, unit0, shared, right,
                                      [&] { team.wait(strip, step); });
      team.finish(strip, step);
    }
  }
  cp_async_wait<0>();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_team_kernel(Backward<T> b, Operands<T> o, T* gradients, T* gradients_after, int pitch, Team team) {
  DYNAMIC_SHARED(unsigned char, shared);
  const int unit0 = blockIdx.x % team.unit_tiles * kTileUnits;
  const unsigned char* const right = resident_weights<T, 1>(o, unit0, shared);
  const int64_t strips = (b.clock.batch + kStripRows - 1) / kStripRows;
  for (int64_t step = 0; step <= b.clock.steps; ++step) {
    o.left = step % 2 == 0 ? gradients : gradients_after;
    const Next<T> next{step % 2 == 0 ? gradients_after : gradients, o.left_stride, pitch};
    for (int64_t strip = blockIdx.x / team.unit_tiles; strip < strips; strip += team.groups) {
      backward_tile<T, 1, true>(b, o, next, step, strip * kStripRows, unit0, shared, right,
                                [&] { team.wait(strip, step); });
      team.finish(strip, step);
    }
  }
  cp_async_wait<0>();
}

}  // namespace recurrent
}  // namespace
}  // namespace pynn::cuda
