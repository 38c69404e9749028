// What the recurrent kernels do with one hidden unit of one row at one step, once its sums are known: the gates, the
// next state, what backward needs; and their gradients.
//
// Time runs in steps: step s is at t = s, or at t = steps - 1 - s where the layer is reversed; backward counts from the
// other end and has one more step, in which nothing is alive and the gradients of the first states are finished. A row
// is alive at t < lengths[row]. At other steps nothing of it is read or kept, and its output is 0; so its first states
// are in both buffers of the state, and its last one is written when it is computed.
#pragma once
#include "arithmetic.cuh"
#include "recurrent.h"

namespace pynn::cuda {
namespace {
namespace recurrent {

template <class T>
__device__ __forceinline__ accumulate_t<T> sigmoid(accumulate_t<T> x) {
  if constexpr (sizeof(T) != 4) {
    return divide<T>(1, 1 + exp_of<T>(-x));  // exp may be infinite, the result is then 0
  } else {
    // To the error of exp: what 1 + e and the quotient lose is added to the result.
    const float e = expf(-x > 88 ? 88 : -x), sum = 1 + e;
    const float lost = e < 1 ? e - (sum - 1) : 1 - (sum - e), quotient = __fdividef(1, sum);
    return fma(quotient, fma(-sum, quotient, 1.0f) - lost * quotient, quotient);
  }
}
// The library's own: forms made of exp lose small results or turn large arguments into NaN.
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }

// What a kernel of one gate computes: a plain RNN, or the projection of a hidden state.
enum class Activation : int { tanh, relu, identity };

// Which rows are alive when.
struct Clock {
  int64_t steps, batch;
  const int64_t* lengths;
  bool reverse;

  __device__ __forceinline__ int64_t length(int64_t row) const {
    return row >= batch ? 0 : lengths ? max(int64_t(0), min(lengths[row], steps)) : steps;
  }
  // The time of a step forward, and of one backward.
  __device__ __forceinline__ int64_t time(int64_t step) const { return reverse ? steps - 1 - step : step; }
  __device__ __forceinline__ int64_t time_back(int64_t step) const { return reverse ? step : steps - 1 - step; }
  __device__ __forceinline__ bool alive_back(int64_t step, int64_t length) const {
    return step >= 0 && step < steps && time_back(step) < length;
  }
  // Where a row's state came from before t: a time, or -1 for the first states.
  __device__ __forceinline__ int64_t before(int64_t t, int64_t length) const {
    return reverse ? (t + 1 < length ? t + 1 : -1) : t - 1;
  }
};

// ---------------------------------------------------------------- forward

template <class T>
struct Forward {
  using A = accumulate_t<T>;
  Clock clock;
  int hidden;  // units of this kernel; the state's width where it projects
  Activation activation;
  const T* products;
  const A* bias;  // (biases_of(gates), hidden), or nullptr
  T *output, *h_n, *gates;
  A *c_n, *cells;  // c_n is the running state as well
};

// Biases of a unit: of the gates, both shares added; n of a gru has two.
__host__ __device__ constexpr int biases_of(int gates) { return gates == 3 ? 4 : gates; }

// What a unit needs beside its sums, to be loaded before they are computed. gates: 4 lstm, 3 gru, 1 rnn or projection.
template <class T, int gates>
struct Given {
  using A = accumulate_t<T>;
  bool alive;
  int64_t length;
  T x[gates];
  A c;         // lstm: the cell's state
  T previous;  // gru: the state

