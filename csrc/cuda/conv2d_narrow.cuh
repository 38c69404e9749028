// Convolutions with few channels on one side: heads, stems of one or two channels, small groups, and the input
// gradients of all of them for stride 1. Tensor cores would work on padding here.
//
// A block computes a tile of output pixels of one image and `count` output channels. It copies a few input channels of
// the tile, borders included, and their weights to shared memory in fp32, from any layout; threads have kRows pixels of
// a column each and all `count` channels. Sums have the order of the direct kernel's.
#pragma once
#include "conv2d_epilogue.cuh"

namespace pynn::cuda {
namespace {

constexpr int kNarrowThreads = 128, kNarrowRows = 2;
constexpr int64_t kMostNarrowFloats = 12 << 10;  // of shared memory

// Whether 32 bits hold the size of any tile.
inline bool fits_tiles(const Axis& a) { return is_small(a) && a.stride < 1 << 12 && a.kernel * a.dilation < 1 << 14; }

struct NarrowAxis {
  int in, out, kernel, stride, dilation, pad;
  int tile, tile_in, tiles;  // outputs of a tile, inputs that they meet, and how many tiles there are

  NarrowAxis(const Axis& a, int tile)
      : in(int(a.in)),
        out(int(a.out)),
        kernel(int(a.kernel)),
        stride(int(a.stride)),
        dilation(int(a.dilation)),
        pad(int(a.pad)),
        tile(tile),
        tile_in((tile - 1) * stride + (kernel - 1) * dilation + 1),
        tiles(int(ceil_div(out, tile))) {}
};

struct NarrowTiling {
  NarrowAxis rows, columns;
  int64_t batch;
  int groups, in_channels, out_channels, out_blocks;  // channels of a group
  int chunk;                                          // input channels in shared memory
  int64_t filter_group;                               // distance of two groups' filters
  PaddingMode mode;
  bool channels_fast;  // how neighbouring threads copy

