// What recurrent layers need before their first step: operands in rows of whole packs, the first states, sums of
// biases.
#pragma once
#include "arithmetic.cuh"
#include "recurrent.h"

namespace pynn::cuda {
namespace {
namespace recurrent {

constexpr int kCopyThreads = 256, kCopyTile = 32;

// to: (rows, width) = from: (rows, columns), with zeros behind.
template <class T>
__global__ void __launch_bounds__(kCopyThreads)
    pad_kernel(T* to, const T* from, int64_t rows, int64_t columns, int64_t width) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x)
    for (int64_t i = threadIdx.x; i < width; i += kCopyThreads)
      to[row * width + i] = i < columns ? from[row * columns + i] : T{};
}

// to: (columns, width) = from: (rows, columns) transposed, with zeros behind.
template <class T>
__global__ void __launch_bounds__(kCopyThreads)
    transpose_kernel(T* to, const T* from, int64_t rows, int64_t columns, int64_t width) {
  SHARED_ARRAY(T[kCopyTile + 1], tile, kCopyTile);
  const int64_t row_tiles = (width + kCopyTile - 1) / kCopyTile, row0 = blockIdx.x % row_tiles * kCopyTile,
                column0 = blockIdx.x / row_tiles * kCopyTile;
  const int inner = threadIdx.x % kCopyTile;
  for (int i = threadIdx.x / kCopyTile; i < kCopyTile; i += kCopyThreads / kCopyTile) {
    const int64_t row = row0 + i, column = column0 + inner;
    tile[i][inner] = row < rows && column < columns ? from[row * columns + column] : T{};
  }
  __syncthreads();
  for (int i = threadIdx.x / kCopyTile; i < kCopyTile; i += kCopyThreads / kCopyTile) {
    const int64_t row = row0 + inner, column = column0 + i;
    if (row < width && column < columns) to[column * width + row] = tile[inner][i];
  }
}

// What the state is before the first step, and its gradient before the last one.
template <class T>
struct Begin {
  using A = accumulate_t<T>;
  int64_t batch, state, hidden;
  const T* h;  // (batch, state) or nullptr for zeros
  const A* c;  // (batch, hidden) or nullptr for zeros
  T* h_to;
  A* c_to;  // or nullptr
  // Rows of `width`: h, unless they begin as zeros, and zeros behind it.
  T *states, *states_after;
  int64_t width;
  bool from_h;
  T* zeros;
  int64_t zero_count;
  unsigned* flags;
  int64_t flag_count;
  // bias: (biases, hidden) or nullptr, from those of `gates` gates.
  A* bias;
  const T *bias_ih, *bias_hh;
  int gates;
};

// Four blocks of a processor: left alone, ptxas spills rather than use more than 32 registers.
template <class T>
__global__ void __launch_bounds__(kCopyThreads, 4) begin_kernel(Begin<T> b) {
  using A = accumulate_t<T>;
  for (int64_t row = blockIdx.x; row < b.batch; row += gridDim.x) {
    for (int64_t i = threadIdx.x; i < b.state; i += kCopyThreads)
      b.h_to[row * b.state + i] = b.h ? b.h[row * b.state + i] : T{};
    for (int64_t i = threadIdx.x; i < b.width; i += kCopyThreads)
      b.states[row * b.width + i] = b.states_after[row * b.width + i] =
          b.from_h && i < b.state ? b.h[row * b.state + i] : T{};
    if (b.c_to)
      for (int64_t i = threadIdx.x; i < b.hidden; i += kCopyThreads)
        b.c_to[row * b.hidden + i] = b.c ? b.c[row * b.hidden + i] : A(0);
  }
  const int64_t first = int64_t(blockIdx.x) * kCopyThreads + threadIdx.x, step = int64_t(gridDim.x) * kCopyThreads;
  for (int64_t i = first; i < b.zero_count; i += step) b.zeros[i] = T{};
  for (int64_t i = first; i < b.flag_count; i += step) b.flags[i] = 0;
  if (!b.bias) return;
  for (int64_t i = first; i < b.gates * b.hidden; i += step) {
    const A input = b.bias_ih ? A(to_float(b.bias_ih[i])) : A(0), state = b.bias_hh ? A(to_float(b.bias_hh[i])) : A(0);
    // The last gate of a gru keeps its two biases apart: r multiplies the state's share.
    const bool apart = b.gates == 3 && i >= 2 * b.hidden;
    b.bias[i] = apart ? input : input + state;
    if (apart) b.bias[i + b.hidden] = state;
  }
}

}  // namespace recurrent
}  // namespace
}  // namespace pynn::cuda
