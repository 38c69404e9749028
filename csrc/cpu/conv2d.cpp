// conv2d forward, input gradient and activation gradient for the CPU. Forward is one correlation (conv2d_engine.h)
// whose finished blocks of sums get bias, residual and activation before they are rounded once and stored, in either
// layout. The input gradient is one correlation of grad_output for each stride phase: the input pixels (i, j) with the
// same (i mod stride, j mod stride) meet the same filter taps, so no product with an inserted zero is ever computed.
#include <numeric>

#include "conv2d_activation.h"
#include "conv2d_engine.h"

namespace pynn::cpu {
namespace {

// Adds `count` elements of a strided row to values.
template <class T, class A>
void add_row(A* values, const T* row, int64_t stride, int64_t count) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) values[i] += to_float(row[i]);
  } else if (stride == 0) {
    const A value = to_float(*row);
    for (int64_t i = 0; i < count; ++i) values[i] += value;
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] += to_float(row[i * stride]);
  }
}

template <class T, class A>
void store_row(T* row, int64_t stride, const A* values, int64_t count) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) row[i] = from_float<T>(values[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) row[i * stride] = from_float<T>(values[i]);
  }
}

// What happens to a finished block of sums.
template <class T>
struct Epilogue {
  using A = accumulate_t<T>;
  const A* bias;
  const T* residual;
  Strides4 r;
  T* y;
  Strides4 s;
  T* pre;
  Activation activation;
  int64_t width;  // pixels per row

  // One line of `count` values that lie `stride` apart in y and `r_stride` apart in the residual; its biases are
  // bias_step (0 or 1) apart.
  void line(A* values, int64_t count, const A* biases, int64_t bias_step, int64_t at, int64_t stride, int64_t r_at,
            int64_t r_stride) const {
    constexpr int L = kLanes<A>;
    const bool last_step = !pre && activation == Activation::none;
    int64_t i = 0;
    for (; i + L <= count && (!residual || r_stride == 1 || r_stride == 0); i += L) {
      Vec<A> v = load(values + i);
      if (biases) v += bias_step ? load(biases + i) : broadcast(*biases);
      if (residual) v += r_stride ? load_converted(residual + r_at + i) : broadcast(A(to_float(residual[r_at])));
      if constexpr (sizeof(T) == sizeof(A)) {
        if (last_step && stride == 1) {
          store(y + at + i, v);
          continue;
        }
      }
      store(values + i, v);
    }
    for (int64_t j = i; j < count; ++j) {
      if (biases) values[j] += biases[j * bias_step];
      if (residual) values[j] += to_float(residual[r_at + j * r_stride]);
    }
    if (pre) store_row(pre + at, stride, values, count);
    if (activation != Activation::none) activate(activation, values, count);
    const int64_t stored = sizeof(T) == sizeof(A) && last_step && stride == 1 ? i : 0;
    store_row(y + at + stored * stride, stride, values + stored, count - stored);
  }

  void operator()(const Panel<A>& p) const { s.c == 1 && p.channels > 1 ? channels_last(p) : channels_first(p); }

