// The general kernels of conv2d: any type, strides, groups, dilation and padding mode, one thread per result. What no
// faster kernel takes runs here.
#pragma once
#include "conv2d_epilogue.cuh"

namespace pynn::cuda {
namespace {

// ---------------------------------------------------------------- forward

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    direct_forward_kernel(Output<T> out, const T* x, Strides4 x_strides, const T* w, Strides4 w_strides, Conv2dShape s,
                          Elements elements, int64_t count) {
  const int64_t index = thread_index();
  if (index >= count) return;
  const Element e = elements[index];
  const int64_t channels = s.in_channels / s.groups, group = e.c / (s.out_channels / s.groups);
  const T* const image = x + e.n * x_strides.n + group * channels * x_strides.c;
  const T* const filter = w + e.c * w_strides.n;
  ChunkedSums<accumulate_t<T>> sum;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t a = 0; a < s.kernel_height; ++a) {
      const int64_t row =
          source_of(e.h * s.stride_height - s.pad_top + a * s.dilation_height, s.in_height, s.padding_mode);
      const T* const from = image + c * x_strides.c + row * x_strides.h;
      const T* const taps = filter + c * w_strides.c + a * w_strides.h;
      for (int64_t b = 0; b < s.kernel_width; ++b) {
        const int64_t column =
            source_of(e.w * s.stride_width - s.pad_left + b * s.dilation_width, s.in_width, s.padding_mode);
        const T value = row >= 0 && column >= 0 ? from[column * x_strides.w] : T{};
        sum.add(to_float(value), to_float(taps[b * w_strides.w]));
      }
      sum.end_row(int(s.kernel_width));
    }
  out.store(sum.value(), e);
}

template <class T>
void direct_forward(const Output<T>& out, const T* x, Strides4 x_strides, const T* w, Strides4 w_strides,
                    const Conv2dShape& s, void* stream) {
  const Elements elements{s.batch, s.out_channels, s.out_height, s.out_width, is_channels_last(out.strides)};
  LAUNCH(direct_forward_kernel<T>, blocks_of(elements.count()), kThreads, 0, stream, out, x, x_strides, w, w_strides, s,
         elements, elements.count());
}

// ---------------------------------------------------------------- input gradient

template <class T, class Out>
__global__ void __launch_bounds__(kThreads, 1)
    direct_input_gradient_kernel(Output<Out> out, const T* dy, Strides4 dy_strides, const T* w, Strides4 w_strides,
                                 Conv2dShape s, Reaches rows, Reaches columns, Elements elements, int64_t count) {
  const int64_t index = thread_index();
  if (index >= count) return;
  const Element e = elements[index];
  const int64_t channels = s.in_channels / s.groups, outputs = s.out_channels / s.groups, group = e.c / channels;
  const Reach v = rows.of(e.h), h = columns.of(e.w);
  const T* const filter =
      w + group * outputs * w_strides.n + e.c % channels * w_strides.c + v.tap * w_strides.h + h.tap * w_strides.w;
  const T* const image =
      dy + e.n * dy_strides.n + group * outputs * dy_strides.c + v.output * dy_strides.h + h.output * dy_strides.w;
  ChunkedSums<accumulate_t<T>> sum;
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t a = 0; a < v.count; ++a) {
      const T* const from = image + o * dy_strides.c - a * rows.out_step * dy_strides.h;
      const T* const taps = filter + o * w_strides.n + a * rows.tap_step * w_strides.h;
      for (int64_t b = 0; b < h.count; ++b)
        sum.add(to_float(from[-b * columns.out_step * dy_strides.w]),
                to_float(taps[b * columns.tap_step * w_strides.w]));
      sum.end_row(int(h.count));
    }
  out.store(sum.value(), e);
}

