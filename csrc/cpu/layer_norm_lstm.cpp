// One step of an LSTM with layer normalisation and its kin on the CPU: a row at a time, all of it in the first-level
// cache, a vector of units at a time. A row's sums are formed lane by lane and do not depend on other rows.
#include "layer_norm_lstm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "divide.h"
#include "normal.h"
#include "parallel.h"
#include "recurrent_activation.h"
#include "recurrent_rows.h"
#include "recurrent_schedule.h"

namespace pynn::cpu {
namespace {
using recurrent::kPanelWidth;
using recurrent::load_some;
using recurrent::store_some;

// Rows that share a row of the sums of gradients: few enough to give threads work, many enough that the sums stay in
// the cache.
constexpr int64_t kSumRows = 8;

// Calls body(begin, end, memory) for ranges of `count` items; memory is `size` elements of the calling thread's own.
template <class A, class Body>
void each_range(int64_t count, int64_t item_work, int64_t size, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(item_work, 1));
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    thread_local std::vector<A> memory;
    if (int64_t(memory.size()) < size) memory.resize(size_t(size));
    body(begin, end, memory.data());
  });
}

// Random words of the units of a row: what fraction of them survives, as factors.
template <class A>
class Mask {
 public:
  // factors[u] = dropped for the words below the rate's threshold, otherwise kept.
  static void fill(const Randomness& random, int64_t plane, int64_t row, double rate, A dropped, A kept, int64_t hidden,
                   A* factors) {
    const uint32_t threshold = threshold_of(rate);
    for (int64_t u = 0; u < hidden; u += kNormals) {
      VecUint words[4];
      philox(uint64_t(random.key[0]), random.counter(plane, row, u), words);
      for (int64_t k = 0; k < std::min<int64_t>(kNormals, hidden - u); ++k)
        factors[u + k] = words[k % 4][k / 4] < threshold ? dropped : kept;
    }
  }
};

// What a zoneout keeps of the old values of a row: the rate itself in evaluation.
template <class A>
void fill_zoneout(const Randomness& random, int64_t plane, int64_t row, double rate, bool training, int64_t hidden,
                  A* factors) {
  if (training && rate > 0)
    Mask<A>::fill(random, plane, row, rate, A(1), A(0), hidden, factors);
  else
    std::fill_n(factors, hidden, A(rate));
}

template <class A>
struct Moments {
  A mean, scale;  // 1 / standard deviation
};
// load(u, count, fill) gives a vector of the row; lanes past count are fill.
template <class A, class Load>
Moments<A> moments_of(int64_t size, double epsilon, const Load& load) {
  constexpr int64_t L = kLanes<A>;
  Vec<A> sum[2] = {}, squares[2] = {};
  for (int64_t u = 0; u < size; u += L) sum[u / L % 2] += load(u, std::min(L, size - u), A(0));
  const A mean = A(add_lanes(sum[0] + sum[1]) / double(size));
  for (int64_t u = 0; u < size; u += L) {
    const Vec<A> d = load(u, std::min(L, size - u), mean) - mean;
    squares[u / L % 2] = fma(d, d, squares[u / L % 2]);
  }
  return {mean, A(1 / std::sqrt(add_lanes(squares[0] + squares[1]) / double(size) + epsilon))};
}
template <class T>
Vec<accumulate_t<T>> load_filled(const T* from, int64_t count, accumulate_t<T> fill) {
  return count >= kComputeLanes<T> ? load_compute(from) : load_part(from, count, fill);
}
template <class T>
Moments<accumulate_t<T>> moments_of(const T* row, int64_t size, double epsilon) {
  using A = accumulate_t<T>;
  return moments_of<A>(size, epsilon,
                       [&](int64_t u, int64_t count, A fill) { return load_filled(row + u, count, fill); });
}

// A row's pre-activations without the peepholes.
template <class T, bool kNorm>
struct Shares {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const LayerNormLstmWeights<T>& w;
  const T *ih, *hh;
  Moments<A> of_ih, of_hh;