  int64_t blocks() const { return batch * rows.tiles * columns.tiles * groups * out_blocks; }
  // Floats of shared memory for one input channel.
  int64_t channel_size(int count) const {
    return int64_t(rows.kernel) * columns.kernel * count + int64_t(rows.tile_in) * columns.tile_in;
  }
};

// Copies what the tile of outputs at (i0, j0) meets: (channel, row, column).
template <class T>
__device__ __forceinline__ void copy_tile(accumulate_t<T>* to, const T* image, const Strides4& strides, int channels,
                                          const NarrowAxis& rows, const NarrowAxis& columns, int i0, int j0,
                                          PaddingMode mode, bool channels_fast) {
  const int row0 = i0 * rows.stride - rows.pad, column0 = j0 * columns.stride - columns.pad;
  const int size = rows.tile_in * columns.tile_in;
  for (int e = int(threadIdx.x); e < channels * size; e += kNarrowThreads) {
    const int c = channels_fast ? e % channels : e / size, p = channels_fast ? e / channels : e % size;
    const int i = int(source_of(row0 + p / columns.tile_in, rows.in, mode));
    const int j = int(source_of(column0 + p % columns.tile_in, columns.in, mode));
    const T value = i < 0 || j < 0 ? T{} : image[c * strides.c + i * strides.h + j * strides.w];
    to[c * size + p] = to_float(value);
  }
}

template <class T, int count>
__global__ void __launch_bounds__(kNarrowThreads)
    narrow_kernel(Output<T> out, const T* x, Strides4 x_strides, const T* w, Strides4 w_strides, NarrowTiling t,
                  bool store_vectors) {
  using A = accumulate_t<T>;
  DYNAMIC_SHARED(A, weights);
  const int taps = t.rows.kernel * t.columns.kernel, tile_size = t.rows.tile_in * t.columns.tile_in;
  A* const pixels = weights + t.chunk * taps * count;
  const int first_out = int(blockIdx.x % t.out_blocks) * count;
  int64_t rest = blockIdx.x / t.out_blocks;
  const int group = int(rest % t.groups);
  rest /= t.groups;
  const int j0 = int(rest % t.columns.tiles) * t.columns.tile;
  rest /= t.columns.tiles;
  const int i0 = int(rest % t.rows.tiles) * t.rows.tile;
  const int64_t n = rest / t.rows.tiles;
  const int valid = min(count, t.out_channels - first_out);
  const T* const image = x + n * x_strides.n + int64_t(group) * t.in_channels * x_strides.c;
  const T* const filters = w + group * t.filter_group + first_out * w_strides.n;
  const int column = int(threadIdx.x) % t.columns.tile, row = int(threadIdx.x) / t.columns.tile;
  const int row_step = kNarrowThreads / t.columns.tile;

  ChunkedSums<A, kNarrowRows * count> sums;
  for (int first = 0; first < t.in_channels; first += t.chunk) {
    const int channels = min(t.chunk, t.in_channels - first);
    __syncthreads();
    copy_tile(pixels, image + first * x_strides.c, x_strides, channels, t.rows, t.columns, i0, j0, t.mode,
              t.channels_fast);
    for (int e = int(threadIdx.x); e < channels * taps * count; e += kNarrowThreads) {
      const int tap = e % taps, c = e / taps % channels, o = e / taps / channels;
      const int a = tap / t.columns.kernel, b = tap % t.columns.kernel;
      const T value =
          o < valid ? filters[o * w_strides.n + (first + c) * w_strides.c + a * w_strides.h + b * w_strides.w] : T{};
      weights[(c * taps + tap) * count + o] = to_float(value);
    }
    __syncthreads();
    for (int c = 0; c < channels; ++c)
      for (int a = 0; a < t.rows.kernel; ++a) {
        const A* from = pixels + c * tile_size + (row * t.rows.stride + a * t.rows.dilation) * t.columns.tile_in +
                        column * t.columns.stride;
        const A* factors = weights + (c * taps + a * t.columns.kernel) * count;
        for (int b = 0; b < t.columns.kernel; ++b, from += t.columns.dilation, factors += count)
#pragma unroll
          for (int r = 0; r < kNarrowRows; ++r) {
            const A value = from[r * row_step * t.rows.stride * t.columns.tile_in];
#pragma unroll
            for (int o = 0; o < count; ++o) sums.add(value, factors[o], r * count + o);
          }
        sums.end_row(t.columns.kernel);
      }
  }
#pragma unroll
  for (int r = 0; r < kNarrowRows; ++r) {
    A values[count];
#pragma unroll
    for (int o = 0; o < count; ++o) values[o] = sums.value(r * count + o);
    const int i = i0 + row + r * row_step, j = j0 + column;
    if (i < t.rows.out && j < t.columns.out)
      out.store_channels(values, {n, int64_t(group) * t.out_channels + first_out, i, j}, valid, store_vectors);
  }
}

// The tiles of a correlation whose channels are counted per group; `chunk` is 0 where it does not fit.
inline NarrowTiling narrow_tiling(const Axis& rows, const Axis& columns, int64_t batch, int64_t groups,
                                  int64_t in_channels, int64_t out_channels, int count, PaddingMode mode) {
  constexpr int64_t kMostChunk = 8;
  int wide = 8;
  while (wide < 32 && wide < columns.out) wide *= 2;
  NarrowTiling t{{rows, kNarrowThreads / wide * kNarrowRows},
                 {columns, wide},
                 batch,
                 int(groups),
                 int(in_channels),
                 int(out_channels),
                 int(ceil_div(out_channels, count)),
                 0,
                 0,
                 mode,
                 false};
  t.chunk = int(std::min({kMostChunk, kMostNarrowFloats / t.channel_size(count), in_channels}));
  return t;
}

inline int narrow_count(int64_t out_channels) { return out_channels <= 4 ? 4 : 8; }

// Whether narrow() takes a correlation.
inline bool suits_narrow(const Axis& rows, const Axis& columns, const Conv2dShape& s, int64_t in_channels,
                         int64_t out_channels) {
  if (in_channels == 0 || !fits_tiles(rows) || !fits_tiles(columns)) return false;
  const NarrowTiling t = narrow_tiling(rows, columns, s.batch, s.groups, in_channels, out_channels,
                                       narrow_count(out_channels), PaddingMode::zeros);
  return t.chunk > 0 && t.blocks() < int64_t(1) << 31;
}

template <class T>
void narrow(const Output<T>& out, const T* x, const Strides4& x_strides, const T* w, const Strides4& w_strides,
            int64_t filter_group, const Axis& rows, const Axis& columns, const Conv2dShape& s, int64_t in_channels,
            int64_t out_channels, PaddingMode mode, void* stream) {
  const auto run = [&](auto count) {
    NarrowTiling t = narrow_tiling(rows, columns, s.batch, s.groups, in_channels, out_channels, count, mode);
    t.channels_fast = is_channels_last(x_strides), t.filter_group = filter_group;
    LAUNCH((narrow_kernel<T, count>), unsigned(t.blocks()), kNarrowThreads,
           size_t(t.chunk * t.channel_size(count)) * sizeof(accumulate_t<T>), stream, out, x, x_strides, w, w_strides,
           t, out_channels % count == 0 && out.template has_vectors<count>());
  };
  narrow_count(out_channels) == 4 ? run(std::integral_constant<int, 4>()) : run(std::integral_constant<int, 8>());
}

inline bool is_narrow(const Conv2dShape& s) {
  return suits_narrow(rows_of(s), columns_of(s), s, s.in_channels / s.groups, s.out_channels / s.groups);
}
template <class T>
void narrow_forward(const Output<T>& out, const T* x, const Strides4& x_strides, const T* w, const Strides4& w_strides,
                    const Conv2dShape& s, void* stream) {
  const int64_t outputs = s.out_channels / s.groups;
  narrow(out, x, x_strides, w, w_strides, outputs * w_strides.n, rows_of(s), columns_of(s), s, s.in_channels / s.groups,
         outputs, s.padding_mode, stream);
}

inline bool is_narrow_gradient(const Conv2dShape& s) {
  return s.stride_height == 1 && s.stride_width == 1 &&
         suits_narrow(gradient_axis(rows_of(s)), gradient_axis(columns_of(s)), s, s.out_channels / s.groups,
                      s.in_channels / s.groups);
}
// A correlation of grad_output with flipped filters that take outputs to inputs.
template <class T>
void narrow_gradient(const Output<T>& out, const T* dy, const Strides4& dy_strides, const T* w,
                     const Strides4& w_strides, const Conv2dShape& s, void* stream) {
  const int64_t outputs = s.out_channels / s.groups;
  const T* const last = w + (s.kernel_height - 1) * w_strides.h + (s.kernel_width - 1) * w_strides.w;
  narrow(out, dy, dy_strides, last, {w_strides.c, w_strides.n, -w_strides.h, -w_strides.w}, outputs * w_strides.n,
         gradient_axis(rows_of(s)), gradient_axis(columns_of(s)), s, outputs, s.in_channels / s.groups,
         PaddingMode::zeros, stream);
}

}  // namespace
}  // namespace pynn::cuda