template <class T, class Out>
void direct_input_gradient(const Output<Out>& out, const T* dy, Strides4 dy_strides, const T* w, Strides4 w_strides,
                           const Conv2dShape& s, void* stream) {
  const Elements elements{s.batch, s.in_channels, s.in_height, s.in_width, is_channels_last(out.strides)};
  LAUNCH((direct_input_gradient_kernel<T, Out>), blocks_of(elements.count()), kThreads, 0, stream, out, dy, dy_strides,
         w, w_strides, s, Reaches(rows_of(s)), Reaches(columns_of(s)), elements, elements.count());
}

// ---------------------------------------------------------------- weight gradient

// How the output pixels of the batch are cut into spans, each summed by one thread per weight: by the shape alone.
struct Spans {
  int64_t weights, pixels, span, count;

  explicit Spans(const Conv2dShape& s)
      : weights(s.out_channels * (s.in_channels / s.groups) * s.kernel_height * s.kernel_width),
        pixels(s.batch * s.out_height * s.out_width) {
    constexpr int64_t kLeast = 64, kManyThreads = 132 * 2048;  // pixels of a span; threads that keep a large GPU busy
    const int64_t wanted = std::max<int64_t>(1, kManyThreads / std::max<int64_t>(weights, 1));
    span = std::max(kLeast, ceil_div(pixels, wanted));
    count = ceil_div(pixels, span);
  }
};

// Partial sums of dw (span, O, C / groups, KH, KW). Neighbouring threads share a pixel and read neighbouring inputs.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    direct_weight_gradient_kernel(accumulate_t<T>* partial, const T* dy, Strides4 dy_strides, const T* x,
                                  Strides4 x_strides, Conv2dShape s, Spans spans) {
  const int64_t index = thread_index();
  if (index >= spans.weights * spans.count) return;
  const Elements filters{s.out_channels, s.in_channels / s.groups, s.kernel_height, s.kernel_width, false};
  const Element f = filters[index % spans.weights];
  const int64_t begin = index / spans.weights * spans.span, end = min(begin + spans.span, spans.pixels);
  const int64_t channel = f.n / (s.out_channels / s.groups) * filters.channels + f.c;
  ChunkedSums<accumulate_t<T>> sum;
  int64_t i = begin / s.out_width % s.out_height, j = begin % s.out_width, n = begin / s.out_width / s.out_height;
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t row =
        source_of(i * s.stride_height - s.pad_top + f.h * s.dilation_height, s.in_height, s.padding_mode);
    const int64_t last = min(s.out_width, j + end - pixel);
    const T* const from = x + n * x_strides.n + channel * x_strides.c + row * x_strides.h;
    const T* const gradients = dy + n * dy_strides.n + f.n * dy_strides.c + i * dy_strides.h;
    for (pixel += last - j; j < last; ++j) {
      const int64_t column =
          source_of(j * s.stride_width - s.pad_left + f.w * s.dilation_width, s.in_width, s.padding_mode);
      const T value = row >= 0 && column >= 0 ? from[column * x_strides.w] : T{};
      sum.add(to_float(gradients[j * dy_strides.w]), to_float(value));
      sum.end_row(1);
    }
    j = 0;
    if (++i == s.out_height) i = 0, ++n;
  }
  partial[index] = sum.value();
}

template <class T>
int64_t direct_weight_gradient_scratch(const Conv2dShape& s) {
  const Spans spans(s);
  return spans.weights * spans.count * int64_t(sizeof(accumulate_t<T>));
}

template <class T>
void direct_weight_gradient(T* dw, const T* dy, Strides4 dy_strides, const T* x, Strides4 x_strides,
                            const Conv2dShape& s, void* scratch, void* stream) {
  const Spans spans(s);
  auto* const partial = static_cast<accumulate_t<T>*>(scratch);
  LAUNCH(direct_weight_gradient_kernel<T>, blocks_of(spans.weights * spans.count), kThreads, 0, stream, partial, dy,
         dy_strides, x, x_strides, s, spans);
  add_partials(dw, partial, spans.weights, spans.count, stream);
}

}  // namespace
}  // namespace pynn::cuda
