// The prologue of a convolution as a pass of its own on a GPU, and its gradient.
//
// The pass is elementwise: 16 bytes to a thread. Gradient: a block owns 32 channels and kSpan pixels of a sample,
// writes their dx and adds the gradients of scale and shift as the bias gradient is added (conv2d_bias.cuh): in classes
// of pixels, in an order that the layout has no part in. add_partials adds the spans of a sample.
#pragma once
#include "conv2d_bias.cuh"
#include "conv2d_prologue_value.cuh"
#include "pack.cuh"

namespace pynn::cuda {
namespace {

// Division of indices of elements, which are below 2^53, without the call that a 64-bit division is.
struct Divisor {
  int64_t value;
  double inverse;

  explicit Divisor(int64_t value) : value(value), inverse(1.0 / double(value)) {}
  __device__ __forceinline__ int64_t divide(int64_t index, int64_t& rest) const {
    int64_t quotient = int64_t(double(index) * inverse);  // or one more or less
    rest = index - quotient * value;
    if (rest < 0) --quotient, rest += value;
    if (rest >= value) ++quotient, rest -= value;
    return quotient;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 6)
    prologue_kernel(T* y, const T* x, Conv2dPrologue<T> prologue, ImagesShape s, Divisor channels, Divisor pixels,
                    int64_t count, bool aligned) {
  constexpr int kPack = 16 / int(sizeof(T));
  const int64_t first = thread_index() * kPack;
  if (first >= count) return;
  const int valid = int(min(count - first, int64_t(kPack)));
  // Channel and sample of the element, and how many that follow have the same.
  int64_t c, n, p, left = 1, pixels_left = 0;
  if (s.channels_last) {
    n = pixels.divide(channels.divide(first, c), p);
    pixels_left = s.pixels - p;
  } else {
    n = channels.divide(pixels.divide(first, p), c);
    left = s.pixels - p;
  }
  PackOf<T, kPack> pack;
  load_pack(pack, x + first, valid, aligned);
  ChannelPrologue<T> channel(prologue, n, c);
  with_any_activation(prologue.activation, [&]<Activation kind>() {
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      pack.element[k] = channel.template of<kind>(pack.element[k]);
      if (--left > 0 || k + 1 >= valid) continue;
      left = s.channels_last ? 1 : s.pixels;
      if (++c == s.channels) {
        c = 0;
        if (!s.channels_last || --pixels_left == 0) ++n, pixels_left = s.pixels;
      }
      channel = ChannelPrologue<T>(prologue, n, c);
    }
  });
  store_pack(y + first, pack, valid, aligned);
}

// The derivative at the activation's input, without cancellation where it is small.
template <class T, Activation kind>
__device__ __forceinline__ accumulate_t<T> derivative_at(accumulate_t<T> u) {
  using A = accumulate_t<T>;
  if constexpr (kind == Activation::sigmoid || kind == Activation::tanh) {
    constexpr A kFactor = kind == Activation::tanh ? 2 : 1;
    const A q = logistic<T>(kFactor * (u < 0 ? u : -u));
    return kFactor * kFactor * q * (1 - q);
  }
  return derivative<T, kind>(u);
}

constexpr int64_t kSpan = 1024;

// partial (spans, 2, batch, channels), or null. blockIdx.x: sample, span, 32 channels.
template <class T>
__global__ void __launch_bounds__(kThreads)
    prologue_gradient_kernel(double* partial, T* dx, const T* dy, const T* x, Conv2dPrologue<T> prologue, ImagesShape s,
                             unsigned spans, unsigned channel_blocks) {
  using A = accumulate_t<T>;
  using Sum = std::conditional_t<sizeof(T) == 2, float, double>;
  SHARED_ARRAY(double[kBiasChannels + 1], products, kClasses);
  SHARED_ARRAY(double[kBiasChannels + 1], totals, kClasses);
  const unsigned block = blockIdx.x / channel_blocks, n = block / spans, span = block - n * spans;
  const int64_t first_channel = int64_t(blockIdx.x - block * channel_blocks) * kBiasChannels;
  const int64_t begin = span * kSpan, end = min(begin + kSpan, s.pixels);
  const int64_t step = s.channels_last ? s.channels : 1, channel_step = s.channels_last ? 1 : s.pixels;
  const int64_t image = n * s.channels * s.pixels;

  ChannelPrologue<T> channel[kPairs];
  Sum product[kPairs] = {}, total[kPairs] = {};
  int64_t at[kPairs];
  int in_class[kPairs], of_channel[kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int pair = p * kThreads + int(threadIdx.x), inner = pair % 32, outer = pair / 32;
    in_class[p] = s.channels_last ? outer : inner, of_channel[p] = s.channels_last ? inner : outer;
    const int64_t c = first_channel + of_channel[p];
    at[p] = c < s.channels ? image + c * channel_step + (begin + in_class[p]) * step : -1;
    if (at[p] >= 0) channel[p] = ChannelPrologue<T>(prologue, n, c);
  }
  with_any_activation(prologue.activation, [&]<Activation kind>() {
    for (int64_t pixel = begin; pixel < end; pixel += kClasses) {
      A gradient[kPairs], value[kPairs];
#pragma unroll
      for (int p = 0; p < kPairs; ++p)
        if (at[p] >= 0 && pixel + in_class[p] < end) gradient[p] = to_float(dy[at[p]]), value[p] = to_float(x[at[p]]);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        if (at[p] < 0 || pixel + in_class[p] >= end) continue;
        const A g = gradient[p] * derivative_at<T, kind>(channel[p].before(value[p]));
        dx[at[p]] = from_float<T>(g * channel[p].scale);
        product[p] += Sum(g) * Sum(value[p]), total[p] += g;
        at[p] += kClasses * step;
      }
    }
  });
  if (!partial) return;
#pragma unroll
  for (int p = 0; p < kPairs; ++p)
    products[in_class[p]][of_channel[p]] = product[p], totals[in_class[p]][of_channel[p]] = total[p];
  add_classes(products);
  add_classes(totals);
  const int64_t c = first_channel + threadIdx.x;
  if (int(threadIdx.x) >= kBiasChannels || c >= s.channels) return;
  double* const to = partial + (int64_t(span) * 2 * s.batch + n) * s.channels + c;
  to[0] = products[0][threadIdx.x], to[s.batch * s.channels] = totals[0][threadIdx.x];
}

}  // namespace