  // state: the unit's place in the buffer of the state.
  __device__ __forceinline__ void load(const Forward<T>& f, int64_t t, int64_t row, int unit, const T* state) {
    length = unit < f.hidden ? f.clock.length(row) : 0;
    alive = t < length;
    if (!alive) return;
    if (f.products) {
      const T* from = f.products + (t * f.clock.batch + row) * (gates * int64_t(f.hidden)) + unit;
#pragma unroll
      for (int g = 0; g < gates; ++g) x[g] = from[g * int64_t(f.hidden)];
    } else {
#pragma unroll
      for (int g = 0; g < gates; ++g) x[g] = T{};
    }
    if constexpr (gates == 4) c = f.c_n[row * f.hidden + unit];
    if constexpr (gates == 3) previous = *state;
  }
};

// Computes the unit's next state, keeps it and what backward needs. next: the unit's place in the buffer of the next
// state.
template <class T, int gates>
__device__ __forceinline__ void finish_forward(const Forward<T>& f, int64_t t, int64_t row, int unit,
                                               const Given<T, gates>& given, const accumulate_t<T> (&sum)[gates],
                                               T* next) {
  using A = accumulate_t<T>;
  if (row >= f.clock.batch || unit >= f.hidden) return;
  const int64_t hidden = f.hidden, place = t * f.clock.batch + row;
  if (!given.alive) {
    if (f.output) f.output[place * hidden + unit] = T{};
    return;
  }
  A x[gates], bias_of_hidden = 0;
#pragma unroll
  for (int g = 0; g < gates; ++g)
    x[g] = f.bias ? to_float(given.x[g]) + f.bias[g * hidden + unit] : A(to_float(given.x[g]));
  A saved[4], h;
  if constexpr (gates == 4) {
    const A i = sigmoid<T>(x[0] + sum[0]), forget = sigmoid<T>(x[1] + sum[1]), g = tanh_of(x[2] + sum[2]),
            o = sigmoid<T>(x[3] + sum[3]);
    const A c = fma(forget, given.c, i * g);
    h = o * tanh_of(c);
    f.c_n[row * hidden + unit] = c;
    if (f.cells) f.cells[place * hidden + unit] = c;
    saved[0] = i, saved[1] = forget, saved[2] = g, saved[3] = o;
  } else if constexpr (gates == 3) {
    if (f.bias) bias_of_hidden = f.bias[3 * hidden + unit];
    const A r = sigmoid<T>(x[0] + sum[0]), z = sigmoid<T>(x[1] + sum[1]), share = sum[2] + bias_of_hidden,
            n = tanh_of(fma(r, share, x[2]));
    h = fma(z, to_float(given.previous) - n, n);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = share;
  } else {
    const A a = x[0] + sum[0];
    h = f.activation == Activation::tanh ? tanh_of(a) : f.activation == Activation::relu && a <= 0 ? A(0) : a;
  }
  if constexpr (gates > 1)
    if (f.gates)
#pragma unroll
      for (int g = 0; g < 4; ++g) f.gates[place * (4 * hidden) + g * hidden + unit] = from_float<T>(saved[g]);
  const T rounded = from_float<T>(h);
  *next = rounded;
  if (!f.output) return;
  f.output[place * hidden + unit] = rounded;
  if (t == (f.clock.reverse ? 0 : given.length - 1)) f.h_n[row * hidden + unit] = rounded;
}

// ---------------------------------------------------------------- backward

// What the sums of a step are, and what is done with them: with a projection the gradient of the state comes first,
// and that of the hidden units from it.
enum class Stage : int { whole, state, hidden };

template <class T>
struct Backward {
  using A = accumulate_t<T>;
  Clock clock;
  int units;  // of this kernel: hidden, or the state's width
  Cell cell;
  Stage stage;
  const T *grad_output, *grad_h_n;
  const T *h0, *output, *gates;
  const A *c0, *cells;
  T *grad_h0, *grad_gates, *grad_states, *hiddens;
  A* grad_c;  // the running gradient of c; in the end that of c0
  A* carry;   // gru: what the gradient of h passes on beside the products
};

template <class T>
struct GivenBack {
  using A = accumulate_t<T>;
  bool alive, fresh;  // fresh: the step before was alive, its gradients are in the sums
  A dh;               // of h, without the sums
  T gate[4];
  A c, before;  // lstm: c now and before. gru: h before. rnn: h now

