// All stride phases of an input gradient at once: a unit packs its rows of grad_output once, and its sums are whole
// rows of the result, so that nothing is stored with gaps.
#pragma once
#include <atomic>
#include <memory>

#include "conv2d_engine.h"
#include "conv2d_winograd_2x2.h"

namespace pynn::cpu {

// Phases is a list of {row, column, window, weights, winograd_2x2}: the pixels (row, column) + multiples of the stride
// are the correlation `window`, with weights in two forms, the second optional.
template <class T, class Phases>
class PhasedCorrelation {
  using A = accumulate_t<T>;
  static constexpr int L = kLanes<A>, W = kTileWidth<A>;

 public:
  // height and width of the result, whose phases are `phases`.
  PhasedCorrelation(const T* x, const Strides4& s, int64_t batch, int64_t height, int64_t width, int64_t stride_height,
                    int64_t stride_width, const Phases& phases)
      : x_(x),
        s_(s),
        height_(height),
        width_(width),
        stride_height_(stride_height),
        stride_width_(stride_width),
        phases_(phases),
        window_(whole(batch)),
        units_(window_, window_.in_channels * sizeof(A)) {
    if (units_.per_image > 1 && units_.rows % 2) {  // tiles of two rows stay in one unit
      ++units_.rows;
      units_.per_image = ceil_div(window_.h.out, units_.rows);
      units_.count = ceil_div(batch, units_.images) * units_.per_image;
    }
    in_place_ = sizeof(T) == sizeof(A) && s.c == 1 && s.w == window_.in_channels;
    for (const auto& phase : phases_) {
      Window window = phase.window;
      window.batch = batch;
      correlations_.push_back(std::make_unique<Correlation<T>>(x, s, window, *phase.weights));
      correlations_.back()->read_with(packed());
    }
  }

  // finish(panel) is called for every unit and panel; where a fast algorithm met infinities or NaNs, once more.
  template <class Finish>
  void run(const Finish& finish) const {
    const std::unique_ptr<std::atomic<bool>[]> again(new std::atomic<bool>[size_t(window_.batch)]());
    run(finish, true, [&](int64_t image) { again[image].store(true, std::memory_order_relaxed); });
    for (int64_t n = 0; n < window_.batch; ++n) {
      if (!again[n].load(std::memory_order_relaxed)) continue;
      const PhasedCorrelation one(x_ + n * s_.n, s_, 1, height_, width_, stride_height_, stride_width_, phases_);
      one.run(
          [&](const Panel<A>& p) {
            Unit unit = p.unit;
            unit.image = n;
            finish(Panel<A>{unit, p.channel, p.channels, p.values, p.stride});
          },
          false, [](int64_t) {});
    }
  }

 private:
  // The largest phase; its rows are dealt to the units, with the pixels of all phases counted.
  Window whole(int64_t batch) const {
    Window window = phases_.front().window;
    window.batch = batch;
    window.h.out = ceil_div(height_, stride_height_);
    window.w.out = width_ * stride_height_;
    return window;
  }

  Unit unit_at(int64_t index) const {
    const int64_t image = index / units_.per_image * units_.images, row = index % units_.per_image * units_.rows;
    const int64_t rows = std::min(units_.rows, window_.h.out - row);
    int64_t first = window_.h.in, last = 0;  // of the input rows that any phase reads
    for (const auto& phase : phases_) {
      const Axis& h = phase.window.h;
      first = std::min(first, h.input(row, 0));
      last = std::max(last, h.input(row + rows - 1, std::max<int64_t>(h.kernel - 1, 0)) + 1);
    }
    first = std::clamp<int64_t>(first, 0, window_.h.in);
    return {image, std::min(units_.images, window_.batch - image),        row, rows,
            first, std::clamp<int64_t>(last, first, window_.h.in) - first};
  }