  V normed_ih(int64_t at, int64_t count) const { return (load_some(ih + at, count) - of_ih.mean) * of_ih.scale; }
  V normed_hh(int64_t at, int64_t count) const { return (load_some(hh + at, count) - of_hh.mean) * of_hh.scale; }
  V operator()(int64_t at, int64_t count) const {
    const V bias = w.bias ? load_some(w.bias + at, count) : V{};
    if constexpr (kNorm)
      return fma(normed_ih(at, count), load_some(w.norm_ih + at, count),
                 fma(normed_hh(at, count), load_some(w.norm_hh + at, count), bias));
    else
      return load_some(ih + at, count) + load_some(hh + at, count) + bias;
  }
};

// Gates of a vector of units, and the new c before zoneout.
template <class T, bool kNorm>
struct Gates {
  using V = Vec<accumulate_t<T>>;
  V i, f, g, o, fresh;
  Gates(const Shares<T, kNorm>& shares, const LayerNormLstmShape& s, V c, int64_t u, int64_t count) {
    const T* const peephole = shares.w.peephole;
    const auto seen = [&](V pre, int64_t at, V state) {
      return peephole ? fma(load_some(peephole + at + u, count), state, pre) : pre;
    };
    i = sigmoid(seen(shares(u, count), 0, c));
    f = s.coupled ? V(1 - i) : sigmoid(seen(shares(s.hidden + u, count), s.hidden, c));
    g = tanh(shares(s.cell() + u, count));
    fresh = fma(f, c, i * g);
    o = sigmoid(seen(shares(s.out() + u, count), s.out_peephole(), fresh));
  }
};

template <class T, bool kNorm>
void forward_row(const LayerNormLstmForward<T>& call, const LayerNormLstmShape& s, int64_t t, int64_t row,
                 accumulate_t<T>* memory) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t hidden = s.hidden, place = t * s.batch + row, pitch = round_up(hidden, L);
  T *const output = call.output + place * hidden, *const h = call.h + row * hidden;
  if (t >= s.length(call.lengths, row)) return void(std::fill_n(output, hidden, T{}));
  A *const c = call.c + row * hidden, *const fresh = memory, *const out = fresh + pitch, *const keep_h = out + pitch,
           *const keep_c = keep_h + pitch, *const dropout = keep_c + pitch;
  const Randomness random{call.key, s.batch, ceil_div(hidden, 4)};
  const Zoneout& zoneout = call.zoneout;
  fill_zoneout(random, Randomness::hidden_plane(t), row, zoneout.hidden, zoneout.training, hidden, keep_h);
  fill_zoneout(random, Randomness::cell_plane(t), row, zoneout.cell, zoneout.training, hidden, keep_c);
  if (call.operand)
    Mask<A>::fill(random, Randomness::dropout_plane(), row, call.dropout, A(0), A(1 / (1 - call.dropout)), hidden,
                  dropout);
  Shares<T, kNorm> shares{call.weights, call.products_ih + place * s.width(), call.products_hh + row * s.width()};
  if constexpr (kNorm) {
    shares.of_ih = moments_of(shares.ih, s.width(), call.epsilon);
    shares.of_hh = moments_of(shares.hh, s.width(), call.epsilon);
  }
  for (int64_t u = 0; u < hidden; u += L) {
    const int64_t count = std::min(L, hidden - u);
    const Gates<T, kNorm> gates(shares, s, load_some(c + u, count), u, count);
    store(fresh + u, gates.fresh);
    store(out + u, gates.o);
  }
  Moments<A> of_cell{};
  if constexpr (kNorm) {
    of_cell = moments_of(fresh, hidden, call.epsilon);
    if (call.statistics) {
      A* const to = call.statistics + place * kStatistics;
      to[kMeanIh] = shares.of_ih.mean, to[kScaleIh] = shares.of_ih.scale;
      to[kMeanHh] = shares.of_hh.mean, to[kScaleHh] = shares.of_hh.scale;
      to[kMeanCell] = of_cell.mean, to[kScaleCell] = of_cell.scale;
    }
  }
  for (int64_t u = 0; u < hidden; u += L) {
    const int64_t count = std::min(L, hidden - u);
    V seen = load(fresh + u);
    const V old_c = load_some(c + u, count), kept_c = load_some(keep_c + u, count),
            new_c = fma(kept_c, old_c, (1 - kept_c) * seen);
    if constexpr (kNorm) {
      seen = (seen - of_cell.mean) * of_cell.scale * load_some(call.weights.norm_cell + u, count);
      if (call.weights.norm_cell_bias) seen += load_some(call.weights.norm_cell_bias + u, count);
    }
    const V kept_h = load_some(keep_h + u, count),
            new_h = fma(kept_h, load_some(h + u, count), (1 - kept_h) * (load(out + u) * tanh(seen)));
    store_some(c + u, count, new_c);
    if (call.cells) store_some(call.cells + place * hidden + u, count, new_c);
    store_some(h + u, count, new_h);
    store_some(output + u, count, new_h);
    if (call.operand)
      store_some(call.operand + row * hidden + u, count, V(load_some(h + u, count) * load_some(dropout + u, count)));
  }
}