template <class T>
void Conv2dProloguePass<T>::fwd(const T* x, const Conv2dPrologue<T>& prologue, T* y, const ImagesShape& s,
                                void* stream) {
  const int64_t packs = ceil_div(s.count(), int64_t(16 / sizeof(T)));
  LAUNCH(prologue_kernel<T>, blocks_of(packs), kThreads, 0, stream, y, x, prologue, s, Divisor(s.channels),
         Divisor(s.pixels), s.count(), is_aligned({x, y}));
}

template <class T>
int64_t Conv2dProloguePass<T>::bwd_scratch(const ImagesShape& s) {
  return ceil_div(s.pixels, kSpan) * 2 * s.batch * s.channels * int64_t(sizeof(double));
}

template <class T>
void Conv2dProloguePass<T>::bwd(const T* dy, const T* x, const Conv2dPrologue<T>& prologue, T* dx, A* sums,
                                const ImagesShape& s, void* scratch, void* stream) {
  const int64_t spans = ceil_div(s.pixels, kSpan), channel_blocks = ceil_div(s.channels, kBiasChannels);
  auto* const partial = static_cast<double*>(sums ? scratch : nullptr);
  LAUNCH(prologue_gradient_kernel<T>, unsigned(s.batch * spans * channel_blocks), kThreads, 0, stream, partial, dx, dy,
         x, prologue, s, unsigned(spans), unsigned(channel_blocks));
  if (sums) add_partials(sums, partial, 2 * s.batch * s.channels, spans, stream);
}

template struct Conv2dProloguePass<double>;
template struct Conv2dProloguePass<float>;
template struct Conv2dProloguePass<Half>;
template struct Conv2dProloguePass<BFloat16>;

}  // namespace pynn::cuda
