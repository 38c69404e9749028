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

inline constexpr int64_t kBackwardRows = 256;
inline constexpr int64_t kThreadRows = 8;    // rows of the recurrence that are worth a thread
inline constexpr int64_t kStripPanels = 16;  // whose sums stay in the first-level cache
// Steps that take less to read weight_hh where it lies than to pack it: packing on the way, and packing apart.
inline constexpr int64_t kPackingSteps = 16, kUnpackedSteps = 6;

template <Cell kCell, class T>
class BackwardPass {
  using A = accumulate_t<T>;
  using P = Panels<kCell, A>;
  static constexpr int64_t L = kLanes<A>, kWidth = kPanelWidth<A>, kPanelsOfChain = kChain / P::kProduct;
  // The first tile of a product packs a weight that lies where it lies.
  static constexpr bool kPacksOnTheWay = std::is_same_v<T, A> && kPanelsOfChain == 1;

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
        capacity_(std::min(std::max(shape.rows(), shape.batch), kBackwardRows)),
        single_(shape.rows() <= capacity_),
        ready_hh_(shape.steps > (kPacksOnTheWay ? kPackingSteps : kUnpackedSteps) || shape.batch > rows_ ||
                  threads_of(rows_) > 1) {
    const int64_t batch = shape.batch;
    Arena arena{static_cast<char*>(scratch)};
    schedule_ = {shape.steps,
                 batch,
                 shape.reverse,
                 arena.take<int64_t>(batch),
                 arena.take<int64_t>(batch),
                 arena.take<int64_t>(shape.steps + 1)};
    packed_hh_ = arena.take<A>(ready_hh_ ? state_panels_ * depth_ * kWidth : 0);
    packed_ih_ = arena.take<A>(single_ ? 0 : input_panels_ * depth_ * kWidth);
    packed_hr_ = arena.take<A>(hidden_panels_ * state_panels_ * kWidth * kWidth);
    const int64_t weights = gates_of(kCell) * shape.hidden;
    weight_ih_ = {call.grad_weight_ih, weights, shape.input, true, arena};
    weight_hh_ = {call.grad_weight_hh, weights, shape.state, true, arena};
    weight_hr_ = {call.grad_weight_hr, shape.state, shape.hidden, shape.projected, arena};
    sum_bias_ = arena.take<A>(panels_ * kWidth);
    lost_bias_ = arena.take<A>(panels_ * kWidth);
    gradients_[0] = arena.take<A>(panels_ * capacity_ * kWidth);
    gradients_[1] = single_ ? gradients_[0] : arena.take<A>(panels_ * capacity_ * kWidth);
    state_rows_ = shape.projected ? capacity_ : rows_;
    states_ = arena.take<A>(state_panels_ * state_rows_ * kWidth);
    hiddens_ = arena.take<A>(hidden_panels_ * rows_ * kWidth);
    cell_ = arena.take<A>(kCell == Cell::lstm ? rows_ * panels_ * L : 0);
    through_ = arena.take<A>(kCell == Cell::gru ? rows_ * panels_ * L : 0);
    left_input_ = arena.take<A>(input_panels_ * capacity_ * kWidth);
    left_state_ = arena.take<A>(state_panels_ * capacity_ * kWidth);
    left_hidden_ = arena.take<A>(hidden_panels_ * capacity_ * kWidth);
    input_sums_ = arena.take<A>(single_ ? input_panels_ * capacity_ * kWidth : 0);
    offsets_ = arena.take<int64_t>(capacity_ + 1);
    bytes_ = arena.used;
  }
  int64_t bytes() const { return bytes_; }

  void run() {
    schedule_.fill(call_.lengths);
    prepare();
    if (call_.gates_given) return sum_given();
    for (int64_t first = 0; first < shape_.batch; first += rows_) piece(first, std::min(first + rows_, shape_.batch));
    finish_weights();
  }

 private:
  // Threads that share the rows of a recurrence among them; with one, the threads share the panels of each product.
  static int64_t threads_of(int64_t rows) { return std::min<int64_t>(thread_count(), rows / kThreadRows); }
  bool wants_input() const { return call_.grad_input && call_.weights.ih; }

