// Depthwise convolution (one input channel per group, any multiplier): forward, and the input gradient with multiplier
// 1. One kernel serves both layouts: a thread computes a tile of outputs of `vector` neighbouring channels, which is
// one access in a channels-last image, or of one channel, where neighbouring threads take neighbouring columns. It
// walks down the input rows of its tile and adds what each contributes to every output row, so an input element is read
// from L1 about once per thread that needs it and from memory once. Weights lie in shared memory, in fp32 (fp64).
//
// With dilation a tile takes every spacing-th output, so that its inputs, too, lie in a grid without gaps. Each row of
// filter taps is summed on its own, then added: the bits do not depend on the layout.
#pragma once
#include "conv2d_depthwise_tile.cuh"

namespace pynn::cuda {
namespace {

// Resident blocks of a multiprocessor to compile for: what fits without spilling.
template <int kernel>
constexpr int kResidentBlocks = kernel == 3 ? 2 : 1;

// kernel: the square filter's size, or 0 for any. high x wide: outputs of a thread.
template <class T, int vector, int kernel, int stride, int high, int wide>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<kernel>)
    depthwise_kernel(Output<T> out, const T* x, Strides4 x_strides, const T* w, Strides4 w_strides, DepthwiseTiling t,
                     bool read_vectors, bool store_vectors) {
  using A = accumulate_t<T>;
  constexpr int kTaps = kernel ? kernel : 4;  // columns of the filter at once
  constexpr int kColumns = (wide - 1) * stride + kTaps;
  constexpr bool kRowsFast = vector > 1 && high == 1;  // a block's tiles then share input rows in L1
  [[maybe_unused]] constexpr bool kUnrolled = kernel == 3 || (vector == 1 && kernel);
  DYNAMIC_SHARED(A, filters);
  const int height = kernel ? kernel : t.rows.kernel, width = kernel ? kernel : t.columns.kernel;
  const int lane_block = blockIdx.x % t.lane_blocks;
  const int64_t first_channel = int64_t(lane_block) * t.lanes * vector;
  copy_filters<T, vector>(filters, w, w_strides, first_channel, t.channels, t.lanes, height, width);

  const int64_t channel = first_channel + t.lane() * vector;
  if (channel >= t.channels) return;
  const Filters<A, vector> filter(filters, t.lane(), t.lanes, height, width);
  const int valid = int(min(int64_t(vector), t.channels - channel)), per_image = t.rows.tiles * t.columns.tiles;
#pragma unroll 1
  for (int64_t tile = t.first_tile(); tile < t.tiles; tile += t.tile_step()) {
    const int in_image = int(tile % per_image);
    const int64_t n = tile / per_image;
    const int i0 = t.rows.first_output(kRowsFast ? in_image % t.rows.tiles : in_image / t.columns.tiles, high);
    const int j0 = t.columns.first_output(kRowsFast ? in_image / t.rows.tiles : in_image % t.columns.tiles, wide);
    const int row0 = t.rows.first_input(i0), column0 = t.columns.first_input(j0);
    const ImageReader<T, vector> image(x, x_strides, n, channel, valid, t.multiplier, read_vectors && valid == vector);

    int columns[kColumns];
    if constexpr (kernel != 0) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        columns[c] = int(source_of(column0 + c * t.columns.step, t.columns.in, t.mode));
    }
    A sums[high * wide][vector] = {};
#pragma unroll(kUnrolled ? 32 : 1)
    for (int r = 0; r < (high - 1) * stride + height; ++r) {
      const int row = int(source_of(row0 + r * t.rows.step, t.rows.in, t.mode));
      const T* const from = image.image + row * x_strides.h;
      A parts[high * wide][vector] = {};
#pragma unroll(kernel ? 32 : 1)
      for (int b0 = 0; b0 < width; b0 += kTaps) {
        A values[kColumns][vector];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int column =
              kernel ? columns[c] : int(source_of(column0 + (b0 + c) * t.columns.step, t.columns.in, t.mode));
          image.load(values[c], from, row < 0 ? -1 : column);
        }
#pragma unroll
        for (int i = 0; i < high; ++i) {
          const int a = r - i * stride;
          if (a < 0 || a >= height) continue;
#pragma unroll
          for (int b = 0; b < kTaps; ++b) {
            if (!kernel && b0 + b >= width) break;
#pragma unroll
            for (int j = 0; j < wide; ++j) filter.add(parts[i * wide + j], values[j * stride + b], a, b0 + b);
          }
          if (b0 + kTaps < width) continue;
#pragma unroll
          for (int j = 0; j < wide; ++j)
#pragma unroll
            for (int k = 0; k < vector; ++k) sums[i * wide + j][k] += parts[i * wide + j][k];
        }
      }
    }
    store_all(sums, [&](A(&sum)[vector], int index) {
      const int i = i0 + index / wide * t.rows.spacing, j = j0 + index % wide * t.columns.spacing;
      if (i < t.rows.out && j < t.columns.out) out.store_channels(sum, {n, channel, i, j}, valid, store_vectors);
    });
    if (kernel == 3) break;
  }
}

