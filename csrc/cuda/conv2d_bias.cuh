// The bias gradient of conv2d: the sum of grad_output over the pixels of the batch, in fp64, in two passes.
//
// A block adds a span of pixels of 32 channels. Pixels fall into 32 classes, pixel mod 32; a thread adds four pairs of
// a channel and a class, neighbours along whatever lies side by side in memory, and classes are added as a tree. So the
// bits do not depend on the layout.
#pragma once
#include "conv2d_geometry.cuh"

namespace pynn::cuda {
namespace {

constexpr int kClasses = 32, kBiasChannels = 32, kPairs = kClasses * kBiasChannels / kThreads;

struct BiasSpans {
  int64_t channels, channel_blocks, pixels, span, count;
  bool channels_last;

  BiasSpans(const Conv2dShape& s, const Strides4& dy)
      : channels(s.out_channels),
        channel_blocks(ceil_div(s.out_channels, kBiasChannels)),
        pixels(s.batch * s.out_height * s.out_width),
        channels_last(is_channels_last(dy)) {
    constexpr int64_t kManyBlocks = 132 * 4;
    span = std::max<int64_t>(ceil_div(pixels, ceil_div(kManyBlocks, channel_blocks)), 8 * kClasses);
    span = ceil_div(span, kClasses) * kClasses;
    count = ceil_div(pixels, span);
  }
};

// A pixel of the batch, and the one kClasses behind it, without divisions.
struct PixelWalk {
  int64_t n, h, w;
  int64_t step_n, step_h, step_w;

  __device__ PixelWalk(int64_t pixel, const Conv2dShape& s)
      : n(pixel / s.out_width / s.out_height),
        h(pixel / s.out_width % s.out_height),
        w(pixel % s.out_width),
        step_n(kClasses / s.out_width / s.out_height),
        step_h(kClasses / s.out_width % s.out_height),
        step_w(kClasses % s.out_width) {}
  __device__ void advance(const Conv2dShape& s) {
    w += step_w, h += step_h, n += step_n;
    if (w >= s.out_width) w -= s.out_width, ++h;
    if (h >= s.out_height) h -= s.out_height, ++n;
  }
};

// sums[0] = the sum of all classes, as a tree. Waits for the block before and after.
__device__ __forceinline__ void add_classes(double (*sums)[kBiasChannels + 1]) {
  for (int distance = kClasses / 2; distance > 0; distance /= 2) {
    __syncthreads();
    for (int pair = int(threadIdx.x); pair < distance * kBiasChannels; pair += kThreads)
      sums[pair / 32][pair % 32] += sums[pair / 32 + distance][pair % 32];
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_gradient_kernel(double* partial, const T* dy, Strides4 strides, Conv2dShape s, BiasSpans spans) {
  SHARED_ARRAY(double[kBiasChannels + 1], sums, kClasses);
  const int64_t block = blockIdx.x / spans.channel_blocks;
  const int64_t first_channel = blockIdx.x % spans.channel_blocks * kBiasChannels;
  const int64_t begin = block * spans.span, end = min(begin + spans.span, spans.pixels);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int pair = p * kThreads + int(threadIdx.x), inner = pair % 32, outer = pair / 32;
    const int kind = spans.channels_last ? outer : inner, channel = spans.channels_last ? inner : outer;
    double sum = 0;
    if (first_channel + channel < spans.channels) {
      PixelWalk at(begin + kind, s);
      const T* const from = dy + (first_channel + channel) * strides.c;
      for (int64_t pixel = begin + kind; pixel < end; pixel += kClasses, at.advance(s))
        sum += to_float(from[at.n * strides.n + at.h * strides.h + at.w * strides.w]);
    }
    sums[kind][channel] = sum;
  }
  add_classes(sums);
  const int64_t channel = first_channel + threadIdx.x;
  if (int(threadIdx.x) < kBiasChannels && channel < spans.channels)
    partial[block * spans.channels + channel] = sums[0][threadIdx.x];
}

inline int64_t bias_gradient_scratch(const Conv2dShape& s) {
  return s.out_channels * BiasSpans(s, {}).count * int64_t(sizeof(double));
}

template <class T>
void bias_gradient(T* dbias, const T* dy, const Strides4& strides, const Conv2dShape& s, void* scratch, void* stream) {
  const BiasSpans spans(s, strides);
  auto* const partial = static_cast<double*>(scratch);
  LAUNCH(bias_gradient_kernel<T>, unsigned(spans.channel_blocks * spans.count), kThreads, 0, stream, partial, dy,
         strides, s, spans);
  add_partials(dbias, partial, spans.channels, spans.count, stream);
}

}  // namespace
}  // namespace pynn::cuda
