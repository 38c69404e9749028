// The weight gradient of a depthwise convolution (any multiplier): all taps from one read of grad_output and input.
//
// A thread owns a cell of kCellRows x kCellColumns output pixels, `vector` neighbouring channels (or one, in an image
// that is not channels last) and a window of taps_high x taps_wide taps. Window rows stay in registers while the cell
// is walked down. The threads of a block with the same channels add their sums in shared memory: a partial result per
// channel, tap and block of pixels, which a second pass adds. Cells, blocks and all sums depend on the shape alone, so
// the bits do not depend on the layout. With dilation a cell takes every spacing-th output.
#pragma once
#include "conv2d_depthwise_tile.cuh"

namespace pynn::cuda {
namespace {

constexpr int kCellRows = 8, kCellColumns = 4;

struct WeightCells {
  DepthwiseTiling t;
  int slots;  // cells of a block
  int64_t blocks, windows, windows_wide;

  // Lanes are chosen as for channels last; with one channel per thread a block has as many cells, of fewer channels.
  WeightCells(const Conv2dShape& s, int channel_vector, int vector, int taps_high, int taps_wide)
      : t{{rows_of(s), kCellRows},
          {columns_of(s), kCellColumns},
          s.batch,
          s.out_channels,
          0,
          0,
          0,
          int(s.out_channels / s.groups),
          vector > 1,
          s.padding_mode} {
    t.tiles = t.batch * t.rows.tiles * t.columns.tiles;
    t.lanes = 1;
    while (t.lanes < 32 && t.lanes < ceil_div(t.channels, channel_vector)) t.lanes *= 2;
    slots = kThreads / t.lanes;
    t.lane_blocks = int(ceil_div(t.channels, int64_t(t.lanes) * vector));
    blocks = ceil_div(t.tiles, slots);
    windows_wide = ceil_div(s.kernel_width, taps_wide);
    windows = ceil_div(s.kernel_height, taps_high) * windows_wide;
  }
};

template <class T, int vector, int taps_high, int taps_wide, int stride>
__global__ void __launch_bounds__(kThreads)
    depthwise_weight_kernel(accumulate_t<T>* partial, const T* dy, Strides4 dy_strides, const T* x, Strides4 x_strides,
                            WeightCells cells, bool dy_vectors, bool x_vectors) {
  using A = accumulate_t<T>;
  constexpr int kWidth = (kCellColumns - 1) * stride + taps_wide;
  constexpr int kKept = std::max(taps_high - stride, 0);  // rows of the window that the next output row needs again
  SHARED_ARRAY(A, shared, taps_wide * vector * kThreads);
  const DepthwiseTiling& t = cells.t;
  const int window = int(blockIdx.x % cells.windows), rest = int(blockIdx.x / cells.windows);
  const int a0 = window / int(cells.windows_wide) * taps_high, b0 = window % int(cells.windows_wide) * taps_wide;
  const int64_t first_channel = int64_t(rest % t.lane_blocks) * t.lanes * vector, block = rest / t.lane_blocks;
  const int64_t cell = block * cells.slots + t.slot(), channel = first_channel + t.lane() * vector;

  A sums[taps_high][taps_wide][vector] = {};
  if (cell < t.tiles && channel < t.channels) {
    const int per_image = t.rows.tiles * t.columns.tiles, in_image = int(cell % per_image);
    const int64_t n = cell / per_image;
    const int i0 = t.rows.first_output(in_image / t.columns.tiles, kCellRows);
    const int j0 = t.columns.first_output(in_image % t.columns.tiles, kCellColumns);
    const int row0 = t.rows.first_input(i0) + a0 * t.rows.step;
    const int column0 = t.columns.first_input(j0) + b0 * t.columns.step;
    const int valid = int(min(int64_t(vector), t.channels - channel));
    const ImageReader<T, vector> image(x, x_strides, n, channel, valid, t.multiplier, x_vectors && valid == vector);
    const ImageReader<T, vector> gradient(dy, dy_strides, n, channel, valid, 1, dy_vectors && valid == vector);
    int columns[kWidth];
#pragma unroll
    for (int c = 0; c < kWidth; ++c) columns[c] = int(source_of(column0 + c * t.columns.step, t.columns.in, t.mode));

    A rows[taps_high][kWidth][vector];
    const auto load_row = [&](A(&to)[kWidth][vector], int index) {
      const int row = int(source_of(row0 + index * t.rows.step, t.rows.in, t.mode));
#pragma unroll
      for (int c = 0; c < kWidth; ++c) image.load(to[c], image.image + row * x_strides.h, row < 0 ? -1 : columns[c]);
    };
#pragma unroll
    for (int a = 0; a < kKept; ++a) load_row(rows[a], a);
#pragma unroll 1
    for (int r = 0; r < kCellRows && i0 + r * t.rows.spacing < t.rows.out; ++r) {
#pragma unroll
      for (int a = kKept; a < taps_high; ++a) load_row(rows[a], r * stride + a);
      A grads[kCellColumns][vector];
      const T* const from = gradient.image + (i0 + r * t.rows.spacing) * dy_strides.h;
#pragma unroll
      for (int c = 0; c < kCellColumns; ++c) {
        const int column = j0 + c * t.columns.spacing;
        gradient.load(grads[c], from, column < t.columns.out ? column : -1);
      }
#pragma unroll
      for (int a = 0; a < taps_high; ++a)
#pragma unroll
        for (int b = 0; b < taps_wide; ++b)
#pragma unroll
          for (int k = 0; k < vector; ++k) {
            A part = 0;
#pragma unroll
            for (int c = 0; c < kCellColumns; ++c)
              if (j0 + c * t.columns.spacing < t.columns.out) part = fma(grads[c][k], rows[a][c * stride + b][k], part);
            sums[a][b][k] += part;
          }
#pragma unroll
      for (int a = 0; a < kKept; ++a)
#pragma unroll
        for (int c = 0; c < kWidth; ++c)
#pragma unroll
          for (int k = 0; k < vector; ++k) rows[a][c][k] = rows[a + stride][c][k];
    }
  }

  const int height = t.rows.kernel, width = t.columns.kernel;
#pragma unroll
  for (int a = 0; a < taps_high; ++a) {
    __syncthreads();
#pragma unroll
    for (int b = 0; b < taps_wide; ++b)
#pragma unroll
      for (int k = 0; k < vector; ++k) shared[(b * vector + k) * kThreads + threadIdx.x] = sums[a][b][k];
    __syncthreads();
    for (int i = int(threadIdx.x); i < taps_wide * vector * t.lanes; i += kThreads) {
      const int lane = i % t.lanes, k = i / t.lanes % vector, b = i / t.lanes / vector;
      const int64_t to = first_channel + lane * vector + k;
      if (a0 + a >= height || b0 + b >= width || to >= t.channels) continue;
      const A* const from = shared + (b * vector + k) * kThreads + (t.channels_fast ? lane : lane * cells.slots);
      double sum = 0;
      for (int s = 0; s < cells.slots; ++s) sum += from[t.channels_fast ? s * t.lanes : s];
      partial[((block * t.channels + to) * height + a0 + a) * width + b0 + b] = A(sum);
    }
  }
}

inline bool is_depthwise_weight(const Conv2dShape& s) {
  const Axis rows = rows_of(s), columns = columns_of(s);
  const int64_t stride = reduced_stride(rows);
  return s.groups > 1 && s.groups == s.in_channels && is_small(rows) && is_small(columns) && stride <= 2 &&
         reduced_stride(columns) == stride;
}

template <class T>
int64_t depthwise_weight_scratch(const Conv2dShape& s) {
  return WeightCells(s, kChannelVector<T>, 1, 1, 1).blocks * s.out_channels * s.kernel_height * s.kernel_width *
         int64_t(sizeof(accumulate_t<T>));
}

template <class T>
void depthwise_weight(T* dw, const T* dy, const Strides4& dy_strides, const T* x, const Strides4& x_strides,
                      const Conv2dShape& s, void* scratch, void* stream) {
  auto* const partial = static_cast<accumulate_t<T>*>(scratch);
  const auto run = [&]<int vector, int high, int wide, int stride>() {
    const WeightCells cells(s, kChannelVector<T>, vector, high, wide);
    LAUNCH((depthwise_weight_kernel<T, vector, high, wide, stride>),
           unsigned(cells.blocks * cells.t.lane_blocks * cells.windows), kThreads, 0, stream, partial, dy, dy_strides,
           x, x_strides, cells, reads_vectors<T, vector>(dy, dy_strides, 1),
           reads_vectors<T, vector>(x, x_strides, cells.t.multiplier));
    add_partials(dw, partial, s.out_channels * s.kernel_height * s.kernel_width, cells.blocks, stream);
  };
  constexpr int kVector = kChannelVector<T>;
  const int kernel = sizeof(T) == 8 ? 0 : square_kernel(rows_of(s), columns_of(s));
  const bool two = reduced_stride(rows_of(s)) == 2;
  if (is_channels_last(x_strides) && is_channels_last(dy_strides)) {
    if constexpr (sizeof(T) != 8) {
      if (kernel == 3)
        return two ? run.template operator()<kVector, 3, 3, 2>() : run.template operator()<kVector, 3, 3, 1>();
      if (kernel == 5 && !two) return run.template operator()<kVector, 1, 5, 1>();
      if (kernel == 7 && !two) return run.template operator()<kVector, 1, 7, 1>();
    }
    return two ? run.template operator()<kVector, 1, 8, 2>() : run.template operator()<kVector, 1, 8, 1>();
  }
  if constexpr (sizeof(T) != 8) {
    if (kernel == 3) return two ? run.template operator()<1, 3, 3, 2>() : run.template operator()<1, 3, 3, 1>();
    if (kernel == 5 && !two) return run.template operator()<1, 5, 5, 1>();
    if (kernel == 7 && !two) return run.template operator()<1, 7, 7, 1>();
  }
  return two ? run.template operator()<1, 1, 8, 2>() : run.template operator()<1, 1, 8, 1>();
}

}  // namespace
}  // namespace pynn::cuda