  __device__ __forceinline__ void load(const Backward<T>& b, int64_t step, int64_t row, int unit) {
    const int64_t length = unit < b.units ? b.clock.length(row) : 0, t = b.clock.time_back(step);
    alive = b.clock.alive_back(step, length), fresh = b.clock.alive_back(step - 1, length);
    dh = 0;
    const int64_t units = b.units, at = row * units + unit, place = (t * b.clock.batch + row) * units + unit;
    if (b.stage != Stage::hidden) {
      if (alive && b.grad_output) dh = to_float(b.grad_output[place]);
      if (alive && !fresh && b.grad_h_n) dh += to_float(b.grad_h_n[at]);
      if (fresh && b.cell == Cell::gru) dh += b.carry[at];
    }
    if (!alive || b.stage == Stage::state) return;
    if (b.cell == Cell::lstm || b.cell == Cell::gru) {
      const T* from = b.gates + (t * b.clock.batch + row) * (4 * units) + unit;
#pragma unroll
      for (int g = 0; g < 4; ++g) gate[g] = from[g * units];
    }
    const int64_t earlier = b.clock.before(t, length), earlier_place = (earlier * b.clock.batch + row) * units + unit;
    if (b.cell == Cell::lstm) {
      c = b.cells[place];
      before = earlier < 0 ? b.c0[at] : b.cells[earlier_place];
    } else if (b.cell == Cell::gru) {
      before = to_float(earlier < 0 ? b.h0[at] : b.output[earlier_place]);
    } else {
      c = to_float(b.output[place]);
    }
  }
};

// Computes the unit's gradients from those of the later step. left: the unit's place in the left operand of the next
// product, whose gates are `pitch` apart.
template <class T>
__device__ __forceinline__ void finish_backward(const Backward<T>& b, int64_t step, int64_t row, int unit,
                                                const GivenBack<T>& given, accumulate_t<T> sum, T* left, int pitch) {
  using A = accumulate_t<T>;
  if (row >= b.clock.batch || unit >= b.units) return;
  const int64_t units = b.units, at = row * units + unit;
  const A dh = given.fresh || b.stage == Stage::hidden ? given.dh + sum : given.dh;
  if (!given.alive && given.fresh && b.stage != Stage::hidden) b.grad_h0[at] = from_float<T>(dh);
  if (step == b.clock.steps) return;
  const int64_t place = b.clock.time_back(step) * b.clock.batch + row;
  if (b.stage == Stage::state) {
    const T rounded = given.alive ? from_float<T>(dh) : T{};
    b.grad_states[place * units + unit] = rounded;
    *left = rounded;
    return;
  }
  A d[4] = {}, hidden = 0;
  if (given.alive) {
    if (b.cell == Cell::lstm) {
      const A i = to_float(given.gate[0]), f = to_float(given.gate[1]), g = to_float(given.gate[2]),
              o = to_float(given.gate[3]), tanh_c = tanh_of(given.c);
      hidden = o * tanh_c;
      const A dc = fma(dh * o, fma(-tanh_c, tanh_c, A(1)), b.grad_c[at]);
      b.grad_c[at] = dc * f;
      d[0] = dc * g * (i * (1 - i));
      d[1] = dc * given.before * (f * (1 - f));
      d[2] = dc * i * fma(-g, g, A(1));
      d[3] = dh * tanh_c * (o * (1 - o));
    } else if (b.cell == Cell::gru) {
      const A r = to_float(given.gate[0]), z = to_float(given.gate[1]), n = to_float(given.gate[2]),
              share = to_float(given.gate[3]);
      b.carry[at] = dh * z;
      d[2] = dh * (1 - z) * fma(-n, n, A(1));
      d[3] = d[2] * r;
      d[0] = d[2] * share * (r * (1 - r));
      d[1] = dh * (given.before - n) * (z * (1 - z));
    } else {
      const A h = given.c;
      d[0] = b.cell == Cell::rnn_tanh ? dh * fma(-h, h, A(1)) : h > 0 ? dh : A(0);
    }
  }
  const int gradients = int(gradients_of(b.cell));
#pragma unroll
  for (int g = 0; g < 4; ++g)
    if (g < gradients) {
      const T rounded = from_float<T>(d[g]);
      b.grad_gates[place * (gradients * units) + g * units + unit] = rounded;
      // n's own gradient is none of the hidden state's.
      if (b.cell != Cell::gru)
        left[g * pitch] = rounded;
      else if (g != 2)
        left[(g == 3 ? 2 : g) * pitch] = rounded;
    }
  if (b.hiddens) b.hiddens[place * units + unit] = from_float<T>(hidden);
}

}  // namespace recurrent
}  // namespace
}  // namespace pynn::cuda
