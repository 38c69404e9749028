// The backward pass of recurrent layers.
//
// Rows of the batch go in pieces of at most kBackwardRows, and a piece backwards through its steps in chunks of as many
// rows. A chunk first runs the recurrence: the gradient of a state is the product of the next step's gradients of the
// pre-activations with weight_hh, and ends, while it is in the cache, in the gradients of this step's pre-activations.
// Those stay in fp32 (or fp64) and lie as panels, rows of kPanelWidth: as they are, they are the left operand of the
// products with the weights and the right operand of the weight gradients. Then the chunk adds its part to the weight
// gradients, one chain of kBackwardRows fused multiply-adds at most, and makes the gradient of its input.
#pragma once
#include "recurrent_cells.h"
#include "recurrent_schedule.h"
#include "recurrent_weight_gradient.h"

namespace pynn::cpu::recurrent {

inline constexpr int64_t kBackwardRows = kChain;
inline constexpr int64_t kThreadRows = 8;  // rows of the recurrence that are worth a thread

template <Cell kCell, class T>
class BackwardPass {
  using A = accumulate_t<T>;
  using P = Panels<kCell, A>;
  static constexpr int64_t L = kLanes<A>, kWidth = kPanelWidth<A>;

 public:
  BackwardPass(const RecurrentBackward<T>& call, const RecurrentShape& shape, void* scratch)
      : call_(call),
        shape_(shape),
        panels_(P::count(shape.hidden)),
        depth_(panels_ * P::kProduct),
        state_panels_(ceil_div(shape.state, kWidth)),
        hidden_panels_(shape.projected ? ceil_div(shape.hidden, kWidth) : 0),
        input_panels_(ceil_div(shape.input, kWidth)),
        rows_(std::min(shape.batch, kBackwardRows)),
        capacity_(std::min(std::max(shape.rows(), shape.batch), kBackwardRows)) {
    const int64_t batch = shape.batch;
    Arena arena{static_cast<char*>(scratch)};
    schedule_ = {shape.steps, batch, shape.reverse, arena.take<int64_t>(batch), arena.take<int64_t>(batch),
                 arena.take<int64_t>(shape.steps + 1)};
    packed_hh_ = arena.take<A>(state_panels_ * depth_ * kWidth);
    packed_ih_ = arena.take<A>(input_panels_ * depth_ * kWidth);
    packed_hr_ = arena.take<A>(hidden_panels_ * state_panels_ * kWidth * kWidth);
    sum_ih_ = arena.take<A>(depth_ * shape.input);
    sum_hh_ = arena.take<A>(depth_ * shape.state);
    sum_hr_ = arena.take<A>(hidden_panels_ ? state_panels_ * kWidth * shape.hidden : 0);
    sum_bias_ = arena.take<A>(panels_ * kWidth);
    for (A*& gradients : gradients_) gradients = arena.take<A>(panels_ * capacity_ * kWidth);
    states_ = arena.take<A>(state_panels_ * capacity_ * kWidth);
    hiddens_ = arena.take<A>(hidden_panels_ * rows_ * kWidth);
    cell_ = arena.take<A>(kCell == Cell::lstm ? rows_ * panels_ * L : 0);
    through_ = arena.take<A>(kCell == Cell::gru ? rows_ * panels_ * L : 0);
    left_input_ = arena.take<A>(round_up(shape.input, L) * capacity_);
    left_state_ = arena.take<A>(round_up(shape.state, L) * capacity_);
    left_hidden_ = arena.take<A>(hidden_panels_ ? round_up(shape.hidden, L) * capacity_ : 0);
    grad_input_ = arena.take<A>(input_panels_ * capacity_ * kWidth);
    offsets_ = arena.take<int64_t>(capacity_ + 1);
    bytes_ = arena.used;
  }
  int64_t bytes() const { return bytes_; }

  void run() {
    schedule_.fill(call_.lengths);
    prepare();
    for (int64_t first = 0; first < shape_.batch; first += rows_)
      piece(first, std::min(first + rows_, shape_.batch));
    finish_weights();
  }

 private:
  // Threads that share the rows of a recurrence among them; with one, the threads share the panels of each product.
  static int64_t threads_of(int64_t rows) {
    return std::min<int64_t>(torch::stable::get_num_threads(), rows / kThreadRows);
  }
  bool wants_input() const { return call_.grad_input && call_.weights.ih; }

