// Which row of the batch is alive at which step, where its elements lie, and how scratch memory is laid out.
#pragma once
#include <algorithm>

#include "parallel.h"
#include "recurrent.h"
#include "recurrent_tile.h"

namespace pynn::cpu::recurrent {

// Rows are sorted by length, longest first, so that at every step of the recurrence a prefix of them is alive: rows
// that are not cost nothing. Steps count in the order of the recurrence, from 0 for the first one of a row.
struct Schedule {
  int64_t steps, batch;
  bool reverse;
  int64_t *order, *lengths;  // (batch): the row of the batch at a place, and its length
  int64_t* alive;            // (steps + 1): rows alive at a step

  int64_t row(int64_t step, int64_t place) const {
    return (reverse ? lengths[place] - 1 - step : step) * batch + order[place];
  }
  // Rows alive at a step among the places begin to end.
  int64_t count(int64_t step, int64_t begin, int64_t end) const {
    return std::clamp<int64_t>(alive[step] - begin, 0, end - begin);
  }

  void fill(const int64_t* row_lengths) {
    const auto length = [&](int64_t b) { return row_lengths ? std::clamp<int64_t>(row_lengths[b], 0, steps) : steps; };
    for (int64_t b = 0; b < batch; ++b) order[b] = b;
    if (row_lengths)
      std::sort(order, order + batch,
                [&](int64_t a, int64_t b) { return length(a) != length(b) ? length(a) > length(b) : a < b; });
    for (int64_t b = 0; b < batch; ++b) lengths[b] = length(order[b]);
    for (int64_t s = 0, rows = batch; s <= steps; ++s) {
      while (rows > 0 && lengths[rows - 1] <= s) --rows;
      alive[s] = rows;
    }
  }
};

// Hands out parts of the scratch memory; on a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* const part = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(T)), 64);
    return part;
  }
};

// The panels of one cell: `vectors` gates of `units` hidden units, or, with a single gate, four vectors of it.
//
// Columns of a row of pre-activations or of their gradients, kPanelWidth wide: lstm i f g o; gru n r z and n's hidden
// share, so that those that weight_ih makes and those that weight_hh makes both lie side by side; rnn four vectors.
template <Cell kCell, class A>
struct Panels {
  static constexpr bool kGru = kCell == Cell::gru, kSingle = kCell != Cell::gru && kCell != Cell::lstm;
  static constexpr int kVectors = kGru ? 3 : 4;  // of one product
  static constexpr int64_t L = kLanes<A>, kUnits = kSingle ? 4 * L : L, kWidth = kPanelWidth<A>;
  static constexpr int64_t kProduct = kVectors * L;       // columns of one product
  static constexpr int64_t kHiddenOffset = kGru ? L : 0;  // where those of weight_hh begin

  static int64_t count(int64_t hidden) { return ceil_div(hidden, kUnits); }
  // The rows of weight_ih, or of weight_hh, that are the columns of a panel.
  static PanelRows rows(int64_t panel, int64_t hidden, bool of_hidden) {
    PanelRows result{};
    for (int v = 0; v < kVectors; ++v) {
      const int64_t gate = kSingle ? 0 : !kGru || of_hidden ? v : (v + 2) % 3;
      const int64_t unit = panel * kUnits + (kSingle ? v * L : 0);
      result.first[v] = gate * hidden + std::min(unit, hidden);
      result.count[v] = std::clamp<int64_t>(hidden - unit, 0, L);
    }
    return result;
  }
};

// Panels of a plain matrix product: kPanelWidth columns in order.
template <class A>
inline PanelRows plain_rows(int64_t panel, int64_t rows) {
  return Panels<Cell::rnn_tanh, A>::rows(panel, rows, false);
}

// One row more than a whole number of cache lines apart, so that the rows of a tile do not share sets of the cache.
template <class A>
inline int64_t padded(int64_t width) {
  return round_up(width, kLanes<A>) + kLanes<A>;
}

// body(Pass) with the pass of a cell; the two RNNs share one.
template <template <Cell, class> class Pass, class T, class Call, class Body>
auto with_pass(const Call& call, const RecurrentShape& shape, void* scratch, const Body& body) {
  if (shape.cell == Cell::lstm) return body(Pass<Cell::lstm, T>(call, shape, scratch));
  if (shape.cell == Cell::gru) return body(Pass<Cell::gru, T>(call, shape, scratch));
  return body(Pass<Cell::rnn_tanh, T>(call, shape, scratch));
}

// Calls body(begin, end) for parts of the panels: on all threads where it is worth it.
template <class Body>
void each_panels(bool threads, int64_t panels, int64_t work_per_panel, const Body& body) {
  constexpr int64_t kWork = 1 << 20;  // multiplications that pay for waking a thread
  if (threads)
    parallel_for(panels, std::max<int64_t>(1, kWork / std::max<int64_t>(work_per_panel, 1)), body);
  else
    body(int64_t(0), panels);
}

}  // namespace pynn::cpu::recurrent
