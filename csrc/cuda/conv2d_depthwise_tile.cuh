// How the threads of the depthwise kernels share the work, and how they read images and filters.
#pragma once
#include "conv2d_epilogue.cuh"

namespace pynn::cuda {
namespace {

// One axis, in units of `spacing` outputs and `step` inputs: output t of class r meets input
// origin(r) + step * (stride * t + tap). Tiles are numbered class by class.
struct DepthwiseAxis {
  int in, out, kernel, stride, step, spacing, pad, image_stride, tiles;

  DepthwiseAxis(const Axis& a, int tile) {
    const int64_t divisor = std::gcd(a.stride, a.dilation);
    in = int(a.in), out = int(a.out), kernel = int(a.kernel), pad = int(a.pad), image_stride = int(a.stride);
    stride = int(a.stride / divisor), step = int(a.dilation), spacing = int(a.dilation / divisor);
    tiles = spacing * int(ceil_div(ceil_div(out, spacing), tile));
  }
  // The first output of a tile, and of the input grid its first tap meets.
  __device__ int first_output(int index, int tile) const { return index % spacing + index / spacing * tile * spacing; }
  __device__ int first_input(int output) const { return output * image_stride - pad; }
};

// Whether 32 bits hold every position.
inline bool is_small(const Axis& a) {
  constexpr int64_t kLarge = 1 << 28;
  return a.in < kLarge && a.out < kLarge && a.kernel * a.dilation < kLarge && std::abs(a.pad) < kLarge &&
         a.stride < kLarge && a.out * a.stride < kLarge;
}

// How threads share the work: a block has `lanes` vectors of channels and kThreads / lanes tiles.
struct DepthwiseTiling {
  DepthwiseAxis rows, columns;
  int64_t batch, channels, tiles;
  int lanes, lane_blocks, multiplier;
  bool channels_fast;  // neighbouring threads have neighbouring channels, else neighbouring tiles
  PaddingMode mode;

  __device__ int lane() const { return channels_fast ? threadIdx.x % lanes : threadIdx.x / (kThreads / lanes); }
  __device__ int slot() const { return channels_fast ? threadIdx.x / lanes : threadIdx.x % (kThreads / lanes); }
  unsigned blocks() const { return unsigned(ceil_div(tiles, kThreads / lanes) * lane_blocks); }
};

constexpr int64_t kMostWeightBytes = 64 << 10;  // of shared memory

// Floats that a filter takes in shared memory; rows are whole vectors where a thread has one channel.
template <int vector>
int64_t filter_size(int64_t height, int64_t width) {
  return vector == 1 ? height * ceil_div(width, 4) * 4 : height * width * vector;
}

// The weights of a block's channels: (tap, lane, channel of the vector), or (lane, tap row, tap column) for one
// channel.
template <class A, int vector>
struct Filters {
  const A* weights;  // of the thread's lane
  int row, tap;      // distances

  __device__ Filters(const A* shared, int lane, int lanes, int height, int width) {
    tap = vector == 1 ? 1 : lanes * vector;
    row = vector == 1 ? (width + 3) / 4 * 4 : width * tap;
    weights = shared + lane * (vector == 1 ? height * row : vector);
  }
  // sum += x * w[a][b]
  __device__ void add(A (&sum)[vector], const A (&x)[vector], int a, int b) const {
#pragma unroll
    for (int k = 0; k < vector; ++k) sum[k] = fma(x[k], weights[a * row + b * tap + k], sum[k]);
  }
};

// Copies the filters of channels from `first` on to shared memory.
template <class T, int vector>
__device__ void copy_filters(accumulate_t<T>* shared, const T* w, const Strides4& strides, int64_t first,
                             int64_t channels, int lanes, int height, int width) {
  const int taps = height * width, row = (width + 3) / 4 * 4;
  for (int i = int(threadIdx.x); i < taps * lanes * vector; i += kThreads) {
    const int tap = i % taps, channel = i / taps, a = tap / width, b = tap % width;
    const T value = first + channel < channels ? w[(first + channel) * strides.n + a * strides.h + b * strides.w] : T{};
    shared[vector == 1 ? channel * height * row + a * row + b : tap * lanes * vector + channel] = to_float(value);
  }
  __syncthreads();
}

// Where a thread reads: `vector` channels of one image.
template <class T, int vector>
struct ImageReader {
  const T* image;  // of its channels, or of the image where the multiplier is not 1
  Strides4 strides;
  int64_t channel;
  int valid, multiplier;
  bool vectors;

  __device__ ImageReader(const T* x, const Strides4& strides, int64_t n, int64_t channel, int valid, int multiplier,
                         bool vectors)
      : image(x + n * strides.n + (multiplier == 1 ? channel * strides.c : 0)),
        strides(strides),
        channel(channel),
        valid(valid),
        multiplier(multiplier),
        vectors(vectors) {}

  // Column -1, like row -1 before it, is a zero.
  __device__ void load(accumulate_t<T> (&to)[vector], const T* row, int column) const {
    if (column < 0) {
#pragma unroll
      for (int k = 0; k < vector; ++k) to[k] = 0;
      return;
    }
    const T* const from = row + column * strides.w;
    if (multiplier == 1) {
      load_channels<T, vector>(to, from, strides.c, valid, vectors);
      return;
    }
#pragma unroll
    for (int k = 0; k < vector; ++k)
      to[k] = k < valid ? to_float(from[(channel + k) / multiplier * strides.c]) : accumulate_t<T>(0);
  }
};

// Stores a thread's results one after the other; the next one always lies in sums[0], so that the epilogue is there
// once.
template <int count, class A, int vector, class Store>
__device__ void store_all(A (&sums)[count][vector], const Store& store) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    store(sums[0], i);
#pragma unroll
    for (int j = 0; j + 1 < count; ++j)
#pragma unroll
      for (int k = 0; k < vector; ++k) sums[j][k] = sums[j + 1][k];
  }
}

template <class T>
constexpr int kChannelVector = sizeof(T) == 8 ? 2 : 4;

// Lanes and tiles of a block: as many channel vectors as a warp has lanes, or as many tiles as there are.
inline void share_block(DepthwiseTiling& t, int vector, int64_t filter_bytes) {
  t.tiles = t.batch * t.rows.tiles * t.columns.tiles;
  t.channels_fast = vector > 1;
  const int64_t vectors = ceil_div(t.channels, vector);
  t.lanes = 1;
  while (t.lanes < 32 && t.lanes < vectors && 2 * t.lanes * filter_bytes <= kMostWeightBytes &&
         (t.channels_fast || kThreads / (2 * t.lanes) >= t.tiles))
    t.lanes *= 2;
  t.lane_blocks = int(ceil_div(vectors, t.lanes));
}

template <class T>
bool fits_filter(const Axis& rows, const Axis& columns) {
  return filter_size<kChannelVector<T>>(rows.kernel, columns.kernel) * int64_t(sizeof(accumulate_t<T>)) <=
         kMostWeightBytes;
}
template <class T, int vector>
bool reads_vectors(const T* x, const Strides4& s, int multiplier) {
  return vector > 1 && multiplier == 1 && has_vectors<T, vector>(x, s);
}

inline int square_kernel(const Axis& rows, const Axis& columns) {
  return rows.kernel == columns.kernel && (rows.kernel == 3 || rows.kernel == 5 || rows.kernel == 7) ? int(rows.kernel)
                                                                                                     : 0;
}
inline int64_t reduced_stride(const Axis& a) { return a.stride / std::gcd(a.stride, a.dilation); }

}  // namespace
}  // namespace pynn::cuda