// The input gradient for stride 2: a thread computes high x wide squares of 2 x 2 inputs. In coordinates of the padded
// image, input 2 u + p meets the taps p + 2 l of outputs u - l.
template <class T, int vector, int kernel, int high, int wide>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_strided_gradient_kernel(Output<T> out, const T* dy, Strides4 dy_strides, const T* w, Strides4 w_strides,
                                      DepthwiseTiling t, bool read_vectors, bool store_vectors) {
  using A = accumulate_t<T>;
  constexpr int kBack = (kernel - 1) / 2, kColumns = wide + kBack;
  DYNAMIC_SHARED(A, filters);
  const int lane_block = blockIdx.x % t.lane_blocks;
  const int64_t first_channel = int64_t(lane_block) * t.lanes * vector;
  copy_filters<T, vector>(filters, w, w_strides, first_channel, t.channels, t.lanes, kernel, kernel);

  const int64_t channel = first_channel + t.lane() * vector;
  if (channel >= t.channels) return;
  const Filters<A, vector> filter(filters, t.lane(), t.lanes, kernel, kernel);
  const int valid = int(min(int64_t(vector), t.channels - channel)), per_image = t.rows.tiles * t.columns.tiles;
#pragma unroll 1
  for (int64_t tile = t.first_tile(); tile < t.tiles; tile += t.tile_step()) {
    const int in_image = int(tile % per_image);
    const int64_t n = tile / per_image;
    const int u0 = t.rows.pad / 2 + in_image / t.columns.tiles * high;
    const int v0 = t.columns.pad / 2 + in_image % t.columns.tiles * wide;
    const ImageReader<T, vector> image(dy, dy_strides, n, channel, valid, 1, read_vectors && valid == vector);

    A sums[high * wide * 4][vector] = {};
#pragma unroll(kernel == 3 || vector == 1 ? 32 : 1)
    for (int r = 0; r < high + kBack; ++r) {
      const int row = u0 - kBack + r;
      const bool inside = row >= 0 && row < t.rows.out;
      const T* const from = image.image + row * dy_strides.h;
      A values[kColumns][vector];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = v0 - kBack + c;
        image.load(values[c], from, inside && column >= 0 && column < t.columns.out ? column : -1);
      }
#pragma unroll
      for (int i = 0; i < 2 * high; ++i) {
        const int a = i % 2 + 2 * (i / 2 + kBack - r);
        if (a < 0 || a >= kernel) continue;
#pragma unroll
        for (int j = 0; j < 2 * wide; ++j) {
          A part[vector] = {};
#pragma unroll
          for (int b = j % 2; b < kernel; b += 2) filter.add(part, values[j / 2 - b / 2 + kBack], a, b);
#pragma unroll
          for (int k = 0; k < vector; ++k) sums[i * 2 * wide + j][k] += part[k];
        }
      }
    }
    store_all(sums, [&](A(&sum)[vector], int index) {
      const int i = 2 * u0 + index / (2 * wide) - t.rows.pad, j = 2 * v0 + index % (2 * wide) - t.columns.pad;
      if (i >= 0 && j >= 0 && i < t.rows.in && j < t.columns.in)
        out.store_channels(sum, {n, channel, i, j}, valid, store_vectors);
    });
  }
}

// ---------------------------------------------------------------- launches

// Operands of a depthwise correlation.
template <class T>
struct DepthwiseCall {
  Output<T> out;
  const T* x;
  Strides4 x_strides;
  const T* w;
  Strides4 w_strides;
  Axis rows, columns;
  int64_t batch, channels, multiplier;
  PaddingMode mode;
  void* stream;

  bool channels_last() const { return is_channels_last(x_strides) && is_channels_last(out.strides); }

  template <int vector, int kernel, int stride, int high, int wide>
  void run() const {
    DepthwiseTiling t{{rows, high}, {columns, wide}, batch, channels, 0, 0, 0, int(multiplier), false, mode};
    const int64_t bytes = filter_size<vector>(rows.kernel, columns.kernel) * int64_t(sizeof(accumulate_t<T>));
    share_block(t, vector, bytes);
    LAUNCH((depthwise_kernel<T, vector, kernel, stride, high, wide>), t.blocks(kernel == 3), kThreads,
           size_t(t.lanes * bytes), stream, out, x, x_strides, w, w_strides, t,
           reads_vectors<T, vector>(x, x_strides, t.multiplier), out.template has_vectors<vector>());
  }
  template <int vector, int kernel, int high, int wide>
  void run_strided_gradient() const {
    DepthwiseTiling t{{rows, 1}, {columns, 1}, batch, channels, 0, 0, 0, 1, false, mode};
    const auto squares = [](const DepthwiseAxis& a) { return (a.pad + a.in - 1) / 2 - a.pad / 2 + 1; };
    t.rows.tiles = int(ceil_div(squares(t.rows), high)), t.columns.tiles = int(ceil_div(squares(t.columns), wide));
    const int64_t bytes = filter_size<vector>(kernel, kernel) * int64_t(sizeof(accumulate_t<T>));
    share_block(t, vector, bytes);
    LAUNCH((depthwise_strided_gradient_kernel<T, vector, kernel, high, wide>), t.blocks(false), kThreads,
           size_t(t.lanes * bytes), stream, out, x, x_strides, w, w_strides, t,
           reads_vectors<T, vector>(x, x_strides, 1), out.template has_vectors<vector>());
  }
};

