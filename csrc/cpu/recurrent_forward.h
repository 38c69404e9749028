// The forward pass of recurrent layers.
//
// The rows of the batch are cut into pieces; a piece goes through all its steps without a word to the others. It takes
// as many steps at once as give kForwardRows rows: the pre-activations' share of the input comes from one product for
// all of them, then every step adds the share of the state and finishes the units of a panel while its sums are in the
// first-level cache. Where there are too few rows to share out, the threads take panels of each product.
//
// With Op = MultiplyAddPairs (bfloat16; sizes of input and state are even) the products take pairs of elements, as they
// lie in memory, in the place of floats: weights, and the rows of the input and of the state.
#pragma once
#include "recurrent_cells.h"
#include "recurrent_rows.h"
#include "recurrent_schedule.h"

namespace pynn::cpu::recurrent {

inline constexpr int64_t kForwardRows = 192;  // rows of a chunk
inline constexpr int64_t kPieceRows = 8;      // rows of a piece that are worth a thread

template <Cell kCell, class T, class Op>
class ForwardPass {
  using A = accumulate_t<T>;
  using P = Panels<kCell, A>;
  static constexpr int64_t L = kLanes<A>;
  static constexpr bool kPairs = !std::is_same_v<Op, MultiplyAdd>;
  using Weight = std::conditional_t<kPairs, A, T>;  // an element of a product's right operand

 public:
  ForwardPass(const RecurrentForward<T>& call, const RecurrentShape& shape, void* scratch)
      : call_(call),
        shape_(shape),
        panels_(P::count(shape.hidden)),
        state_panels_(shape.projected ? ceil_div(shape.state, kPanelWidth<A>) : 0),
        input_depth_(kPairs ? shape.input / 2 : shape.input),
        state_depth_(kPairs ? shape.state / 2 : shape.state),
        state_stride_(padded<A>(state_depth_)),
        rows_(std::min(shape.batch, kForwardRows)),
        capacity_(std::min(std::max<int64_t>(shape.rows(), 1), kForwardRows)) {
    const int64_t threads = thread_count(), batch = shape.batch;
    pieces_ = std::max(ceil_div(batch, kForwardRows), std::min(threads, batch / kPieceRows));
    slots_ = std::clamp<int64_t>(threads, 1, std::max<int64_t>(pieces_, 1));
    Arena arena{static_cast<char*>(scratch)};
    schedule_ = {shape.steps,
                 batch,
                 shape.reverse,
                 arena.take<int64_t>(batch),
                 arena.take<int64_t>(batch),
                 arena.take<int64_t>(shape.steps + 1)};
    // Weights that several products take are packed for all of them; the others as they are used.
    ready_ih_ = pieces_ > 1 || shape.rows() > capacity_;
    ready_hh_ = pieces_ > 1 || shape.steps > 2 || (shape.steps == 2 && batch > 2);
    bias_ = arena.take<A>(panels_ * P::kWidth);
    packed_ih_ = arena.take<A>(ready_ih_ ? panels_ * packed_depth<A>(input_depth_) * P::kProduct : 0);
    packed_hh_ = arena.take<A>(ready_hh_ ? panels_ * packed_depth<A>(state_depth_) * P::kProduct : 0);
    packed_hr_ = arena.take<A>(state_panels_ * packed_depth<A>(shape.hidden) * kPanelWidth<A>);
    slot_ = arena.used;
    take(arena);
    slot_bytes_ = arena.used - slot_;
    scratch_ = arena.base;
  }
  int64_t bytes() const { return slot_ + slots_ * slot_bytes_; }

