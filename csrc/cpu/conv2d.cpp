// conv2d forward, input gradient and activation gradient for the CPU. Forward is one correlation (conv2d_engine.h)
// whose finished blocks of sums get bias, residual and activation before they are rounded once and stored, in either
// layout; the input gradient is several (conv2d_input_gradient.h).
#include "conv2d_depthwise.h"
#include "conv2d_engine.h"
#include "conv2d_epilogue.h"
#include "conv2d_input_gradient.h"
#include "conv2d_narrow.h"
#include "conv2d_pointwise.h"
#include "conv2d_winograd.h"

namespace pynn::cpu {

template <class T>
int64_t Conv2d<T>::fwd_scratch(const Conv2dShape&) {
  return 0;
}

template <class T>
void Conv2d<T>::fwd(const T* x, Strides4 x_strides, const T* w, Strides4 w_strides, T* y, Strides4 y_strides,
                    const Conv2dEpilogue<T>& e, const Conv2dShape& d, void*, void*) {
  const Window window = window_of(d);
  const WeightView view{window.out_channels * w_strides.n, w_strides.n, w_strides.c, w_strides.h, w_strides.w};
  const Bias<T> bias(e, d.out_channels);
  const Epilogue<T> epilogue{bias.get(), e.residual, e.residual_strides, y,
                             y_strides,  e.pre,      e.activation,       d.out_width};
  if (window.depthwise()) return correlate_depthwise(x, x_strides, window, w, view, epilogue);
  if (is_pointwise(window)) return PointwiseCorrelation<T>(x, x_strides, w, view, window).run(epilogue);
  if (is_narrow(window)) return NarrowCorrelation<T>(x, x_strides, w, view, window).run(epilogue);
  if constexpr (std::is_same_v<T, float>) {
    if (is_winograd<T>(window)) {
      const WinogradWeights<T> weights(w, view, window);
      if (weights.finite()) return correlate_winograd(x, x_strides, window, weights, epilogue);
    }
  }
  const PackedWeights<accumulate_t<T>> weights(w, view, window);
  Correlation<T>(x, x_strides, window, weights).run(epilogue);
}

template <class T>
int64_t Conv2d<T>::bwd_input_scratch(const Conv2dShape& d) {
  return InputGradient<T>::scratch_bytes(d);
}

template <class T>
void Conv2d<T>::bwd_input(const T* dy, Strides4 dy_strides, const T* w, Strides4 w_strides, T* dx, Strides4 dx_strides,
                          const Conv2dEpilogue<T>& e, const Conv2dShape& d, void* scratch, void*) {
  InputGradient<T>(w, w_strides, d).run(dy, dy_strides, dx, dx_strides, e, static_cast<accumulate_t<T>*>(scratch));
}

template <class T>
void Conv2d<T>::bwd_activation(const T* dy, Strides4 g, const T* saved, Strides4 s, T* dz, Strides4 z,
                               Activation activation, int64_t batch, int64_t channels, int64_t height, int64_t width,
                               void*) {
  using A = accumulate_t<T>;
  constexpr int64_t kLine = 256;
  const auto rows_touch = [&](const Strides4& t) { return t.h == width * t.w; };
  const auto same = [&](const Strides4& t) { return t.n == z.n && t.c == z.c && t.h == z.h && t.w == z.w; };
  if (same(g) && same(s)) {  // dz has no gaps: one line
    const int64_t count = batch * channels * height * width;
    return parallel_for(count, 16384, [&](int64_t begin, int64_t end) {
      multiply_derivative_line(activation, dy + begin, saved + begin, dz + begin, end - begin);
    });
  }
  if (rows_touch(g) && rows_touch(s) && rows_touch(z)) width *= height, height = 1;
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
      if (step(g) == 1 && step(s) == 1 && step(z) == 1) {
        multiply_derivative_line(activation, dy + at(g), saved + at(s), dz + at(z), length);
        continue;
      }
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