  void prepare() {
    if (call_.grad_input)
      for (int64_t j = 0; j < shape_.batch; ++j)
        for (int64_t t = schedule_.lengths[j]; t < shape_.steps; ++t)
          memset(static_cast<void*>(call_.grad_input + (t * shape_.batch + schedule_.order[j]) * shape_.input), 0,
                 size_t(shape_.input) * sizeof(T));
    const int64_t steps = shape_.batch > 0 ? schedule_.lengths[0] : 0;
    int64_t rows = 0;
    for (int64_t s = 0; s < steps; ++s) rows += schedule_.alive[s];
    single_ = rows > 0 && rows <= capacity_ && shape_.batch <= rows_;
    ready_hh_ = steps > 1 || shape_.batch > rows_ || threads_of(rows_) > 1;
    if (ready_hh_) pack(call_.weights.hh, shape_.state, state_panels_, true, packed_hh_);
    if (wants_input() && !single_) pack(call_.weights.ih, shape_.input, input_panels_, false, packed_ih_);
    for (int64_t p = 0; p < hidden_panels_; ++p)
      for (int64_t k = 0; k < state_panels_ * kWidth; ++k)
        pack_row(call_.weights.hr + k * shape_.hidden + p * kWidth, k < shape_.state ? shape_.hidden - p * kWidth : 0,
                 packed_hr_ + (p * state_panels_ * kWidth + k) * kWidth);
    std::fill_n(sum_ih_, call_.grad_weight_ih && !single_ ? depth_ * shape_.input : 0, A(0));
    std::fill_n(sum_hh_, call_.grad_weight_hh && !single_ ? depth_ * shape_.state : 0, A(0));
    std::fill_n(sum_hr_, call_.grad_weight_hr ? state_panels_ * kWidth * shape_.hidden : 0, A(0));
    std::fill_n(sum_bias_, panels_ * kWidth, A(0));
  }
  // Panels of columns of a weight, its rows in the order of the pre-activations' gradients.
  void pack(const T* weight, int64_t columns, int64_t count, bool of_hidden, A* packed) const {
    each_panels(true, count, depth_ * kWidth * 4, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        pack_block(weight, columns, p, of_hidden, 0, panels_, packed + p * depth_ * kWidth);
    });
  }
  // Columns of a panel; rows of the panels begin to end of the pre-activations.
  void pack_block(const T* weight, int64_t columns, int64_t panel, bool of_hidden, int64_t begin, int64_t end,
                  A* to) const {
    for (int64_t q = begin; q < end; ++q) {
      const PanelRows rows = P::rows(q, shape_.hidden, of_hidden);
      for (int v = 0; v < P::kVectors; ++v)
        for (int64_t i = 0; i < L; ++i, to += kWidth)
          pack_row(weight + (rows.first[v] + i) * columns + panel * kWidth,
                   i < rows.count[v] ? columns - panel * kWidth : 0, to);
    }
  }
  // sums[r] += gradients[r] weight, for a panel of columns. `spare` is where parts that are not packed may go.
  void product(const T* weight, int64_t columns, bool of_hidden, const A* packed, bool ready, int64_t panel, A* spare,
               const A* gradients, int64_t rows, A* sums) const {
    const LeftRows<A> left{gradients, kWidth, P::kProduct, capacity_ * kWidth};
    if (ready) return multiply<4>(left, depth_, packed + panel * depth_ * kWidth, rows, sums, kWidth);
    multiply_blocks<4>(
        left, depth_,
        [&](int64_t k, int64_t count) {
          pack_block(weight, columns, panel, of_hidden, k / P::kProduct, (k + count) / P::kProduct, spare);
          return spare;
        },
        rows, sums, kWidth);
  }

