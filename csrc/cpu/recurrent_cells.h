// The pointwise part of a step: from the pre-activations of some units of a row to their state, and back.
#pragma once
#include "recurrent.h"
#include "recurrent_activation.h"
#include "recurrent_tile.h"

namespace pynn::cpu::recurrent {

// What a 16-bit tensor makes of a value.
template <class T>
PYNN_HD Vec<accumulate_t<T>> rounded(Vec<accumulate_t<T>> v) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) return v;
  T values[kComputeLanes<T>];
  store_compute(values, v);
  return load_compute(values);
}

// One vector of hidden units of one row: where its values lie and how many there are. Gates are `hidden` apart.
template <class T>
struct Units {
  int64_t hidden, count;
  T* gates;                // or nullptr
  accumulate_t<T>* cells;  // or nullptr
};

// pre: i f g o. Returns the state before a projection.
template <class T, class V = Vec<accumulate_t<T>>>
PYNN_HD V lstm_forward(const accumulate_t<T>* pre, accumulate_t<T>* cell, const Units<T>& units) {
  constexpr int L = kComputeLanes<T>;
  const V i = sigmoid_of<T>(load(pre)), f = sigmoid_of<T>(load(pre + L)), g = tanh_of<T>(load(pre + 2 * L));
  const V o = sigmoid_of<T>(load(pre + 3 * L)), c = fma(f, load(cell), i * g);
  store(cell, c);
  if (units.gates) {
    store_some(units.gates, units.count, i);
    store_some(units.gates + units.hidden, units.count, f);
    store_some(units.gates + 2 * units.hidden, units.count, g);
    store_some(units.gates + 3 * units.hidden, units.count, o);
  }
  if (units.cells) store_some(units.cells, units.count, c);
  return o * tanh_of<T>(c);
}

// pre: n r z and the hidden share of n.
template <class T, class V = Vec<accumulate_t<T>>>
PYNN_HD V gru_forward(const accumulate_t<T>* pre, V previous, const Units<T>& units) {
  constexpr int L = kComputeLanes<T>;
  const V r = sigmoid_of<T>(load(pre + L)), z = sigmoid_of<T>(load(pre + 2 * L)), share = load(pre + 3 * L);
  const V n = tanh_of<T>(fma(r, share, load(pre)));
  if (units.gates) {
    store_some(units.gates, units.count, r);
    store_some(units.gates + units.hidden, units.count, z);
    store_some(units.gates + 2 * units.hidden, units.count, n);
    store_some(units.gates + 3 * units.hidden, units.count, share);
  }
  return fma(z, previous - n, n);
}

template <class T, class V = Vec<accumulate_t<T>>>
PYNN_HD V rnn_forward(V pre, bool relu) {
  return relu ? (pre < 0 ? V{} : pre) : tanh_of<T>(pre);
}

// Vectors of a row of the saved gates.
template <class T>
struct SavedGates {
  Vec<accumulate_t<T>> value[4];
  PYNN_HD SavedGates(const T* gates, int64_t hidden, int64_t count) {
    for (int v = 0; v < 4; ++v) value[v] = load_some(gates + v * hidden, count);
  }
};

// The gradients of i f g o before their activations to `to`; grad_cell goes from c[t] to c[t - 1]. Lanes past the
// count are 0, for all inputs are. Returns the hidden state o * tanh(c).
template <class T, class V = Vec<accumulate_t<T>>>
PYNN_HD V lstm_backward(V grad, const SavedGates<T>& gates, V cell, V previous, accumulate_t<T>* grad_cell,
                        accumulate_t<T>* to) {
  constexpr int L = kComputeLanes<T>;
  const V i = gates.value[0], f = gates.value[1], g = gates.value[2], o = gates.value[3], activated = tanh_of<T>(cell);
  const V d = fma(grad * o, fma(-activated, activated, V{} + 1), load(grad_cell));
  store(grad_cell, V(d * f));
  store(to, V(d * g * fma(-i, i, i)));
  store(to + L, V(d * previous * fma(-f, f, f)));
  store(to + 2 * L, V(d * i * fma(-g, g, V{} + 1)));
  store(to + 3 * L, V(grad * activated * fma(-o, o, o)));
  return o * activated;
}

// The gradients of n r z and n's hidden share to `to`. Returns the part of the gradient of h[t - 1] that skips the
// gates.
template <class T, class V = Vec<accumulate_t<T>>>
PYNN_HD V gru_backward(V grad, const SavedGates<T>& gates, V previous, accumulate_t<T>* to) {
  constexpr int L = kComputeLanes<T>;
  const V r = gates.value[0], z = gates.value[1], n = gates.value[2], share = gates.value[3];
  const V through = grad * z, d = (grad - through) * fma(-n, n, V{} + 1);
  store(to, d);
  store(to + L, V(d * share * fma(-r, r, r)));
  store(to + 2 * L, V(grad * (previous - n) * fma(-z, z, z)));
  store(to + 3 * L, V(d * r));
  return through;
}

template <class V>
PYNN_HD V rnn_backward(V grad, V state, bool relu) {
  return relu ? (state > 0 ? grad : V{}) : grad * fma(-state, state, V{} + 1);
}

}  // namespace pynn::cpu::recurrent
