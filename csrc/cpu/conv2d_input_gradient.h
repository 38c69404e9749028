// The input gradient of conv2d, which is conv_transpose2d: one correlation of grad_output for each stride phase. The
// input pixels (i, j) with the same (i mod stride, j mod stride) meet the same filter taps, so no product with an
// inserted zero is ever computed.
#pragma once
#include <cstring>
#include <list>
#include <memory>
#include <numeric>
#include <optional>

#include "conv2d_depthwise.h"
#include "conv2d_engine.h"
#include "conv2d_epilogue.h"
#include "conv2d_narrow.h"
#include "conv2d_padding.h"
#include "conv2d_phased.h"
#include "conv2d_pointwise.h"
#include "conv2d_winograd.h"

namespace pynn::cpu {

// One axis of one stride phase: the positions first, first + stride, ... of the input, and the taps last_tap,
// last_tap - tap_step, ... (`taps` of them) that reach them, in order of rising output position.
struct Phase {
  int64_t first, count, taps, last_tap, tap_step, step, pad;
};

inline std::vector<Phase> phases(int64_t in_size, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad) {
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

template <class T>
class InputGradient {
  using A = accumulate_t<T>;
  static constexpr int64_t kChunkBytes = 8 << 20;  // of a bordered gradient
  static constexpr int64_t kClearBytes = 1 << 20;

 public:
  InputGradient(const T* w, const Strides4& s, const Conv2dShape& d)
      : window_(window_of(d)), stride_height_(d.stride_height), stride_width_(d.stride_width) {
    const int64_t in = window_.in_channels, out = window_.out_channels;
    const auto columns = phases(window_.w.in, d.kernel_width, d.stride_width, d.dilation_width, window_.w.pad);
    for (const Phase& v : phases(window_.h.in, d.kernel_height, d.stride_height, d.dilation_height, window_.h.pad))
      for (const Phase& h : columns) {
        const bool reached = v.taps && h.taps;
        const Window window{d.batch,
                            d.groups,
                            out,
                            in,
                            {d.out_height, v.count, reached ? v.taps : 0, 1, v.step, v.pad},
                            {d.out_width, h.count, reached ? h.taps : 0, 1, h.step, h.pad}};
        const WeightView view{out * s.n, s.c, s.n, -v.tap_step * s.h, -h.tap_step * s.w};
        pieces_.emplace_back(v.first, h.first, window, w + v.last_tap * s.h + h.last_tap * s.w, view,
                             window_.depthwise());
      }
  }

  void run(const T* dy, const Strides4& dy_strides, T* dx, const Strides4& dx_strides, const Conv2dEpilogue<T>& e,
           A* scratch) const {
    const Bias<T> bias(e, window_.groups * window_.in_channels);
    const Epilogue<T> epilogue{bias.get(), e.residual, e.residual_strides, dx, dx_strides, e.pre, e.activation, 0};
    if (window_.bordered()) return run_bordered(dy, dy_strides, epilogue, scratch);
    if (leaves_zeros(epilogue)) return run_cleared(dy, dy_strides, epilogue);
    correlate(dy, dy_strides, window_.batch, epilogue);
  }

  static int64_t scratch_bytes(const Conv2dShape& d) {
    const Window window = window_of(d);
    return window.bordered() ? chunk_of(window) * image_size(window) * int64_t(sizeof(A)) : 0;
  }

 private:
  struct Piece {
    int64_t row, column;  // the first input pixel of the phase
    Window window;
    const T* w;
    WeightView view;
    // Depthwise, pointwise and narrow correlations pack their own.
    std::optional<WinogradWeights<A>> winograd_3x3;
    std::optional<PackedWeights<A>> weights;
    std::optional<Winograd2x2<A>> winograd_2x2;  // beside weights

    Piece(int64_t row, int64_t column, const Window& window, const T* w, const WeightView& view, bool depthwise)
        : row(row), column(column), window(window), w(w), view(view) {
      if (depthwise || is_pointwise(window) || is_narrow(window)) return;
      if constexpr (std::is_same_v<T, A>) {
        if (is_winograd<T>(window)) winograd_3x3.emplace(w, view, window);
        if (winograd_3x3 && winograd_3x3->finite()) return;
        winograd_3x3.reset();
      }
      weights.emplace(w, view, window);
      if (weights->form() == Form::panels && Winograd2x2<A>::template fits<T>(window))
        winograd_2x2.emplace(*weights, window);
    }
  };

  static int64_t pixel_size(const Window& window) { return round_up(window.groups * window.in_channels, kLanes<A>); }
  static int64_t image_size(const Window& window) { return window.h.in * window.w.in * pixel_size(window); }
  static int64_t chunk_of(const Window& window) {
    const int64_t bytes = image_size(window) * int64_t(sizeof(A));
    return std::clamp<int64_t>(kChunkBytes / std::max<int64_t>(bytes, 1), 1, std::max<int64_t>(window.batch, 1));
  }

  // Whether a unit of all phases is worth it and fits: it has as many rows as the stride at least.
  bool phased() const {
    bool plain = true, fast = pieces_.size() > 1;
    for (const Piece& piece : pieces_) {
      plain = plain && piece.weights && !piece.window.patches();
      fast = fast || piece.winograd_2x2;
    }
    return plain && fast &&
           stride_height_ * window_.w.in * round_up(window_.in_channels, kLanes<A>) <= kChunkBytes / int64_t(sizeof(A));
  }

  // E is what the result is stored as; what no tap reaches may have been cleared.
  template <class E>
  void correlate(const T* dy, const Strides4& dy_strides, int64_t images, const Epilogue<E>& whole,
                 bool cleared = false) const {
    if (phased()) {
      Epilogue<E> epilogue = whole;
      epilogue.width = window_.w.in;
      return PhasedCorrelation<T, std::list<Piece>>(dy, dy_strides, images, window_.h.in, window_.w.in, stride_height_,
                                                    stride_width_, pieces_)
          .run(epilogue);
    }
    if (run_narrow(dy, dy_strides, images, whole, cleared)) return;
    for (const Piece& piece : pieces_) {
      if (cleared && piece.window.taps() == 0) continue;
      const Epilogue<E> epilogue = epilogue_of(piece, whole);
      Window window = piece.window;
      window.batch = images;
      if (window_.depthwise())
        correlate_depthwise(dy, dy_strides, window, piece.w, piece.view, epilogue);
      else if (is_pointwise(window))
        PointwiseCorrelation<T>(dy, dy_strides, piece.w, piece.view, window).run(epilogue);
      else if (piece.winograd_3x3)
        correlate_winograd(dy, dy_strides, window, *piece.winograd_3x3, epilogue);
      else if (piece.weights)
        Correlation<T>(dy, dy_strides, window, *piece.weights).run(epilogue);
      else
        NarrowCorrelation<T>(dy, dy_strides, piece.w, piece.view, window).run(epilogue);
    }
  }

  // The pixels of one phase among those of the whole gradient.
  template <class E>
  Epilogue<E> epilogue_of(const Piece& piece, const Epilogue<E>& whole) const {
    const auto every = [&](const Strides4& s) { return Strides4{s.n, s.c, s.h * stride_height_, s.w * stride_width_}; };
    const auto first = [&](auto* t, const Strides4& s) {
      return t ? t + piece.row * s.h + piece.column * s.w : nullptr;
    };
    return {whole.bias,     first(whole.residual, whole.r), every(whole.r),   first(whole.y, whole.s),
            every(whole.s), first(whole.pre, whole.s),      whole.activation, piece.window.w.out};
  }

  // Gradients of few channels: all phases of a band, for which grad_output is packed once. False where that does not
  // pay.
  template <class E>
  bool run_narrow(const T* dy, const Strides4& dy_strides, int64_t images, const Epilogue<E>& whole,
                  bool cleared) const {
    std::vector<Window> windows;
    for (const Piece& piece : pieces_) {
      if (piece.window.taps() == 0 && cleared) continue;
      if (piece.window.taps() == 0) return false;
      windows.push_back(piece.window);
      windows.back().batch = images;
    }
    const std::optional<Window> common = NarrowCorrelation<T>::common(windows);
    if (window_.depthwise() || !common) return false;
    std::vector<std::unique_ptr<NarrowCorrelation<T>>> owners;
    std::vector<const NarrowCorrelation<T>*> phases;
    std::vector<Epilogue<E>> epilogues;
    auto window = windows.begin();
    for (const Piece& piece : pieces_) {
      if (piece.window.taps() == 0) continue;
      const PlaneWindow read{*common, common->h.pad - window->h.pad, common->w.pad - window->w.pad};
      owners.push_back(std::make_unique<NarrowCorrelation<T>>(dy, dy_strides, piece.w, piece.view, *window++, read));
      phases.push_back(owners.back().get());
      epilogues.push_back(epilogue_of(piece, whole));
    }
    NarrowCorrelation<T>::run(phases.data(), int64_t(phases.size()), epilogues.data());
    return true;
  }

  // Whether no filter tap reaches some of a gradient without gaps, and nothing is to be added there.
  bool leaves_zeros(const Epilogue<T>& e) const {
    const auto unreached = [](const Piece& piece) { return piece.window.taps() == 0; };
    const int64_t channels = window_.groups * window_.in_channels, pixels = window_.h.in * window_.w.in;
    const bool last = e.s.c == 1 && e.s.w == channels && e.s.h == window_.w.in * channels;
    const bool dense = last || (e.s.w == 1 && e.s.h == window_.w.in && e.s.c == pixels);
    return !e.bias && e.plain() && dense && e.s.n == channels * pixels && !phased() &&
           std::any_of(pieces_.begin(), pieces_.end(), unreached);
  }

  // A few images at a time are cleared and get the phases that are reached while they are in the cache.
  void run_cleared(const T* dy, const Strides4& dy_strides, Epilogue<T> epilogue) const {
    const int64_t size = epilogue.s.n;
    const int64_t chunk = std::max<int64_t>(1, kClearBytes / std::max<int64_t>(1, size * int64_t(sizeof(T))));
    for (int64_t n = 0; n < window_.batch; n += chunk, epilogue.y += chunk * size) {
      const int64_t images = std::min(chunk, window_.batch - n);
      parallel_for(images * size, 1 << 16, [&](int64_t begin, int64_t end) {
        std::memset(static_cast<void*>(epilogue.y + begin), 0, size_t(end - begin) * sizeof(T));
      });
      correlate(dy + n * dy_strides.n, dy_strides, images, epilogue, true);
    }
  }

  // A chunk of images at a time: the gradient of the virtual image, in the compute type, folded and then stored.
  void run_bordered(const T* dy, const Strides4& dy_strides, Epilogue<T> epilogue, A* scratch) const {
    constexpr int64_t kChannels = kTileWidth<A>;
    const Axis &h = window_.h, &w = window_.w;
    const int64_t pixel = pixel_size(window_), image = image_size(window_), pitch = w.in * pixel;
    const int64_t channels = window_.groups * window_.in_channels, blocks = ceil_div(channels, kChannels);
    epilogue.width = w.border.size;
    for (int64_t n = 0; n < window_.batch; n += chunk_of(window_)) {
      const int64_t images = std::min(chunk_of(window_), window_.batch - n);
      correlate(dy + n * dy_strides.n, dy_strides, images,
                Epilogue<A>{nullptr, nullptr, {}, scratch, {image, 1, pitch, pixel}, nullptr, Activation::none, 0});
      parallel_for(images * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t channel = i % blocks * kChannels, count = std::min(kChannels, channels - channel);
          A* values = scratch + i / blocks * image + channel;
          fold_border(h, w, values, pixel, round_up(count, kLanes<A>));
          values += h.border.before * pitch + w.border.before * pixel;
          for (int64_t row = 0; row < h.border.size; ++row, values += pitch)
            epilogue(Panel<A>{Unit(n + i / blocks, 1, row, 1), channel, count, values, pixel});
        }
      });
    }
  }

  Window window_;  // of the forward pass
  int64_t stride_height_, stride_width_;
  std::list<Piece> pieces_;
};

}  // namespace pynn::cpu