  void prepare() {
    if (call_.grad_input)
      for (int64_t j = 0; j < shape_.batch; ++j)
        for (int64_t t = schedule_.lengths[j]; t < shape_.steps; ++t)
          memset(static_cast<void*>(call_.grad_input + (t * shape_.batch + schedule_.order[j]) * shape_.input), 0,
                 size_t(shape_.input) * sizeof(T));
    if (ready_hh_ && !call_.gates_given) pack(call_.weights.hh, shape_.state, state_panels_, true, packed_hh_);
    if (wants_input() && !single_) pack(call_.weights.ih, shape_.input, input_panels_, false, packed_ih_);
    for (int64_t p = 0; p < hidden_panels_; ++p)
      for (int64_t k = 0; k < state_panels_ * kWidth; ++k)
        pack_row(call_.weights.hr + k * shape_.hidden + p * kWidth, k < shape_.state ? shape_.hidden - p * kWidth : 0,
                 packed_hr_ + (p * state_panels_ * kWidth + k) * kWidth);
    for (A* const sums : {sum_bias_, lost_bias_}) std::fill_n(sums, panels_ * kWidth, A(0));
  }
  // Panels of columns of a weight, its rows in the order of the pre-activations' gradients; read row by row.
  void pack(const T* weight, int64_t columns, int64_t count, bool of_hidden, A* packed) const {
    each_panels(true, panels_, P::kProduct * columns * 4, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        const PanelRows rows = P::rows(q, shape_.hidden, of_hidden);
        for (int64_t v = 0; v < P::kVectors; ++v)
          for (int64_t i = 0; i < L; ++i) {
            const T* const from = weight + (rows.first[v] + i) * columns;
            A* const to = packed + (q * P::kProduct + v * L + i) * kWidth;
            for (int64_t p = 0; p < count; ++p)
              pack_row(from + p * kWidth, i < rows.count[v] ? columns - p * kWidth : 0, to + p * depth_ * kWidth);
          }
      }
    });
  }
  // Columns of a panel; the rows of panel q of the pre-activations.
  void pack_block(const T* weight, int64_t columns, int64_t panel, bool of_hidden, int64_t q, A* to,
                  Ahead& ahead) const {
    const PanelRows rows = P::rows(q, shape_.hidden, of_hidden);
    for (int v = 0; v < P::kVectors; ++v)
      for (int64_t i = 0; i < L; ++i, to += kWidth) {
        ahead.lines<kWidth * int64_t(sizeof(T)) / 64>();
        pack_row(weight + (rows.first[v] + i) * columns + panel * kWidth,
                 i < rows.count[v] ? columns - panel * kWidth : 0, to);
      }
  }
  LeftRows<A> left_rows(const A* gradients) const { return {gradients, kWidth, P::kProduct, capacity_ * kWidth}; }
  // sums[r] += gradients[r] weight, for a panel of columns of a packed weight.
  void product(const A* packed, int64_t panel, const A* gradients, int64_t rows, A* sums) const {
    multiply<4>(left_rows(gradients), depth_, packed + panel * depth_ * kWidth, rows, sums, kWidth);
  }

  // The same with a weight where it lies, for the panels begin to end of columns: their sums are `stride` apart. It is
  // read once, whole rows or as long parts of them as have their sums near, chain by chain.
  void multiply_once(const T* weight, int64_t columns, bool of_hidden, int64_t begin, int64_t end, const A* gradients,
                     int64_t rows, A* sums, int64_t stride) const {
    for (int64_t p = begin; p < end; p += kStripPanels)
      multiply_strip(weight, columns, of_hidden, p, std::min(p + kStripPanels, end), gradients, rows,
                     sums + (p - begin) * stride, stride);
  }
  void multiply_strip(const T* weight, int64_t columns, bool of_hidden, int64_t begin, int64_t end, const A* gradients,
                      int64_t rows, A* sums, int64_t stride) const {
    const int64_t first = begin * kWidth, count = std::min(end * kWidth, columns) - first;
    const auto after = [&](int64_t q) {
      return Ahead(weight + first, columns, count, P::rows(std::min(q, panels_), shape_.hidden, of_hidden));
    };
    alignas(64) A part[std::max(kStripPanels, kChain) * kWidth];
    for (int64_t q = 0, next; q < panels_; q = next) {
      next = std::min(q + kPanelsOfChain, panels_);
      if (rows == 1) {
        std::fill_n(part, round_up(count, L), A(0));
        for (int64_t of_chain = q; of_chain < next; ++of_chain)
          add_scaled_panel(weight + first, columns, count, of_hidden, of_chain,
                           gradients + of_chain * capacity_ * kWidth, part, after(of_chain + 1));
        for (int64_t j = 0; j < count; j += L) {
          A* const sum = sums + j / kWidth * stride + j % kWidth;
          store(sum, load(sum) + load(part + j));
        }
        continue;
      }
      Ahead ahead[kPanelsOfChain];
      for (int64_t i = 0; i < kPanelsOfChain; ++i) ahead[i] = after(q + kPanelsOfChain + i);
      for (int64_t p = begin; p < end; ++p) {
        if constexpr (kPacksOnTheWay)
          if (const PanelRows places = P::rows(q, shape_.hidden, of_hidden);
              (p + 1) * kWidth <= columns && places.count[P::kVectors - 1] == L) {
            const int64_t height = ceil_div(rows, ceil_div(rows, tile_height<kPanelVectors>(rows, P::kProduct)));
            const A* const left = gradients + q * capacity_ * kWidth;
            A* const to = sums + (p - begin) * stride;
            kPackingTiles<A>[height - 1](left, kWidth, weight + p* kWidth, columns, places, P::kVectors, part, to,
                                         kWidth, ahead[0]);
            multiply<4>(left_rows(left + height * kWidth), P::kProduct, part, rows - height, to + height * kWidth,
                        kWidth);
            continue;
          }
        for (int64_t i = 0; q + i < next; ++i)
          pack_block(weight, columns, p, of_hidden, q + i, part + i * P::kProduct * kWidth, ahead[i]);
        multiply<4>(left_rows(gradients + q * capacity_ * kWidth), (next - q) * P::kProduct, part, rows,
                    sums + (p - begin) * stride, kWidth);
      }
    }
  }
  // to[:] += the gradients of panel q of a row of pre-activations times its rows of a weight.
  void add_scaled_panel(const T* weight, int64_t columns, int64_t count, bool of_hidden, int64_t q, const A* gradients,
                        A* to, Ahead ahead) const {
    const PanelRows rows = P::rows(q, shape_.hidden, of_hidden);
    for (int v = 0; v < P::kVectors; ++v) {
      const T* const from = weight + rows.first[v] * columns;
      int64_t i = 0;
      for (; i + 4 <= rows.count[v]; i += 4)
        add_scaled_rows<4>(from + i * columns, columns, gradients + v * L + i, count, to, ahead);
      for (; i < rows.count[v]; ++i)
        add_scaled_rows<1>(from + i * columns, columns, gradients + v * L + i, count, to, ahead);
    }
  }

  // The gradients of weights and biases from given gradients of the pre-activations.
  void sum_given() {
    for (int64_t first = 0; first < shape_.batch; first += rows_) {
      const int64_t rows = std::min(rows_, shape_.batch - first);
      keep_left_rows(0, first, 0, rows, 0);
      each_vector_of_gates([&](int64_t column, int64_t count, A* at) {
        for (int64_t r = 0; r < rows; ++r, at += kWidth) {
          const T* const from = call_.gates_given + (first + r) * gates_width() + column;
          store(at, count > 0 ? load_some(from, count) : Vec<A>{});
        }
      });
      add_weights(rows);
    }
    finish_weights();
  }
  // Those of a chunk for who wants them.
  void put_gates(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    each_vector_of_gates([&](int64_t column, int64_t count, A* at) {
      if (count > 0)
        each_row(begin, end, first, last, [&](int64_t r, int64_t row) {
          store_some(call_.grad_gates + row * gates_width() + column, count, load(at + r * kWidth));
        });
    });
  }
  int64_t gates_width() const { return gradients_of(kCell) * shape_.hidden; }
  // body(column, count, at): where a vector of the gradients of pre-activations begins in a row of all of them, how
  // many of its lanes there are, and where the first row of the chunk has it.
  template <class Body>
  void each_vector_of_gates(const Body& body) const {
    const int64_t hidden = shape_.hidden;
    for (int64_t p = 0; p < panels_; ++p)
      for (int64_t v = 0; v < kPanelVectors; ++v) {
        const int64_t unit = p * P::kUnits + (P::kSingle ? v * L : 0);
        const int64_t gate = P::kSingle ? 0 : P::kGru && v < 3 ? (v + 2) % 3 : v;
        body(gate * hidden + unit, std::clamp<int64_t>(hidden - unit, 0, L),
             gradients_[0] + p * capacity_ * kWidth + v * L);
      }
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
      if (call_.grad_gates) put_gates(begin, end, first, last);
      if (call_.grad_input) make_grad_input(begin, end, first, last);
      std::swap(gradients_[0], gradients_[1]);
    }
    each_part([&](int64_t from, int64_t to, bool panels_on_threads) { initial(first, from, to, panels_on_threads); });
  }

  // The gradients of the states of one step, or with s = -1 of h0, for the panels begin to end of units and the rows
  // from .. from + rows.
  void state_gradients(int64_t begin, int64_t end, int64_t s, int64_t first, int64_t from, int64_t to, int64_t offset,
                       const A* next) {
    const int64_t going_on = schedule_.count(s + 1, first + from, first + to);
    const A* const gradients = next + from * kWidth + P::kHiddenOffset;
    for (int64_t p = begin; p < end; ++p) {
      start_state_gradient(p, s, first, from, to, offset);
      if (going_on && ready_hh_) product(packed_hh_, p, gradients, going_on, state_sums(p, from, offset));
    }
    if (going_on && !ready_hh_)
      multiply_once(call_.weights.hh, shape_.state, true, begin, end, gradients, going_on,
                    state_sums(begin, from, offset), state_rows_ * kWidth);
  }
  // Without what comes through the gates of the step after it.
  void start_state_gradient(int64_t panel, int64_t s, int64_t first, int64_t from, int64_t to, int64_t offset) {
    const int64_t rows = (s < 0 ? to - from : schedule_.count(s, first + from, first + to));
    const int64_t going_on = schedule_.count(s + 1, first + from, first + to), size = shape_.state;
    A* const sums = state_sums(panel, from, offset);
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
  }
  A* state_sums(int64_t panel, int64_t from, int64_t offset) const {
    return states_ + (panel * state_rows_ + (shape_.projected ? offset : 0) + from) * kWidth;
  }

  void step(int64_t s, int64_t first, int64_t from, int64_t to, int64_t offset, const A* next, bool threads) {
    const int64_t rows = schedule_.count(s, first + from, first + to);
    keep_left_rows(s, first, from, rows, offset);
    each_panels(threads, state_panels_, rows * depth_ * kWidth, [&](int64_t begin, int64_t end) {
      const int64_t at_once = ready_hh_ ? 1 : end - begin;
      for (int64_t p = begin; p < end; p += at_once) {
        state_gradients(p, p + at_once, s, first, from, to, offset, next);
        for (int64_t of_part = p; !shape_.projected && of_part < p + at_once; ++of_part)
          for (int64_t j = 0; j < rows; ++j)
            finish(of_part, s, first, from + j, offset, state_sums(of_part, from, offset) + j * kWidth);
      }
    });
    if (!shape_.projected) return;
    each_panels(threads, hidden_panels_, rows * shape_.state * kWidth, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        A* const sums = hiddens_ + (p * rows_ + from) * kWidth;
        std::fill_n(sums, rows * kWidth, A(0));
        multiply<4>(LeftRows<A>{states_ + (offset + from) * kWidth, kWidth, kWidth, state_rows_ * kWidth},
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
          if (shape_.projected) store(left_hidden_ + (panel * capacity_ + offset + j) * kWidth + v * L, state);
        }
      }
    }
  }

  // The rows of the input and of the previous state, as the weight gradients read them.
  void keep_left_rows(int64_t s, int64_t first, int64_t from, int64_t rows, int64_t offset) {
    const auto keep = [&](const T* row, int64_t size, A* to) {
      for (int64_t k = 0; k < size; k += kWidth) pack_row(row + k, size - k, to + k * capacity_);
    };
    for (int64_t j = from; j < from + rows; ++j) {
      const int64_t place = first + j, size = shape_.state;
      if (weight_ih_.wanted())
        keep(call_.input + schedule_.row(s, place) * shape_.input, shape_.input, left_input_ + (offset + j) * kWidth);
      if (weight_hh_.wanted())
        keep(s > 0 ? call_.output + schedule_.row(s - 1, place) * size : call_.h0 + schedule_.order[place] * size, size,
             left_state_ + (offset + j) * kWidth);
    }
  }

  // A chunk's part of the gradients of weights and biases.
  void add_weights(int64_t rows) {
    const bool first = none_;
    none_ = false;
    const int64_t width = (weight_ih_.wanted() ? shape_.input : 0) + (weight_hh_.wanted() ? shape_.state : 0);
    each_panels(true, panels_, rows * P::kProduct * width, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const A* const from = gradients_[0] + p * capacity_ * kWidth;
        if (call_.grad_bias_ih || call_.grad_bias_hh)
          add_rows(from, rows, sum_bias_ + p * kWidth, lost_bias_ + p * kWidth);
        if (weight_ih_.wanted())
          weight_ih_.template add<P::kVectors>(from, P::rows(p, shape_.hidden, false), left_input_, capacity_, rows,
                                               first);
        if (weight_hh_.wanted())
          weight_hh_.template add<P::kVectors>(from + P::kHiddenOffset, P::rows(p, shape_.hidden, true), left_state_,
                                               capacity_, rows, first);
      }
    });
    if (!weight_hr_.wanted()) return;
    each_panels(true, state_panels_, rows * kWidth * shape_.hidden, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        weight_hr_.template add<kPanelVectors>(states_ + p * state_rows_ * kWidth, plain_rows<A>(p, shape_.state),
                                               left_hidden_, capacity_, rows, first);
    });
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
      const auto put = [&](int64_t p, const A* sums) {
        each_row(begin, end, first, last, [&](int64_t r, int64_t row) {
          for (int64_t v = 0, column = p * kWidth; v < kPanelVectors && column < size; ++v, column += L)
            store_some(call_.grad_input + row * size + column, size - column, load(sums + r * kWidth + v * L));
        });
      };
      if (single_) {
        const int64_t stride = capacity_ * kWidth;
        std::fill_n(input_sums_ + from * stride, (to - from) * stride, A(0));
        multiply_once(call_.weights.ih, size, false, from, to, gradients_[0], rows, input_sums_ + from * stride,
                      stride);
        for (int64_t p = from; p < to; ++p) put(p, input_sums_ + p * stride);
      } else {
        alignas(64) A sums[kBackwardRows * kWidth];
        for (int64_t p = from; p < to; ++p) {
          std::fill_n(sums, rows * kWidth, A(0));
          product(packed_ih_, p, gradients_[0], rows, sums);
          put(p, sums);
        }
      }
    });
  }

  // The gradients of h0 and c0.
  void initial(int64_t first, int64_t from, int64_t to, bool threads) {
    const int64_t size = shape_.state, panels = call_.grad_h0 ? state_panels_ : 0;
    each_panels(threads, panels, (to - from) * depth_ * kWidth, [&](int64_t begin, int64_t end) {
      state_gradients(begin, end, -1, first, from, to, 0, gradients_[1]);
      for (int64_t p = begin; p < end; ++p) {
        const A* const sums = state_sums(p, from, 0);
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
    const auto put = [&](int64_t from, const PanelRows& places, T* to) {
      for (int v = 0; to && v < P::kVectors && places.count[v] > 0; ++v) {
        const Vec<A> sum = load(sum_bias_ + from + v * L), all = sum + load(lost_bias_ + from + v * L);
        store_some(to + places.first[v], places.count[v], sum - sum == Vec<A>{} ? all : sum);  // if it is finite
      }
    };
    for (int64_t p = 0; p < panels_; ++p) {
      put(p * kWidth, P::rows(p, shape_.hidden, false), call_.grad_bias_ih);
      put(p * kWidth + P::kHiddenOffset, P::rows(p, shape_.hidden, true), call_.grad_bias_hh);
    }
    for (const auto* weight : {&weight_ih_, &weight_hh_, &weight_hr_}) weight->finish(none_);
  }

  const RecurrentBackward<T>& call_;
  const RecurrentShape& shape_;
  const int64_t panels_, depth_, state_panels_, hidden_panels_, input_panels_, rows_, capacity_;
  const bool single_, ready_hh_;  // all rows are one chunk; weight_hh is packed for several products
  int64_t state_rows_;
  Schedule schedule_;
  A *packed_hh_, *packed_ih_, *packed_hr_, *sum_bias_, *lost_bias_;
  WeightGradient<T> weight_ih_, weight_hh_, weight_hr_;
  bool none_ = true;                            // no chunk has added to the weight gradients yet
  A* gradients_[2];                             // of the pre-activations, [panel][row of the chunk][kWidth]
  A *states_, *hiddens_;                        // gradients of h and, with a projection, of what it projects
  A *cell_, *through_;                          // of c, and of h past the gates: what a step hands to the one before
  A *left_input_, *left_state_, *left_hidden_;  // panels of the rows that the weights multiplied
  A* input_sums_;                               // of the gradient of the input where all rows are one chunk
  int64_t* offsets_;                            // (steps of the chunk + 1): where the rows of a step begin
  int64_t bytes_;
};

}  // namespace pynn::cpu::recurrent