// Adds to a vector of the sums of a gradient that is wanted.
template <class V, class A>
void add_to(A* sums, int64_t place, int64_t at, int64_t count, V value) {
  if (place < 0) return;
  A* const to = sums + place + at;
  store_some(to, count, V(load_some(to, count) + value));
}

template <class T, bool kNorm>
void backward_row(const LayerNormLstmBackward<T>& call, const LayerNormLstmShape& s, const LayerNormLstmSums& places,
                  int64_t t, int64_t row, accumulate_t<T>* sums, accumulate_t<T>* memory) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t hidden = s.hidden, width = s.width(), place = t * s.batch + row, pitch = round_up(hidden, L);
  const int64_t length = s.length(call.lengths, row);
  A *const grad_h = call.grad_h + row * hidden, *const grad_c = call.grad_c + row * hidden;
  A *const keep_h = memory, *const keep_c = keep_h + pitch, *const dropout = keep_c + pitch,
           *const fresh = dropout + pitch, *const to_fresh = fresh + pitch, *const to_normed = to_fresh + pitch,
           *const d = to_normed + pitch;  // d: the gates, then their gradients, one after the other
  const Randomness random{call.key, s.batch, ceil_div(hidden, 4)};
  // What the product of the later step says of h.
  if (call.grad_operand) {
    if (call.dropout > 0)
      Mask<A>::fill(random, Randomness::dropout_plane(), row, call.dropout, A(0), A(1 / (1 - call.dropout)), hidden,
                    dropout);
    else
      std::fill_n(dropout, hidden, A(1));
    for (int64_t u = 0; u < hidden; u += L) {
      const int64_t count = std::min(L, hidden - u);
      const V operand = load_some(call.grad_operand + row * hidden + u, count);
      store_some(grad_h + u, count, fma(operand, load_some(dropout + u, count), load_some(grad_h + u, count)));
    }
  }
  if (t < 0) return;
  T *const grad_ih = call.grad_ih + place * width, *const grad_hh = call.grad_hh + place * width;
  if (t >= length) {
    std::fill_n(grad_ih, width, T{});
    return void(std::fill_n(grad_hh, width, T{}));
  }
  const Zoneout& zoneout = call.zoneout;
  fill_zoneout(random, Randomness::hidden_plane(t), row, zoneout.hidden, zoneout.training, hidden, keep_h);
  fill_zoneout(random, Randomness::cell_plane(t), row, zoneout.cell, zoneout.training, hidden, keep_c);
  const int64_t before = s.before(t, length);
  const A* const c = before < 0 ? call.c0 + row * hidden : call.cells + (before * s.batch + row) * hidden;
  const LayerNormLstmWeights<T>& w = call.weights;
  Shares<T, kNorm> shares{w, call.products_ih + place * width, call.products_hh + place * width};
  Moments<A> of_cell{};
  if constexpr (kNorm) {
    const A* const from = call.statistics + place * kStatistics;
    shares.of_ih = {from[kMeanIh], from[kScaleIh]};
    shares.of_hh = {from[kMeanHh], from[kScaleHh]};
    of_cell = {from[kMeanCell], from[kScaleCell]};
  }
  const auto normed_cell = [&](V value) { return V((value - of_cell.mean) * of_cell.scale); };
  // Down to the new c, but for what the norm's mean and scale pass on: that takes two sums over the row.
  V sum{}, product_sum{};
  for (int64_t u = 0; u < hidden; u += L) {
    const int64_t count = std::min(L, hidden - u);
    const Gates<T, kNorm> gates(shares, s, load_some(c + u, count), u, count);
    V seen = gates.fresh;
    if constexpr (kNorm) {
      seen = normed_cell(seen) * load_some(w.norm_cell + u, count);
      if (w.norm_cell_bias) seen += load_some(w.norm_cell_bias + u, count);
    }
    const V tanh_c = tanh(seen), kept_h = load_some(keep_h + u, count), kept_c = load_some(keep_c + u, count);
    V dh = load_some(grad_h + u, count);
    if (call.grad_output) dh += load_some(call.grad_output + place * hidden + u, count);
    store_some(grad_h + u, count, V(dh * kept_h));
    dh = dh * (1 - kept_h);
    const V dc = load_some(grad_c + u, count);
    store_some(grad_c + u, count, V(dc * kept_c));
    const V to_out = dh * tanh_c * fma(-gates.o, gates.o, gates.o);
    const V to_seen = dh * gates.o * fma(-tanh_c, tanh_c, V{} + 1);
    V to_c = dc * (1 - kept_c);
    if (w.peephole) {
      to_c = fma(to_out, load_some(w.peephole + s.out_peephole() + u, count), to_c);
      add_to(sums, places.peephole, s.out_peephole() + u, count, V(to_out * gates.fresh));
    }
    if constexpr (kNorm) {
      const V hat = normed_cell(gates.fresh), to_hat = to_seen * load_some(w.norm_cell + u, count);
      add_to(sums, places.norm_cell, u, count, V(to_seen * hat));
      add_to(sums, places.norm_cell_bias, u, count, to_seen);
      sum += to_hat;  // 0 in the lanes past the row's end, as grad_output and grad_h are there
      product_sum = fma(to_hat, hat, product_sum);
      store(to_normed + u, to_hat);
    } else {
      to_c += to_seen;
    }
    store(fresh + u, gates.fresh);
    store(to_fresh + u, to_c);
    store(d + u, gates.i);
    if (!s.coupled) store(d + pitch + u, gates.f);
    store(d + (s.gates() - 2) * pitch + u, gates.g);
    store(d + (s.gates() - 1) * pitch + u, to_out);
  }
  const A mean = A(add_lanes(sum) / double(hidden)), product_mean = A(add_lanes(product_sum) / double(hidden));
  // The gradients of the pre-activations, and the sums that the norms of the shares take.
  V sum_ih{}, product_ih{}, sum_hh{}, product_hh{};
  const auto finish = [&](int64_t gate, int64_t u, int64_t count, V grad) {
    const int64_t at = gate * hidden + u;
    add_to(sums, places.bias, at, count, grad);
    if constexpr (kNorm) {
      const V ih = shares.normed_ih(at, count), hh = shares.normed_hh(at, count);
      add_to(sums, places.norm_ih, at, count, V(grad * ih));
      add_to(sums, places.norm_hh, at, count, V(grad * hh));
      const V to_ih = grad * load_some(w.norm_ih + at, count), to_hh = grad * load_some(w.norm_hh + at, count);
      sum_ih += to_ih, product_ih = fma(to_ih, ih, product_ih);
      sum_hh += to_hh, product_hh = fma(to_hh, hh, product_hh);
      store(d + gate * pitch + u, grad);
    } else {
      store_some(grad_ih + at, count, grad);
    }
  };
  for (int64_t u = 0; u < hidden; u += L) {
    const int64_t count = std::min(L, hidden - u);
    V dc = load(to_fresh + u);
    if constexpr (kNorm)
      dc = fma(load(to_normed + u) - mean - normed_cell(load(fresh + u)) * product_mean, V{} + of_cell.scale, dc);
    const V old = load_some(c + u, count), i = load(d + u), f = s.coupled ? V(1 - i) : load(d + pitch + u),
            g = load(d + (s.gates() - 2) * pitch + u);
    const V to_i = dc * (s.coupled ? V(g - old) : g) * fma(-i, i, i), to_f = dc * old * fma(-f, f, f);
    V to_old = fma(dc, f, load_some(grad_c + u, count));
    const auto peephole = [&](int64_t first, V grad) {
      to_old = fma(grad, load_some(w.peephole + first + u, count), to_old);
      add_to(sums, places.peephole, first + u, count, V(grad * old));
    };
    if (w.peephole) {
      peephole(0, to_i);
      if (!s.coupled) peephole(hidden, to_f);
    }
    store_some(grad_c + u, count, to_old);
    finish(0, u, count, to_i);
    if (!s.coupled) finish(1, u, count, to_f);
    finish(s.gates() - 2, u, count, V(dc * i * fma(-g, g, V{} + 1)));
    finish(s.gates() - 1, u, count, load(d + (s.gates() - 1) * pitch + u));
  }
  if constexpr (kNorm) {
    const auto mean_of = [&](V value) { return A(add_lanes(value) / double(width)); };
    const A mean_ih = mean_of(sum_ih), product_mean_ih = mean_of(product_ih), mean_hh = mean_of(sum_hh),
            product_mean_hh = mean_of(product_hh);
    for (int64_t gate = 0; gate < s.gates(); ++gate)
      for (int64_t u = 0; u < hidden; u += L) {
        const int64_t count = std::min(L, hidden - u), at = gate * hidden + u;
        const V grad = load(d + gate * pitch + u);
        const V to_ih = fma(grad, load_some(w.norm_ih + at, count), V{} - mean_ih);
        const V to_hh = fma(grad, load_some(w.norm_hh + at, count), V{} - mean_hh);
        store_some(grad_ih + at, count,
                   V(fma(shares.normed_ih(at, count), V{} - product_mean_ih, to_ih) * shares.of_ih.scale));
        store_some(grad_hh + at, count,
                   V(fma(shares.normed_hh(at, count), V{} - product_mean_hh, to_hh) * shares.of_hh.scale));
      }
  }
}