  // All steps of the rows at places first to last.
  void piece(int64_t first, int64_t last) {
    const int64_t rows = last - first;
    for (int64_t j = 0; kCell == Cell::lstm && j < rows; ++j) {
      A* const to = cell_ + j * panels_ * L;
      std::fill_n(to, panels_ * L, A(0));
      if (call_.grad_c_n) convert(call_.grad_c_n + schedule_.order[first + j] * shape_.hidden, shape_.hidden, to);
    }
    const int64_t threads = threads_of(rows);
    const auto each_part = [&](const auto& body) {
      if (threads <= 1) return body(int64_t(0), rows, true);
      parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(rows * i / threads, rows * (i + 1) / threads, false);
      });
    };
    int64_t begin = schedule_.lengths[first];
    for (int64_t end = begin; end > 0; end = begin) {
      int64_t count = 0;
      while (begin > 0 && (begin == end || count + schedule_.count(begin - 1, first, last) <= capacity_))
        count += schedule_.count(--begin, first, last);
      offsets_[0] = 0;
      for (int64_t s = begin; s < end; ++s)
        offsets_[s - begin + 1] = offsets_[s - begin] + schedule_.count(s, first, last);
      each_part([&](int64_t from, int64_t to, bool panels_on_threads) {
        for (int64_t s = end - 1; s >= begin; --s)
          step(s, first, from, to, offsets_[s - begin],
               s + 1 < end ? gradients_[0] + offsets_[s + 1 - begin] * kWidth : gradients_[1], panels_on_threads);
      });
      add_weights(count);
      if (call_.grad_input) make_grad_input(begin, end, first, last);
      std::swap(gradients_[0], gradients_[1]);
    }
    each_part([&](int64_t from, int64_t to, bool panels_on_threads) { initial(first, from, to, panels_on_threads); });
  }

  // The gradients of the states of one step, or with s = -1 of h0, for a panel of units of the rows from .. from + rows.
  A* state_gradient(int64_t panel, int64_t s, int64_t first, int64_t from, int64_t to, int64_t offset, const A* next,
                    A* spare) {
    const int64_t rows = (s < 0 ? to - from : schedule_.count(s, first + from, first + to));
    const int64_t going_on = schedule_.count(s + 1, first + from, first + to), size = shape_.state;
    A* const sums = states_ + (panel * capacity_ + (shape_.projected ? offset : 0) + from) * kWidth;
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t v = 0; v < kPanelVectors; ++v) {
        const int64_t unit = panel * kWidth + v * L, place = first + from + j;
        Vec<A> sum{};
        if (unit < size) {
          if (call_.grad_output && s >= 0)
            sum = load_some(call_.grad_output + schedule_.row(s, place) * size + unit, size - unit);
          if (j >= going_on && call_.grad_h_n)
            sum = sum + load_some(call_.grad_h_n + schedule_.order[place] * size + unit, size - unit);
          if (kCell == Cell::gru && j < going_on) sum = sum + load(through_ + (from + j) * panels_ * L + unit);
        }
        store(sums + j * kWidth + v * L, sum);
      }
    if (going_on)
      product(call_.weights.hh, size, true, packed_hh_, ready_hh_, panel, spare,
              next + from * kWidth + P::kHiddenOffset, going_on, sums);
    return sums;
  }

  void step(int64_t s, int64_t first, int64_t from, int64_t to, int64_t offset, const A* next, bool threads) {
    const int64_t rows = schedule_.count(s, first + from, first + to);
    keep_left_rows(s, first, from, rows, offset);
    each_panels(threads, state_panels_, rows * depth_ * kWidth, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const A* const sums = state_gradient(p, s, first, from, to, offset, next, packed_hh_ + begin * depth_ * kWidth);
        for (int64_t j = 0; !shape_.projected && j < rows; ++j) finish(p, s, first, from + j, offset, sums + j * kWidth);
      }
    });
    if (!shape_.projected) return;
    each_panels(threads, hidden_panels_, rows * shape_.state * kWidth, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        A* const sums = hiddens_ + (p * rows_ + from) * kWidth;
        std::fill_n(sums, rows * kWidth, A(0));
        multiply<4>(LeftRows<A>{states_ + (offset + from) * kWidth, kWidth, kWidth, capacity_ * kWidth},
                    state_panels_ * kWidth, packed_hr_ + p * state_panels_ * kWidth * kWidth, rows, sums, kWidth);
        for (int64_t j = 0; j < rows; ++j) finish(p, s, first, from + j, offset, sums + j * kWidth);
      }
    });
  }

  // From the gradients of four vectors of hidden units to those of their pre-activations.
  void finish(int64_t panel, int64_t s, int64_t first, int64_t j, int64_t offset, const A* grad) {
    const int64_t hidden = shape_.hidden, row = schedule_.row(s, first + j), place = schedule_.order[first + j];
    const int64_t before = s > 0 ? schedule_.row(s - 1, first + j) : 0;
    for (int64_t v = 0; v < kPanelVectors; ++v) {
      const int64_t unit = panel * kWidth + v * L, count = hidden - unit;
      if constexpr (P::kSingle) {
        const Vec<A> state = count > 0 ? load_some(call_.output + row * hidden + unit, count) : Vec<A>{};
        store(gradients_[0] + (panel * capacity_ + offset + j) * kWidth + v * L,
              rnn_backward(load(grad + v * L), state, shape_.cell == Cell::rnn_relu));
      } else {
        if (count <= 0) break;
        A* const to = gradients_[0] + (unit / L * capacity_ + offset + j) * kWidth;
        const SavedGates<T> gates(call_.gates + row * 4 * hidden + unit, hidden, count);
        if constexpr (kCell == Cell::gru) {
          const T* from = s > 0 ? call_.output + before * hidden : call_.h0 + place * hidden;
          store(through_ + j * panels_ * L + unit,
                gru_backward<T>(load(grad + v * L), gates, load_some(from + unit, count), to));
        } else {
          const A* from = s > 0 ? call_.cells + before * hidden : call_.c0 + place * hidden;
          const Vec<A> cell = load_some(call_.cells + row * hidden + unit, count);
          const Vec<A> state = lstm_backward<T>(load(grad + v * L), gates, cell, load_some(from + unit, count),
                                                cell_ + j * panels_ * L + unit, to);
          if (shape_.projected) store(left_hidden_ + (unit / L * capacity_ + offset + j) * L, state);
        }
      }
    }
  }

  // The rows of the input and of the previous state, as the weight gradients read them.
  void keep_left_rows(int64_t s, int64_t first, int64_t from, int64_t rows, int64_t offset) {
    const auto keep = [&](const T* row, int64_t size, A* to) {
      for (int64_t k = 0; k < size; k += L) store(to + k * capacity_, load_some(row + k, size - k));
    };
    for (int64_t j = from; j < from + rows; ++j) {
      const int64_t place = first + j, size = shape_.state;
      if (call_.grad_weight_ih)
        keep(call_.input + schedule_.row(s, place) * shape_.input, shape_.input, left_input_ + (offset + j) * L);
      if (call_.grad_weight_hh)
        keep(s > 0 ? call_.output + schedule_.row(s - 1, place) * size : call_.h0 + schedule_.order[place] * size, size,
             left_state_ + (offset + j) * L);
    }
  }

  void add_weights(int64_t rows) {
    const int64_t width = (call_.grad_weight_ih ? shape_.input : 0) + (call_.grad_weight_hh ? shape_.state : 0);
    each_panels(true, panels_, rows * P::kProduct * width, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const A* const from = gradients_[0] + p * capacity_ * kWidth;
        if (call_.grad_bias_ih || call_.grad_bias_hh) add_rows(from, rows, sum_bias_ + p * kWidth);
        if (call_.grad_weight_ih)
          add_weight(p, begin, false, left_input_, shape_.input, from, rows, sum_ih_, call_.grad_weight_ih);
        if (call_.grad_weight_hh)
          add_weight(p, begin, true, left_state_, shape_.state, from + P::kHiddenOffset, rows, sum_hh_,
                     call_.grad_weight_hh);
      }
    });
    if (!call_.grad_weight_hr) return;
    each_panels(true, state_panels_, rows * kWidth * shape_.hidden, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        add_outer<4>(left_hidden_, capacity_, shape_.hidden, states_ + p * capacity_ * kWidth, rows,
                     sum_hr_ + p * shape_.hidden * kWidth);
    });
  }

  // A chunk's part of the gradient of a weight's panel; all of it, and so the end of it, where there is a single chunk.
  void add_weight(int64_t panel, int64_t begin, bool of_hidden, const A* left, int64_t columns, const A* right,
                  int64_t rows, A* sums, T* to) const {
    sums += (single_ ? begin : panel) * columns * P::kProduct;
    if (single_) std::fill_n(sums, columns * P::kProduct, A(0));
    add_outer<P::kVectors>(left, capacity_, columns, right, rows, sums);
    if (single_) put_transposed<P::kVectors>(sums, columns, P::rows(panel, shape_.hidden, of_hidden), to);
  }

  // Calls body(r, row) for the rows of a chunk.
  template <class Body>
  void each_row(int64_t begin, int64_t end, int64_t first, int64_t last, const Body& body) const {
    for (int64_t s = begin; s < end; ++s)
      for (int64_t j = 0; j < schedule_.count(s, first, last); ++j)
        body(offsets_[s - begin] + j, schedule_.row(s, first + j));
  }

  void make_grad_input(int64_t begin, int64_t end, int64_t first, int64_t last) {
    const int64_t size = shape_.input, rows = offsets_[end - begin];
    if (!call_.weights.ih)  // the input is the product itself
      return each_panels(true, panels_, rows * kWidth, [&](int64_t from, int64_t to) {
        for (int64_t p = from; p < to; ++p) {
          const PanelRows columns = P::rows(p, shape_.hidden, false);
          each_row(begin, end, first, last, [&](int64_t r, int64_t row) {
            for (int v = 0; v < P::kVectors && columns.count[v] > 0; ++v)
              store_some(call_.grad_input + row * size + columns.first[v], columns.count[v],
                         load(gradients_[0] + (p * capacity_ + r) * kWidth + v * L));
          });
        }
      });
    each_panels(true, input_panels_, rows * depth_ * kWidth, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) {
        A* const sums = grad_input_ + from * capacity_ * kWidth;
        std::fill_n(sums, rows * kWidth, A(0));
        product(call_.weights.ih, size, false, packed_ih_, !single_, p, packed_ih_ + from * depth_ * kWidth,
                gradients_[0], rows, sums);
        each_row(begin, end, first, last, [&](int64_t r, int64_t row) {
          for (int64_t v = 0, column = p * kWidth; v < kPanelVectors && column < size; ++v, column += L)
            store_some(call_.grad_input + row * size + column, size - column, load(sums + r * kWidth + v * L));
        });
      }
    });
  }

  // The gradients of h0 and c0.
  void initial(int64_t first, int64_t from, int64_t to, bool threads) {
    const int64_t size = shape_.state;
    each_panels(threads, state_panels_, (to - from) * depth_ * kWidth, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const A* const sums = state_gradient(p, -1, first, from, to, 0, gradients_[1], packed_hh_ + begin * depth_ * kWidth);
        for (int64_t j = from; j < to; ++j)
          for (int64_t v = 0, unit = p * kWidth; v < kPanelVectors && unit < size; ++v, unit += L)
            store_some(call_.grad_h0 + schedule_.order[first + j] * size + unit, size - unit,
                       load(sums + (j - from) * kWidth + v * L));
      }
    });
    for (int64_t j = from; kCell == Cell::lstm && j < to; ++j)
      memcpy(call_.grad_c0 + schedule_.order[first + j] * shape_.hidden, cell_ + j * panels_ * L,
             size_t(shape_.hidden) * sizeof(A));
  }

  void finish_weights() {
    const int64_t hidden = shape_.hidden;
    each_panels(true, panels_, (shape_.input + shape_.state) * kWidth * 4, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const PanelRows input = P::rows(p, hidden, false), state = P::rows(p, hidden, true);
        const A* const bias = sum_bias_ + p * kWidth;
        if (call_.grad_bias_ih) put_transposed<P::kVectors>(bias, 1, input, call_.grad_bias_ih);
        if (call_.grad_bias_hh) put_transposed<P::kVectors>(bias + P::kHiddenOffset, 1, state, call_.grad_bias_hh);
        if (call_.grad_weight_ih && !single_)
          put_transposed<P::kVectors>(sum_ih_ + p * shape_.input * P::kProduct, shape_.input, input,
                                      call_.grad_weight_ih);
        if (call_.grad_weight_hh && !single_)
          put_transposed<P::kVectors>(sum_hh_ + p * shape_.state * P::kProduct, shape_.state, state,
                                      call_.grad_weight_hh);
      }
    });
    for (int64_t p = 0; call_.grad_weight_hr && p < state_panels_; ++p)
      put_transposed<4>(sum_hr_ + p * hidden * kWidth, hidden, plain_rows<A>(p, shape_.state), call_.grad_weight_hr);
  }

  const RecurrentBackward<T>& call_;
  const RecurrentShape& shape_;
  const int64_t panels_, depth_, state_panels_, hidden_panels_, input_panels_, rows_, capacity_;
  Schedule schedule_;
  A *packed_hh_, *packed_ih_, *packed_hr_, *sum_ih_, *sum_hh_, *sum_hr_, *sum_bias_;
  A* gradients_[2];                                // of the pre-activations, [panel][row of the chunk][kWidth]
  A *states_, *hiddens_;                           // gradients of h and, with a projection, of what it projects
  A *cell_, *through_;                             // of c, and of h past the gates: what a step hands to the one before
  A *left_input_, *left_state_, *left_hidden_;     // [vector of columns][row of the chunk][L]
  A* grad_input_;
  bool single_, ready_hh_;  // all rows are one chunk; weight_hh is packed
  int64_t* offsets_;  // (steps of the chunk + 1): where the rows of a step begin
  int64_t bytes_;
};

}  // namespace pynn::cpu::recurrent
