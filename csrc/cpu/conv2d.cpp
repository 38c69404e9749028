// conv2d forward, input gradient and activation gradient for the CPU. Forward is one correlation (conv2d_engine.h)
// whose finished blocks of sums get bias, residual and activation before they are rounded once and stored, in either
// layout. The input gradient is one correlation of grad_output for each stride phase: the input pixels (i, j) with the
// same (i mod stride, j mod stride) meet the same filter taps, so no product with an inserted zero is ever computed.
#include <numeric>

#include "conv2d_engine.h"
#include "conv2d_epilogue.h"
#include "conv2d_narrow.h"

namespace pynn::cpu {
namespace {

// One axis of one stride phase of the input gradient: the positions first, first + stride, ... of the input, and the
// taps last_tap, last_tap - tap_step, ... (`taps` of them) that reach them, in order of rising output position.
struct Phase {
  int64_t first, count, taps, last_tap, tap_step, step, pad;
};

std::vector<Phase> phases(int64_t in_size, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad) {
  const int64_t shared = std::gcd(stride, dilation), tap_step = stride / shared;
  std::vector<Phase> all;
  for (int64_t first = 0; first < std::min(stride, in_size); ++first) {
    Phase phase{first, ceil_div(in_size - first, stride), 0, 0, tap_step, dilation / shared, 0};
    for (int64_t tap = 0; tap < std::min(kernel, tap_step); ++tap)
      if ((first + pad - tap * dilation) % stride == 0) {
        phase.taps = ceil_div(kernel - tap, tap_step);
        phase.last_tap = tap + (phase.taps - 1) * tap_step;
        phase.pad = (phase.last_tap * dilation - first - pad) / stride;
      }
    all.push_back(phase);
  }
  return all;
}

}  // namespace

template <class T>
int64_t Conv2d<T>::fwd_scratch(const Conv2dShape&) {
  return 0;
}

template <class T>
void Conv2d<T>::fwd(const T* x, Strides4 x_strides, const T* w, Strides4 w_strides, T* y, Strides4 y_strides,
                    const Conv2dEpilogue<T>& e, const Conv2dShape& d, void*, void*) {
  const int64_t in = d.in_channels / d.groups, out = d.out_channels / d.groups;
  const Window window{d.batch,
                      d.groups,
                      in,
                      out,
                      {d.in_height, d.out_height, d.kernel_height, d.stride_height, d.dilation_height, d.pad_top},
                      {d.in_width, d.out_width, d.kernel_width, d.stride_width, d.dilation_width, d.pad_left}};
  const WeightView view{out * w_strides.n, w_strides.n, w_strides.c, w_strides.h, w_strides.w};
  const Bias<T> bias(e, d.out_channels);
  const Epilogue<T> epilogue{bias.get(), e.residual, e.residual_strides, y,
                             y_strides,  e.pre,      e.activation,       d.out_width};
  if (is_narrow(window)) return NarrowCorrelation<T>(x, x_strides, w, view, window).run(epilogue);
  const PackedWeights<accumulate_t<T>> weights(w, view, window);
  Correlation<T>(x, x_strides, window, weights).run(epilogue);
}

template <class T>
int64_t Conv2d<T>::bwd_input_scratch(const Conv2dShape&) {
  return 0;
}

template <class T>
void Conv2d<T>::bwd_input(const T* dy, Strides4 dy_strides, const T* w, Strides4 w_strides, T* dx, Strides4 dx_strides,
                          const Conv2dEpilogue<T>& e, const Conv2dShape& d, void*, void*) {
  const int64_t in = d.in_channels / d.groups, out = d.out_channels / d.groups;
  const Bias<T> bias(e, d.in_channels);
  const auto every = [&](const Strides4& s) {  // pixels of one phase
    return Strides4{s.n, s.c, s.h * d.stride_height, s.w * d.stride_width};
  };
  const auto columns = phases(d.in_width, d.kernel_width, d.stride_width, d.dilation_width, d.pad_left);
  for (const Phase& v : phases(d.in_height, d.kernel_height, d.stride_height, d.dilation_height, d.pad_top))
    for (const Phase& h : columns) {
      const bool reached = v.taps && h.taps;
      const Window window{d.batch,
                          d.groups,
                          out,
                          in,
                          {d.out_height, v.count, reached ? v.taps : 0, 1, v.step, v.pad},
                          {d.out_width, h.count, reached ? h.taps : 0, 1, h.step, h.pad}};
      const WeightView view{out * w_strides.n, w_strides.c, w_strides.n, -v.tap_step * w_strides.h,
                            -h.tap_step * w_strides.w};
      const T* from = w + v.last_tap * w_strides.h + h.last_tap * w_strides.w;
      const auto first = [&](auto* t, const Strides4& s) { return t ? t + v.first * s.h + h.first * s.w : nullptr; };
      const Epilogue<T> epilogue{bias.get(),
                                 first(e.residual, e.residual_strides),
                                 every(e.residual_strides),
                                 first(dx, dx_strides),
                                 every(dx_strides),
                                 first(e.pre, dx_strides),
                                 e.activation,
                                 h.count};
      if (is_narrow(window)) {
        NarrowCorrelation<T>(dy, dy_strides, from, view, window).run(epilogue);
        continue;
      }
      const PackedWeights<accumulate_t<T>> weights(from, view, window);
      Correlation<T>(dy, dy_strides, window, weights).run(epilogue);
    }
}

template <class T>
void Conv2d<T>::bwd_activation(const T* dy, Strides4 g, const T* saved, Strides4 s, T* dz, Strides4 z,
                               Activation activation, int64_t batch, int64_t channels, int64_t height, int64_t width,
                               void*) {
  using A = accumulate_t<T>;
  constexpr int64_t kLine = 256;
  // Lines run along channels where dz does; rows, or pixels, are the work items.
  const bool last = z.c == 1;
  const int64_t lines = batch * height * (last ? width : channels), length = last ? channels : width;
  parallel_for(lines, 1 + 16384 / std::max<int64_t>(length, 1), [&](int64_t begin, int64_t end) {
    A gradient[kLine], value[kLine];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t inner = last ? width : height, a = i % inner, rest = i / inner, outer = last ? height : channels;
      const int64_t b = rest % outer, n = rest / outer;
      const auto at = [&](const Strides4& t) { return n * t.n + (last ? b * t.h + a * t.w : b * t.c + a * t.h); };
      const auto step = [&](const Strides4& t) { return last ? t.c : t.w; };
      for (int64_t first = 0; first < length; first += kLine) {
        const int64_t count = std::min(kLine, length - first), padded = round_up(count, kLanes<A>);
        std::fill(gradient, gradient + padded, A(0));
        std::fill(value, value + padded, A(0));
        add_row(gradient, dy + at(g) + first * step(g), step(g), count);
        add_row(value, saved + at(s) + first * step(s), step(s), count);
        multiply_derivative(activation, gradient, value, count);
        store_row(dz + at(z) + first * step(z), step(z), gradient, count);
      }
    }
  });
}

#define INSTANTIATE(T)                                                                                               \
  template int64_t Conv2d<T>::fwd_scratch(const Conv2dShape&);                                                       \
  template void Conv2d<T>::fwd(const T*, Strides4, const T*, Strides4, T*, Strides4, const Conv2dEpilogue<T>&,       \
                               const Conv2dShape&, void*, void*);                                                    \
  template int64_t Conv2d<T>::bwd_input_scratch(const Conv2dShape&);                                                 \
  template void Conv2d<T>::bwd_input(const T*, Strides4, const T*, Strides4, T*, Strides4, const Conv2dEpilogue<T>&, \
                                     const Conv2dShape&, void*, void*);                                              \
  template void Conv2d<T>::bwd_activation(const T*, Strides4, const T*, Strides4, T*, Strides4, Activation, int64_t, \
                                          int64_t, int64_t, int64_t, void*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)

}  // namespace pynn::cpu