// Rows of a product that are finished at a time, on the stack.
constexpr int64_t kProductRows = 48;

// out (rows, columns) = left (rows, depth) times the packed panels; `wide` has room for left in the compute type.
template <class T, class Out>
void multiply_packed(const T* left, int64_t rows, int64_t depth, int64_t columns, const accumulate_t<T>* packed,
                     accumulate_t<T>* wide, Out* out) {
  using A = accumulate_t<T>;
  constexpr int64_t L = kLanes<A>, W = kPanelWidth<A>;
  const A* operand;
  if constexpr (std::is_same_v<T, A>) {
    operand = left;
  } else {
    parallel_for(ceil_div(rows * depth, L), 1 << 12, [&](int64_t begin, int64_t end) {
      recurrent::convert(left + begin * L, std::min(end * L, rows * depth) - begin * L, wide + begin * L);
    });
    operand = wide;
  }
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / (rows * depth * W));
  parallel_for(ceil_div(columns, W), grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t first = 0; first < rows; first += kProductRows) {
        const int64_t count = std::min(kProductRows, rows - first);
        alignas(64) A sums[kProductRows * W];
        std::fill_n(sums, count * W, A(0));
        recurrent::multiply<recurrent::kPanelVectors>(recurrent::LeftRows<A>{operand + first * depth, depth, 1, 1},
                                                      depth, packed + p * depth * W, count, sums, W);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t n = 0; n < W && p * W + n < columns; n += L)
            store_some(out + (first + r) * columns + p * W + n, columns - p * W - n, load(sums + r * W + n));
      }
  });
}