  // Strides of what a unit reads.
  Strides4 packed() const {
    if (in_place_) return s_;
    int64_t most = 0;
    for (int64_t i = 0; i < units_.per_image; ++i) most = std::max(most, unit_at(i).in_rows);
    const int64_t row = window_.w.in * window_.in_channels;
    return {most * row, 1, row, window_.in_channels};
  }

  template <class Finish, class Flag>
  void run(const Finish& finish, bool fast, const Flag& not_finite) const {
    const int64_t channels = window_.in_channels, work = units_.count * window_.groups;
    const int64_t slots = std::min<int64_t>(work, thread_count());
    const int64_t columns = ceil_div(width_, stride_width_);
    const int64_t tiles = Winograd2x2<A>::tiles(units_.images, units_.rows, columns);
    const int64_t pixels = units_.images * units_.rows * stride_height_ * width_;
    const int64_t input_size = in_place_ ? 0 : round_up(units_.images * packed().n + 4 * L, 16);
    const bool winograd =
        fast && std::any_of(phases_.begin(), phases_.end(), [](auto& p) { return bool(p.winograd_2x2); });
    const int64_t fast_size = winograd ? Winograd2x2<A>::scratch(tiles, channels) : 0;
    const int64_t slot_size = input_size + fast_size + pixels * round_up(window_.out_channels, L);
    const int64_t list_size = std::max(2 * (units_.images * units_.rows * columns + kDotRows), 2 * tiles);
    const Buffer<A> scratch(slots * slot_size);
    const Buffer<int64_t> lists(slots * list_size);
    parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t i = slot; i < work; i += slots) {
          A* input = scratch.get() + slot * slot_size;
          run_unit(unit_at(i / window_.groups), i % window_.groups, input, input + input_size,
                   input + input_size + fast_size, lists.get() + slot * list_size, finish, fast, not_finite);
        }
    });
  }

  template <class Finish, class Flag>
  void run_unit(const Unit& unit, int64_t group, A* input, A* scratch, A* sums, int64_t* lists, const Finish& finish,
                bool fast, const Flag& not_finite) const {
    const int64_t channels = window_.in_channels, columns = window_.w.in;
    const Strides4 s = packed();
    const A* base = input;
    if (in_place_) {
      if constexpr (sizeof(T) == sizeof(A)) base = x_ + unit.image * s_.n + group * channels + unit.in_row * s_.h;
    } else {
      const Part part{unit.in_row, unit.in_rows, columns, group * channels, channels, channels};
      for (int64_t n = 0; n < unit.images; ++n)
        pack_image<T, A>(x_ + (unit.image + n) * s_.n, s_, part, input + n * s.n);
    }
    const int64_t row = unit.row * stride_height_, rows = std::min(unit.rows * stride_height_, height_ - row);
    const int64_t pixels = unit.images * rows * width_;
    auto correlation = correlations_.begin();
    for (const auto& phase : phases_) {
      const Layout layout{rows * width_, stride_height_ * width_, stride_width_,
                          (phase.row - row) * width_ + phase.column};
      if (fast && phase.winograd_2x2)
        phase.winograd_2x2->run(base, s, unit, group, layout, pixels, scratch, lists, sums, not_finite);
      else
        (*correlation)->sum_unit(unit, base, group, layout, pixels, lists, sums);
      ++correlation;
    }
    const Unit result{unit.image, unit.images, row, rows};
    for (int64_t o = 0; o < window_.out_channels; o += W) {
      const int64_t here = std::min<int64_t>(W, window_.out_channels - o);
      finish(Panel<A>{result, group * window_.out_channels + o, here, sums + o * pixels, round_up(here, L)});
    }
  }

  const T* x_;
  Strides4 s_;
  int64_t height_, width_, stride_height_, stride_width_;
  const Phases& phases_;
  Window window_;
  Units units_;
  bool in_place_;
  std::vector<std::unique_ptr<Correlation<T>>> correlations_;
};

}  // namespace pynn::cpu