  void channels_last(const Panel<A>& p) const {
    A* values = p.values;
    const Unit& u = p.unit;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (!residual && !pre && activation == Activation::none && p.channels == p.stride) {
        return bias ? store_panel(p, [&](Vec<A> v, int64_t c) { return v + load(bias + p.channel + c); })
                    : store_panel(p, [](Vec<A> v, int64_t) { return v; });
      }
    }
    for (int64_t n = u.image; n < u.image + u.images; ++n)
      for (int64_t i = u.row; i < u.row + u.rows; ++i) {
        const int64_t at = n * s.n + p.channel + i * s.h, r_at = n * r.n + p.channel * r.c + i * r.h;
        for (int64_t j = 0; j < width; ++j, values += p.stride) {
          line(values, p.channels, bias ? bias + p.channel : nullptr, 1, at + j * s.w, 1, r_at + j * r.w, r.c);
        }
      }
  }

  // The usual case: whole vectors of channels, at most a bias to add.
  template <class Map>
  void store_panel(const Panel<A>& p, const Map& map) const {
    const A* values = p.values;
    const Unit& u = p.unit;
    for (int64_t n = u.image; n < u.image + u.images; ++n)
      for (int64_t i = u.row; i < u.row + u.rows; ++i) {
        A* to = reinterpret_cast<A*>(y) + n * s.n + p.channel + i * s.h;
        for (int64_t j = 0; j < width; ++j, to += s.w, values += p.stride)
          for (int64_t c = 0; c < p.stride; c += kLanes<A>) store(to + c, map(load(values + c), c));
      }
  }

  // Lines of pixels: across rows where they touch in y and in the residual, single rows elsewhere.
  void channels_first(const Panel<A>& p) const {
    constexpr int64_t kLine = 128;
    A turned[4 * kLanes<A> * kLine];
    const Unit& u = p.unit;
    const bool rows_touch = s.h == width * s.w && (!residual || r.h == width * r.w);
    const int64_t run = rows_touch ? u.rows * width : width, runs = rows_touch ? 1 : u.rows;
    for (int64_t n = 0; n < u.images; ++n)
      for (int64_t i = 0; i < runs; ++i)
        for (int64_t first = 0; first < run; first += kLine) {
          const int64_t count = std::min(kLine, run - first), image = u.image + n, row = u.row + i;
          transpose_out(p.values + ((n * u.rows + i) * width + first) * p.stride, p.stride, count, p.channels, turned,
                        kLine);
          const int64_t at = image * s.n + row * s.h + first * s.w, r_at = image * r.n + row * r.h + first * r.w;
          for (int64_t c = 0; c < p.channels; ++c) {
            line(turned + c * kLine, count, bias ? bias + p.channel + c : nullptr, 0, at + (p.channel + c) * s.c, s.w,
                 r_at + (p.channel + c) * r.c, r.w);
          }
        }
  }
};

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
void conv2d_fwd(const T* x, Strides4 x_strides, const T* w, Strides4 w_strides, const T* bias, int64_t bias_stride,
                const T* residual, Strides4 residual_strides, T* y, Strides4 y_strides, T* pre, Activation activation,
                const Conv2dShape& d, void*) {
  using A = accumulate_t<T>;
  const int64_t in = d.in_channels / d.groups, out = d.out_channels / d.groups;
  const Window window{d.batch,
                      d.groups,
                      in,
                      out,
                      {d.in_height, d.out_height, d.kernel_height, d.stride_height, d.dilation_height, d.pad_top},
                      {d.in_width, d.out_width, d.kernel_width, d.stride_width, d.dilation_width, d.pad_left}};
  const WeightView view{out * w_strides.n, w_strides.n, w_strides.c, w_strides.h, w_strides.w};
  const PackedWeights<A> weights(w, view, window);
  const Buffer<A> bias_values(bias ? d.out_channels : 0);
  for (int64_t o = 0; bias && o < d.out_channels; ++o) bias_values.get()[o] = to_float(bias[o * bias_stride]);
  const Epilogue<T> epilogue{
      bias ? bias_values.get() : nullptr, residual, residual_strides, y, y_strides, pre, activation, d.out_width};
  Correlation<T>(x, x_strides, window, weights).run(epilogue);
}

template <class T>
void conv2d_bwd_input(const T* dy, Strides4 dy_strides, const T* w, Strides4 w_strides, T* dx, Strides4 dx_strides,
                      const Conv2dShape& d, void*) {
  using A = accumulate_t<T>;
  const int64_t in = d.in_channels / d.groups, out = d.out_channels / d.groups;
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
      const PackedWeights<A> weights(w + v.last_tap * w_strides.h + h.last_tap * w_strides.w, view, window);
      const Strides4 phase_strides{dx_strides.n, dx_strides.c, dx_strides.h * d.stride_height,
                                   dx_strides.w * d.stride_width};
      const Epilogue<T> epilogue{
          nullptr, nullptr,          {},     dx + v.first * dx_strides.h + h.first * dx_strides.w, phase_strides,
          nullptr, Activation::none, h.count};
      Correlation<T>(dy, dy_strides, window, weights).run(epilogue);
    }
}

template <class T>
void conv2d_bwd_activation(const T* dy, Strides4 g, const T* saved, Strides4 s, T* dz, Strides4 z,
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

#define INSTANTIATE(T)                                                                                             \
  template void conv2d_fwd(const T*, Strides4, const T*, Strides4, const T*, int64_t, const T*, Strides4, T*,      \
                           Strides4, T*, Activation, const Conv2dShape&, void*);                                   \
  template void conv2d_bwd_input(const T*, Strides4, const T*, Strides4, T*, Strides4, const Conv2dShape&, void*); \
  template void conv2d_bwd_activation(const T*, Strides4, const T*, Strides4, T*, Strides4, Activation, int64_t,   \
                                      int64_t, int64_t, int64_t, void*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)

}  // namespace pynn::cpu