  void run() {
    schedule_.fill(call_.lengths);
    clear_dead_rows();
    pack();
    if (pieces_ <= 1) return piece(0, shape_.batch, 0, true);
    parallel_for(slots_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t p = slot; p < pieces_; p += slots_)
          piece(shape_.batch * p / pieces_, shape_.batch * (p + 1) / pieces_, slot, false);
    });
  }

 private:
  struct Buffers {
    A *x, *pre, *h[2], *c, *hidden, *projected;
  };
  Buffers take(Arena& arena) const {
    Buffers b;
    b.x = arena.take<A>(call_.products ? 0 : capacity_ * padded<A>(input_depth_));
    b.pre = arena.take<A>(panels_ * capacity_ * P::kWidth);
    for (A*& h : b.h) h = arena.take<A>(rows_ * state_stride_);
    b.c = arena.take<A>(kCell == Cell::lstm ? rows_ * panels_ * L : 0);
    b.hidden = arena.take<A>(shape_.projected ? rows_ * padded<A>(shape_.hidden) : 0);
    b.projected = arena.take<A>(state_panels_ * rows_ * kPanelWidth<A>);
    return b;
  }

  void clear_dead_rows() {
    for (int64_t j = 0; j < shape_.batch; ++j)
      for (int64_t t = schedule_.lengths[j]; t < shape_.steps; ++t)
        memset(static_cast<void*>(call_.output + (t * shape_.batch + schedule_.order[j]) * shape_.state), 0,
               size_t(shape_.state) * sizeof(T));
  }

  void pack() {
    each_panels(true, panels_, (shape_.input + shape_.state) * P::kProduct * 4, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        set_bias(p);
        if (ready_ih_ && !call_.products) pack_panel(call_.weights.ih, input_depth_, p, false, packed_ih_);
        if (ready_hh_) pack_panel(call_.weights.hh, state_depth_, p, true, packed_hh_);
      }
    });
    for (int64_t p = 0; p < state_panels_; ++p)
      pack_rows<4>(call_.weights.hr, shape_.hidden, plain_rows<A>(p, shape_.state),
                   packed_hr_ + p * packed_depth<A>(shape_.hidden) * kPanelWidth<A>);
  }
  void pack_panel(const T* weight, int64_t depth, int64_t panel, bool of_hidden, A* packed) const {
    pack_rows<P::kVectors>(reinterpret_cast<const Weight*>(weight), depth, P::rows(panel, shape_.hidden, of_hidden),
                           packed + panel * packed_depth<A>(depth) * P::kProduct);
  }
  // A row of a product's left operand, filled with 0 up to whole vectors.
  static void set_row(const T* from, int64_t count, A* to) {
    if constexpr (kPairs) {
      memcpy(to, from, size_t(count) * sizeof(T));
      std::fill(to + count / 2, to + round_up(count / 2, L), A(0));
    } else {
      convert(from, count, to);
    }
  }
  void set_bias(int64_t panel) {
    A* const to = bias_ + panel * P::kWidth;
    for (int64_t v = 0; v < kPanelVectors; ++v) store(to + v * L, Vec<A>{});
    const auto add = [&](const T* bias, bool of_hidden, int v, int64_t column) {
      const PanelRows rows = P::rows(panel, shape_.hidden, of_hidden);
      if (bias && rows.count[v] > 0)
        store(to + column * L, load(to + column * L) + load_some(bias + rows.first[v], rows.count[v]));
    };
    for (int v = 0; v < P::kVectors; ++v) {
      add(call_.weights.bias_ih, false, v, v);
      add(call_.weights.bias_hh, true, v, v + P::kHiddenOffset / L);
    }
  }

  // c[r] += weight a[r] for one panel.
  void product(const T* weight, bool of_hidden, const A* packed, bool ready, int64_t panel, const A* a, int64_t rows,
               A* c) const {
    constexpr int kVectors = P::kVectors;
    const int64_t depth = of_hidden ? state_depth_ : input_depth_, a_stride = padded<A>(depth);
    const PanelRows columns = P::rows(panel, shape_.hidden, of_hidden);
    const Weight* const w = reinterpret_cast<const Weight*>(weight);
    if (ready)
      multiply_packed<kVectors, Op>(a, a_stride, depth, packed + panel * packed_depth<A>(depth) * P::kProduct, rows, c,
                                    P::kWidth);
    else if (rows == 1)
      multiply_in_place<kVectors, 1, Op>(a, a_stride, depth, w, columns, c, P::kWidth);
    else if (rows == 2)
      multiply_in_place<kVectors, 2, Op>(a, a_stride, depth, w, columns, c, P::kWidth);
    else
      multiply_and_pack<kVectors, Op>(a, a_stride, depth, w, columns, rows, c, P::kWidth);
  }

  // All steps of the rows at places first to last.
  void piece(int64_t first, int64_t last, int64_t slot, bool threads) {
    Arena arena{scratch_ + slot_ + slot * slot_bytes_};
    Buffers b = take(arena);
    for (A* h : b.h)
      if (kPairs) std::fill_n(h, (last - first) * state_stride_, A(0));  // rows are filled in parts
    for (int64_t j = first; j < last; ++j) {
      const int64_t row = schedule_.order[j];
      set_row(call_.h0 + row * shape_.state, shape_.state, b.h[0] + (j - first) * state_stride_);
      if constexpr (kCell == Cell::lstm)
        convert(call_.c0 + row * shape_.hidden, shape_.hidden, b.c + (j - first) * panels_ * L);
    }
    const int64_t steps = last > first ? schedule_.lengths[first] : 0;
    for (int64_t begin = 0, end = 0; begin < steps; begin = end) {
      int64_t rows = 0;
      for (; end < steps && (end == begin || rows + schedule_.count(end, first, last) <= capacity_); ++end)
        rows += schedule_.count(end, first, last);
      project(b, begin, end, first, last, rows, threads);
      for (int64_t s = begin, offset = 0; s < end; ++s) {
        const int64_t alive = schedule_.count(s, first, last);
        step(b, s, first, alive, offset, threads);
        std::swap(b.h[0], b.h[1]);
        offset += alive;
      }
    }
    for (int64_t j = first; j < last; ++j) {
      const int64_t row = schedule_.order[j], length = schedule_.lengths[j], size = shape_.state;
      const T* from = length ? call_.output + schedule_.row(length - 1, j) * size : call_.h0 + row * size;
      memcpy(static_cast<void*>(call_.h_n + row * size), from, size_t(size) * sizeof(T));
      if constexpr (kCell == Cell::lstm)
        memcpy(call_.c_n + row * shape_.hidden, b.c + (j - first) * panels_ * L, size_t(shape_.hidden) * sizeof(A));
    }
  }

  // The biases and the input's share of the pre-activations, for the steps of a chunk.
  void project(const Buffers& b, int64_t begin, int64_t end, int64_t first, int64_t last, int64_t rows, bool threads) {
    const auto each_row = [&](const auto& body) {
      int64_t r = 0;
      for (int64_t s = begin; s < end; ++s)
        for (int64_t j = 0; j < schedule_.count(s, first, last); ++j) body(r++, schedule_.row(s, first + j));
    };
    const int64_t stride = padded<A>(input_depth_), width = gates_of(kCell) * shape_.hidden;
    if (!call_.products)
      each_row(
          [&](int64_t r, int64_t row) { set_row(call_.input + row * shape_.input, shape_.input, b.x + r * stride); });
    each_panels(threads, panels_, rows * shape_.input * P::kProduct, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) {
        A* const pre = b.pre + p * capacity_ * P::kWidth;
        for (int64_t r = 0; r < rows; ++r)
          for (int v = 0; v < kPanelVectors; ++v)
            store(pre + r * P::kWidth + v * L, load(bias_ + p * P::kWidth + v * L));
        if (call_.products) {
          const PanelRows columns = P::rows(p, shape_.hidden, false);
          each_row([&](int64_t r, int64_t row) {
            for (int v = 0; v < P::kVectors && columns.count[v] > 0; ++v) {
              A* const sum = pre + r * P::kWidth + v * L;
              store(sum, load(sum) + load_some(call_.products + row * width + columns.first[v], columns.count[v]));
            }
          });
        } else {
          product(call_.weights.ih, false, packed_ih_, ready_ih_, p, b.x, rows, pre);
        }
      }
    });
  }

  // h[1] from h[0], for the first `alive` rows.
  void step(const Buffers& b, int64_t s, int64_t first, int64_t alive, int64_t offset, bool threads) {
    each_panels(threads, panels_, alive * shape_.state * P::kProduct, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) {
        A* const pre = b.pre + (p * capacity_ + offset) * P::kWidth;
        product(call_.weights.hh, true, packed_hh_, ready_hh_, p, b.h[0], alive, pre + P::kHiddenOffset);
        for (int64_t j = 0; j < alive; ++j) finish(b, p, j, schedule_.row(s, first + j), pre + j * P::kWidth);
      }
    });
    if (!shape_.projected) return;
    each_panels(threads, state_panels_, alive * shape_.hidden * kPanelWidth<A>, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) {
        A* const sums = b.projected + p * rows_ * kPanelWidth<A>;
        std::fill(sums, sums + alive * kPanelWidth<A>, A(0));
        multiply_packed<4>(b.hidden, padded<A>(shape_.hidden), shape_.hidden,
                           packed_hr_ + p * packed_depth<A>(shape_.hidden) * kPanelWidth<A>, alive, sums,
                           kPanelWidth<A>);
        for (int64_t j = 0; j < alive; ++j)
          for (int64_t v = 0, unit = p * kPanelWidth<A>; v < kPanelVectors && unit < shape_.state; ++v, unit += L)
            put_state(b, j, schedule_.row(s, first + j), unit, load(sums + j * kPanelWidth<A> + v * L));
      }
    });
  }

  Vec<A> state_of(const Buffers& b, int64_t j, int64_t unit) const {
    const A* const from = b.h[0] + j * state_stride_;
    if constexpr (kPairs)
      return load_some(reinterpret_cast<const T*>(from) + unit, shape_.state - unit);
    else
      return load(from + unit);
  }
  void put_state(const Buffers& b, int64_t j, int64_t row, int64_t unit, Vec<A> h) const {
    A* const to = b.h[1] + j * state_stride_;
    T* const output = call_.output + row * shape_.state + unit;
    const int64_t count = shape_.state - unit;
    if constexpr (kPairs) {
      T* const state = reinterpret_cast<T*>(to) + unit;
      store_some(state, count, h);
      memcpy(static_cast<void*>(output), state, size_t(std::min(count, L)) * sizeof(T));
    } else {
      h = rounded<T>(h);
      store_or_zero(to + unit, count, h);
      store_some(output, count, h);
    }
  }

  void finish(const Buffers& b, int64_t panel, int64_t j, int64_t row, const A* pre) const {
    const int64_t hidden = shape_.hidden, unit = panel * P::kUnits;
    const Units<T> units{hidden, hidden - unit,
                         call_.gates ? call_.gates + row * saved_of(kCell) * hidden + unit : nullptr,
                         call_.cells ? call_.cells + row * hidden + unit : nullptr};
    if constexpr (kCell == Cell::lstm) {
      const Vec<A> h = lstm_forward<T>(pre, b.c + j * panels_ * L + unit, units);
      if (shape_.projected)
        store_or_zero(b.hidden + j * padded<A>(hidden) + unit, hidden - unit, h);
      else
        put_state(b, j, row, unit, h);
    } else if constexpr (kCell == Cell::gru) {
      put_state(b, j, row, unit, gru_forward<T>(pre, state_of(b, j, unit), units));
    } else {
      for (int64_t v = 0; v < kPanelVectors && unit + v * L < hidden; ++v)
        put_state(b, j, row, unit + v * L, rnn_forward<T>(load(pre + v * L), shape_.cell == Cell::rnn_relu));
    }
  }

  const RecurrentForward<T>& call_;
  const RecurrentShape& shape_;
  const int64_t panels_, state_panels_;
  const int64_t input_depth_, state_depth_, state_stride_;  // elements that a product takes, floats or pairs
  const int64_t rows_, capacity_;
  int64_t pieces_, slots_, slot_, slot_bytes_;
  Schedule schedule_;
  A *bias_, *packed_ih_, *packed_hh_, *packed_hr_;
  char* scratch_;
  bool ready_ih_, ready_hh_;
};

}  // namespace pynn::cpu::recurrent
