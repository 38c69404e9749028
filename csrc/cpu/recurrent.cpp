// Recurrent layers step by step, row by row, every sum in double. See csrc/include/recurrent.h.
#include "recurrent.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace pynn::cpu {
namespace {

using Row = std::vector<double>;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <class T>
double load(T v) {
  return double(to_float(v));
}
template <class T>
T store(double v) {
  return from_float<T>(accumulate_t<T>(v));
}
template <class T>
double rounded(double v) {
  return load(store<T>(v));
}

int64_t alive(const int64_t* lengths, int64_t b, int64_t steps) {
  return lengths ? std::clamp<int64_t>(lengths[b], 0, steps) : steps;
}

// sum of weight[row, :] * x
template <class T, class X>
double dot(const T* weight, const X* x, int64_t count) {
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += load(weight[k]) * load(x[k]);
  return sum;
}

template <class T>
void forward_row(const RecurrentForward<T>& call, const RecurrentShape& s, int64_t b) {
  using A = accumulate_t<T>;
  const int64_t hidden = s.hidden, rows = gates_of(s.cell) * hidden, saved = saved_of(s.cell) * hidden;
  const int64_t length = alive(call.lengths, b, s.steps);
  const RecurrentWeights<T>& w = call.weights;
  Row h(s.state), c(hidden), x(rows), r(rows), m(hidden);
  for (int64_t j = 0; j < s.state; ++j) h[j] = load(call.h0[b * s.state + j]);
  if (call.c0)
    for (int64_t j = 0; j < hidden; ++j) c[j] = call.c0[b * hidden + j];
  for (int64_t i = 0; i < s.steps; ++i) {
    const int64_t t = s.reverse ? s.steps - 1 - i : i, at = t * s.batch + b;
    T* out = call.output + at * s.state;
    if (t >= length) {
      for (int64_t j = 0; j < s.state; ++j) out[j] = store<T>(0);
      continue;
    }
    for (int64_t j = 0; j < rows; ++j) {
      x[j] = call.products ? load(call.products[at * rows + j])
                           : dot(w.ih + j * s.input, call.input + at * s.input, s.input);
      if (w.bias_ih) x[j] += load(w.bias_ih[j]);
      r[j] = dot(w.hh + j * s.state, h.data(), s.state);
      if (w.bias_hh) r[j] += load(w.bias_hh[j]);
    }
    T* gates = call.gates ? call.gates + at * saved : nullptr;
    for (int64_t j = 0; j < hidden; ++j) {
      if (s.cell == Cell::lstm) {
        const double in = sigmoid(x[j] + r[j]), forget = sigmoid(x[hidden + j] + r[hidden + j]);
        const double g = std::tanh(x[2 * hidden + j] + r[2 * hidden + j]);
        const double o = sigmoid(x[3 * hidden + j] + r[3 * hidden + j]);
        c[j] = A(forget * c[j] + in * g);
        m[j] = rounded<T>(o * std::tanh(c[j]));
        if (gates) gates[j] = store<T>(in), gates[hidden + j] = store<T>(forget);
        if (gates) gates[2 * hidden + j] = store<T>(g), gates[3 * hidden + j] = store<T>(o);
        if (call.cells) call.cells[at * hidden + j] = A(c[j]);
      } else if (s.cell == Cell::gru) {
        const double reset = sigmoid(x[j] + r[j]), z = sigmoid(x[hidden + j] + r[hidden + j]);
        const double n = std::tanh(x[2 * hidden + j] + reset * r[2 * hidden + j]);
        m[j] = rounded<T>((1 - z) * n + z * h[j]);
        if (gates) gates[j] = store<T>(reset), gates[hidden + j] = store<T>(z);
        if (gates) gates[2 * hidden + j] = store<T>(n), gates[3 * hidden + j] = store<T>(r[2 * hidden + j]);
      } else {
        m[j] = rounded<T>(s.cell == Cell::rnn_tanh ? std::tanh(x[j] + r[j]) : std::max(0.0, x[j] + r[j]));
      }
    }
    if (w.hr)
      for (int64_t j = 0; j < s.state; ++j) h[j] = rounded<T>(dot(w.hr + j * hidden, m.data(), hidden));
    else
      h = m;
    for (int64_t j = 0; j < s.state; ++j) out[j] = store<T>(h[j]);
  }
  for (int64_t j = 0; j < s.state; ++j) call.h_n[b * s.state + j] = store<T>(h[j]);
  if (call.c_n)
    for (int64_t j = 0; j < hidden; ++j) call.c_n[b * hidden + j] = A(c[j]);
}

// Sums of the weight gradients, in double.
struct Sums {
  Row ih, hh, bias_ih, bias_hh, hr;
};

template <class T>
void backward_row(const RecurrentBackward<T>& call, const RecurrentShape& s, int64_t b, Sums& sums) {
  using A = accumulate_t<T>;
  const int64_t hidden = s.hidden, rows = gates_of(s.cell) * hidden, saved = saved_of(s.cell) * hidden;
  const int64_t length = alive(call.lengths, b, s.steps), width = call.weights.ih ? s.input : rows;
  const RecurrentWeights<T>& w = call.weights;
  Row dh(s.state), dc(hidden), dx(rows), dr(rows), dm(hidden), m(hidden), before(s.state), carried(s.state);
  if (call.grad_h_n)
    for (int64_t j = 0; j < s.state; ++j) dh[j] = load(call.grad_h_n[b * s.state + j]);
  if (call.grad_c_n)
    for (int64_t j = 0; j < hidden; ++j) dc[j] = call.grad_c_n[b * hidden + j];
  for (int64_t i = s.steps - 1; i >= 0; --i) {
    const int64_t t = s.reverse ? s.steps - 1 - i : i, at = t * s.batch + b;
    if (t >= length) {
      if (call.grad_input)
        for (int64_t k = 0; k < width; ++k) call.grad_input[at * width + k] = store<T>(0);
      continue;
    }
    const bool first = s.reverse ? t + 1 == length : t == 0;
    const int64_t previous = (s.reverse ? t + 1 : t - 1) * s.batch + b;
    for (int64_t j = 0; j < s.state; ++j) {
      before[j] = first ? load(call.h0[b * s.state + j]) : load(call.output[previous * s.state + j]);
      if (call.grad_output) dh[j] += load(call.grad_output[at * s.state + j]);
      carried[j] = 0;
    }
    const T* gates = call.gates ? call.gates + at * saved : nullptr;
    for (int64_t j = 0; j < hidden; ++j) {
      dm[j] = w.hr ? 0 : dh[j];
      if (w.hr)
        for (int64_t k = 0; k < s.state; ++k) dm[j] += dh[k] * load(w.hr[k * hidden + j]);
      if (s.cell == Cell::lstm) {
        const double in = load(gates[j]), forget = load(gates[hidden + j]), g = load(gates[2 * hidden + j]);
        const double o = load(gates[3 * hidden + j]), tanh_c = std::tanh(double(call.cells[at * hidden + j]));
        const double c = first ? call.c0[b * hidden + j] : call.cells[previous * hidden + j];
        m[j] = rounded<T>(o * tanh_c);
        dc[j] += dm[j] * o * (1 - tanh_c * tanh_c);
        dx[j] = dc[j] * g * in * (1 - in), dx[hidden + j] = dc[j] * c * forget * (1 - forget);
        dx[2 * hidden + j] = dc[j] * in * (1 - g * g), dx[3 * hidden + j] = dm[j] * tanh_c * o * (1 - o);
        dc[j] *= forget;
      } else if (s.cell == Cell::gru) {
        const double r = load(gates[j]), z = load(gates[hidden + j]), n = load(gates[2 * hidden + j]);
        const double share = load(gates[3 * hidden + j]), dn = dm[j] * (1 - z) * (1 - n * n);
        dx[j] = dn * share * r * (1 - r), dx[hidden + j] = dm[j] * (before[j] - n) * z * (1 - z);
        dx[2 * hidden + j] = dn, dr[2 * hidden + j] = dn * r;
        carried[j] = dm[j] * z;
      } else {
        const double h = load(call.output[at * s.state + j]);
        dx[j] = s.cell == Cell::rnn_tanh ? dm[j] * (1 - h * h) : h > 0 ? dm[j] : 0;
      }
    }
    for (int64_t j = 0; j < rows; ++j)
      if (s.cell != Cell::gru || j < 2 * hidden) dr[j] = dx[j];
    for (int64_t j = 0; j < rows; ++j) {
      for (int64_t k = 0; k < s.state; ++k) {
        carried[k] += dr[j] * load(w.hh[j * s.state + k]);
        sums.hh[j * s.state + k] += dr[j] * before[k];
      }
      sums.bias_ih[j] += dx[j], sums.bias_hh[j] += dr[j];
      for (int64_t k = 0; w.ih && k < s.input; ++k)
        sums.ih[j * s.input + k] += dx[j] * load(call.input[at * s.input + k]);
    }
    if (w.hr)
      for (int64_t k = 0; k < s.state; ++k)
        for (int64_t j = 0; j < hidden; ++j) sums.hr[k * hidden + j] += dh[k] * m[j];
    for (int64_t k = 0; call.grad_input && k < width; ++k) {
      double sum = w.ih ? 0 : dx[k];
      for (int64_t j = 0; w.ih && j < rows; ++j) sum += dx[j] * load(w.ih[j * s.input + k]);
      call.grad_input[at * width + k] = store<T>(sum);
    }
    dh = carried;
  }
  for (int64_t j = 0; j < s.state; ++j) call.grad_h0[b * s.state + j] = store<T>(dh[j]);
  if (call.grad_c0)
    for (int64_t j = 0; j < hidden; ++j) call.grad_c0[b * hidden + j] = A(dc[j]);
}

template <class T>
void put(const Row& sums, T* out) {
  for (size_t k = 0; out && k < sums.size(); ++k) out[k] = store<T>(sums[k]);
}

}  // namespace