// A panel of the transpose of w, (rows, depth): to[k][v * L + lane] = w[first[v] + lane][k].
template <class T>
void pack_transposed(const T* w, int64_t depth, const recurrent::PanelRows& rows, accumulate_t<T>* to) {
  constexpr int L = kComputeLanes<T>;
  for (int v = 0; v < recurrent::kPanelVectors; ++v)
    for (int64_t k = 0; k < depth; k += L) {
      Vec<accumulate_t<T>> x[L];
      recurrent::load_transposed(w + rows.first[v] * depth, depth, rows.count[v], k, x);
      for (int64_t j = 0; j < std::min<int64_t>(L, depth - k); ++j)
        store(to + (k + j) * kPanelWidth<accumulate_t<T>> + v * L, x[j]);
    }
}

// Elements of the panels of weight_hh for products with `columns` columns.
template <class A>
int64_t panels_size(int64_t depth, int64_t columns) {
  return ceil_div(columns, kPanelWidth<A>) * depth * kPanelWidth<A>;
}

}  // namespace

template <class T>
int64_t LayerNormLstm<T>::packed_size(const LayerNormLstmShape& s) {
  const int64_t panels = std::max(panels_size<A>(s.hidden, s.width()), panels_size<A>(s.width(), s.hidden));
  return panels + round_up(s.batch * s.width(), kLanes<A>);
}