// Whether depthwise() takes a forward pass of one input channel per group.
template <class T>
bool is_depthwise(const Conv2dShape& s) {
  const Axis rows = rows_of(s), columns = columns_of(s);
  const int64_t stride = reduced_stride(rows);
  return s.groups > 1 && s.groups == s.in_channels && is_small(rows, columns) && stride <= 2 &&
         reduced_stride(columns) == stride && fits_filter<T>(rows, columns);
}

template <class T>
void depthwise(const DepthwiseCall<T>& call) {
  constexpr int kVector = kChannelVector<T>;
  const int kernel = sizeof(T) == 8 ? 0 : square_kernel(call.rows, call.columns);
  const bool two = reduced_stride(call.rows) == 2;
  if (call.channels_last()) {
    if constexpr (sizeof(T) != 8) {
      if (kernel == 3) return two ? call.template run<kVector, 3, 2, 1, 4>() : call.template run<kVector, 3, 1, 3, 2>();
      if (kernel == 5) return two ? call.template run<kVector, 5, 2, 1, 4>() : call.template run<kVector, 5, 1, 1, 8>();
      if (kernel == 7 && !two) return call.template run<kVector, 7, 1, 1, 8>();
    }
    return two ? call.template run<kVector, 0, 2, 1, 4>() : call.template run<kVector, 0, 1, 1, 8>();
  }
  if constexpr (sizeof(T) != 8) {
    if (kernel == 3) return two ? call.template run<1, 3, 2, 4, 1>() : call.template run<1, 3, 1, 8, 1>();
    if (kernel == 5) return two ? call.template run<1, 5, 2, 4, 1>() : call.template run<1, 5, 1, 8, 1>();
    if (kernel == 7 && !two) return call.template run<1, 7, 1, 8, 1>();
  }
  return two ? call.template run<1, 0, 2, 2, 4>() : call.template run<1, 0, 1, 4, 4>();
}

template <class T>
bool is_depthwise_gradient(const Conv2dShape& s) {
  const Axis rows = rows_of(s), columns = columns_of(s);
  if (s.groups == 1 || s.groups != s.in_channels || s.groups != s.out_channels || !is_small(rows, columns) ||
      !fits_filter<T>(rows, columns))
    return false;
  if (rows.stride == 1 && columns.stride == 1) return true;
  return sizeof(T) != 8 && rows.stride == 2 && columns.stride == 2 && rows.dilation == 1 && columns.dilation == 1 &&
         (square_kernel(rows, columns) == 3 || square_kernel(rows, columns) == 5);
}

template <class T>
void depthwise_gradient(const Output<T>& out, const T* dy, const Strides4& dy_strides, const T* w,
                        const Strides4& w_strides, const Conv2dShape& s, void* stream) {
  const Axis rows = rows_of(s), columns = columns_of(s);
  const auto call = [&](const Axis& rows, const Axis& columns, const T* w, const Strides4& w_strides) {
    return DepthwiseCall<T>{out,     dy,      dy_strides,    w, w_strides,          rows,
                            columns, s.batch, s.in_channels, 1, PaddingMode::zeros, stream};
  };
  if (s.stride_height == 1) {
    const T* const last = w + (rows.kernel - 1) * w_strides.h + (columns.kernel - 1) * w_strides.w;
    depthwise(call(gradient_axis(rows), gradient_axis(columns), last,
                   {w_strides.n, w_strides.c, -w_strides.h, -w_strides.w}));
    return;
  }
  if constexpr (sizeof(T) != 8) {
    constexpr int kVector = kChannelVector<T>;
    const auto strided = call(rows, columns, w, w_strides);
    const auto run = [&](auto kernel) {
      strided.channels_last() ? strided.template run_strided_gradient<kVector, kernel, 1, 2>()
                              : strided.template run_strided_gradient<1, kernel, 4, 1>();
    };
    const int kernel = square_kernel(rows, columns);
    if (kernel == 3) run(std::integral_constant<int, 3>());
    if (kernel == 5) run(std::integral_constant<int, 5>());
  }
}

}  // namespace
}  // namespace pynn::cuda