template <class T>
int64_t Recurrent<T>::fwd_scratch(const RecurrentShape&) {
  return 0;
}
template <class T>
int64_t Recurrent<T>::bwd_scratch(const RecurrentShape&) {
  return 0;
}

template <class T>
void Recurrent<T>::fwd(const RecurrentForward<T>& call, const RecurrentShape& shape, void*, void*) {
  parallel_for(shape.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) forward_row(call, shape, b);
  });
}

template <class T>
void Recurrent<T>::bwd(const RecurrentBackward<T>& call, const RecurrentShape& shape, void*, void*) {
  const int64_t rows = gates_of(shape.cell) * shape.hidden;
  Sums sums{Row(rows * shape.input), Row(rows * shape.state), Row(rows), Row(rows), Row(shape.state * shape.hidden)};
  for (int64_t b = 0; b < shape.batch; ++b) backward_row(call, shape, b, sums);
  put(sums.ih, call.grad_weight_ih);
  put(sums.hh, call.grad_weight_hh);
  put(sums.bias_ih, call.grad_bias_ih);
  put(sums.bias_hh, call.grad_bias_hh);
  put(sums.hr, call.grad_weight_hr);
}

template struct Recurrent<float>;
template struct Recurrent<double>;
template struct Recurrent<Half>;
template struct Recurrent<BFloat16>;

}  // namespace pynn::cpu