template <class T>
void LayerNormLstm<T>::pack(const T* weight_hh, const LayerNormLstmShape& s, bool backward, A* packed) {
  constexpr int64_t W = kPanelWidth<A>;
  const int64_t depth = backward ? s.width() : s.hidden, columns = backward ? s.hidden : s.width();
  parallel_for(ceil_div(columns, W), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      A* const to = packed + p * depth * W;
      if (backward)
        for (int64_t k = 0; k < depth; ++k)
          recurrent::pack_row(weight_hh + k * s.hidden + p * W, s.hidden - p * W, to + k * W);
      else
        pack_transposed(weight_hh, depth, recurrent::plain_rows<A>(p, columns), to);
    }
  });
}

template <class T>
void LayerNormLstm<T>::multiply(const T* operand, const LayerNormLstmShape& s, A* packed, T* out) {
  multiply_packed(operand, s.batch, s.hidden, s.width(), packed, packed + panels_size<A>(s.hidden, s.width()), out);
}

template <class T>
void LayerNormLstm<T>::multiply_back(const T* grad, const LayerNormLstmShape& s, A* packed, A* out) {
  multiply_packed(grad, s.batch, s.width(), s.hidden, packed, packed + panels_size<A>(s.width(), s.hidden), out);
}

template <class T>
void LayerNormLstm<T>::drop(const T* h, T* out, int64_t steps, const int64_t* key, double rate,
                            const LayerNormLstmShape& s, void*) {
  constexpr int64_t L = kLanes<A>;
  const Randomness random{key, s.batch, ceil_div(s.hidden, 4)};
  each_range<A>(s.batch, steps * s.hidden, round_up(s.hidden, L), [&](int64_t begin, int64_t end, A* factors) {
    for (int64_t row = begin; row < end; ++row) {
      Mask<A>::fill(random, Randomness::dropout_plane(), row, rate, A(0), A(1 / (1 - rate)), s.hidden, factors);
      for (int64_t t = 0; t < steps; ++t)
        for (int64_t u = 0, at = (t * s.batch + row) * s.hidden; u < s.hidden; u += L) {
          const int64_t count = std::min(L, s.hidden - u);
          store_some(out + at + u, count, Vec<A>(load_some(h + at + u, count) * load_some(factors + u, count)));
        }
    }
  });
}

template <class T>
void LayerNormLstm<T>::fwd(const LayerNormLstmForward<T>& call, const LayerNormLstmShape& s, int64_t t, A*, void*) {
  const auto row = s.norm ? &forward_row<T, true> : &forward_row<T, false>;
  each_range<A>(s.batch, 8 * s.hidden, 5 * round_up(s.hidden, kLanes<A>), [&](int64_t begin, int64_t end, A* memory) {
    for (int64_t b = begin; b < end; ++b) row(call, s, t, b, memory);
  });
}

template <class T>
void LayerNormLstm<T>::bwd(const LayerNormLstmBackward<T>& call, const LayerNormLstmShape& s, int64_t t, A*, void*) {
  const auto row = s.norm ? &backward_row<T, true> : &backward_row<T, false>;
  const auto places = LayerNormLstmSums::of(s, call.weights);
  const int64_t size = (6 + s.gates()) * round_up(s.hidden, kLanes<A>);
  each_range<A>(sum_rows(s), 20 * kSumRows * s.hidden, size + places.width, [&](int64_t begin, int64_t end, A* memory) {
    // A step's sums are added to those of the other steps once: short chains of additions, and little rounding.
    A* const sums = memory + size;
    for (int64_t group = begin; group < end; ++group) {
      std::fill_n(sums, places.width, A(0));
      for (int64_t b = group * kSumRows; b < std::min((group + 1) * kSumRows, s.batch); ++b)
        row(call, s, places, t, b, sums, memory);
      A* const to = call.sums + group * places.width;
      for (int64_t at = 0; at < places.width; ++at) to[at] += sums[at];
    }
  });
}

template <class T>
int64_t LayerNormLstm<T>::scratch_size(const LayerNormLstmShape&, bool) {
  return 0;  // each thread has its own
}

template <class T>
int64_t LayerNormLstm<T>::sum_rows(const LayerNormLstmShape& s) {
  return ceil_div(s.batch, kSumRows);
}

template struct LayerNormLstm<double>;
template struct LayerNormLstm<float>;
template struct LayerNormLstm<Half>;
template struct LayerNormLstm<BFloat16>;

}  // namespace pynn::cpu
