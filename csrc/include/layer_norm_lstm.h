// An LSTM of one direction with any of: layer normalisation (Ba, Kiros, Hinton 2016), peepholes (Gers, Schmidhuber
// 2000), coupled input and forget gates (Greff et al. 2015), zoneout (Krueger et al. 2016), dropout of the state with
// one mask for all steps (Gal, Ghahramani 2016). One step, everything but its product with weight_hh.
//
//   p = norm(x[t] weight_ih^T) + norm(d * h[t-1] weight_hh^T) + bias          d: the mask of the dropout over 1 - rate
//   i = sigmoid(p_i + w_i * c[t-1]),  f = sigmoid(p_f + w_f * c[t-1]) or 1 - i,  g = tanh(p_g)
//   new = f * c[t-1] + i * g,  o = sigmoid(p_o + w_o * new),  h' = o * tanh(norm(new))
//   c[t] = z_c * c[t-1] + (1 - z_c) * new,  h[t] = z_h * h[t-1] + (1 - z_h) * h'
//
// norm is over all gates of a row together, or the identity; c itself is carried without it. z is a random 0 or 1 in
// training and the rate in evaluation. Gate rows are i f g o, or i g o where gates are coupled; peephole rows i f o, or
// i o. Every tensor is contiguous and time-major: (steps, batch, ...).
//
// The random words have one counter per four neighbouring units of a row: planes of (batch, ceil(hidden / 4)) counters,
// the first for the dropout, then two for each step t, of h and of c.
#pragma once
#include "dtype.h"
#include "philox.h"

namespace pynn {

struct LayerNormLstmShape {
  int64_t steps, batch, input, hidden;
  bool coupled;  // f = 1 - i
  bool norm, reverse;
  PYNN_HD int64_t gates() const { return coupled ? 3 : 4; }
  PYNN_HD int64_t width() const { return gates() * hidden; }
  // Where the rows of g and of o begin; those of i begin at 0, of f at hidden.
  PYNN_HD int64_t cell() const { return (gates() - 2) * hidden; }
  PYNN_HD int64_t out() const { return (gates() - 1) * hidden; }
  // The same of o's peephole.
  PYNN_HD int64_t out_peephole() const { return (gates() - 2) * hidden; }
  // The time where a row's state came from before t, or -1 for the first states; length: the row's steps.
  PYNN_HD int64_t before(int64_t t, int64_t length) const { return reverse ? (t + 1 < length ? t + 1 : -1) : t - 1; }
  PYNN_HD int64_t length(const int64_t* lengths, int64_t row) const {
    if (!lengths) return steps;
    return lengths[row] < 0 ? 0 : lengths[row] > steps ? steps : lengths[row];
  }
};

template <class T>
struct LayerNormLstmWeights {
  const T* bias;            // (gates * hidden) or nullptr
  const T* norm_ih;         // (gates * hidden), the gain of the input's share; the norm's three or none
  const T* norm_hh;         // (gates * hidden), of the state's
  const T* norm_cell;       // (hidden)
  const T* norm_cell_bias;  // (hidden) or nullptr
  const T* peephole;        // ((gates - 1) * hidden) or nullptr
};

// Statistics of a row: mean and 1 / standard deviation of the input's share, the state's, and of the new c.
enum : int { kMeanIh, kScaleIh, kMeanHh, kScaleHh, kMeanCell, kScaleCell, kStatistics };

struct Zoneout {
  double hidden, cell;  // rates
  bool training;
};

// A word below it is dropped.
inline uint32_t threshold_of(double rate) { return uint32_t(rate * 4294967296.0); }

struct Randomness {
  const int64_t* key;     // (2): seed, offset; nullptr where nothing is random
  int64_t batch, groups;  // rows, and groups of four units: ceil(hidden / 4)

  PYNN_HD uint64_t counter(int64_t plane, int64_t row, int64_t unit) const {
    return uint64_t(key[1]) + uint64_t((plane * batch + row) * groups + unit / 4);
  }
  PYNN_HD static int64_t dropout_plane() { return 0; }
  PYNN_HD static int64_t hidden_plane(int64_t t) { return 1 + 2 * t; }
  PYNN_HD static int64_t cell_plane(int64_t t) { return 2 + 2 * t; }
};

template <class T>
struct LayerNormLstmForward {
  using A = accumulate_t<T>;
  LayerNormLstmWeights<T> weights;
  const T* products_ih;    // (steps, batch, gates * hidden): weight_ih x
  const T* products_hh;    // (batch, gates * hidden): weight_hh of the operand, of this step
  const int64_t* lengths;  // (batch), or nullptr for all steps; values outside 0..steps count as the nearer end
  const int64_t* key;      // (2) or nullptr
  double epsilon, dropout;
  Zoneout zoneout;
  T* output;   // (steps, batch, hidden), 0 where a row is not alive
  T* h;        // (batch, hidden), running
  A* c;        // (batch, hidden), running
  T* operand;  // (batch, hidden): what the next product takes, h after the dropout; nullptr where that is h
  // What backward needs, or nullptr; undefined where a row is not alive.
  A* cells;       // (steps, batch, hidden): c[t]
  A* statistics;  // (steps, batch, kStatistics), with the norm
};

template <class T>
struct LayerNormLstmBackward {
  using A = accumulate_t<T>;
  LayerNormLstmWeights<T> weights;
  const T* grad_output;                // (steps, batch, hidden) or nullptr
  const T *products_ih, *products_hh;  // (steps, batch, gates * hidden)
  const A *c0, *cells, *statistics;
  const int64_t *lengths, *key;
  double dropout;
  Zoneout zoneout;
  const A* grad_operand;  // (batch, hidden): of the operand of the later step's product; nullptr: no later step
  A *grad_h, *grad_c;     // (batch, hidden), running: gradients of h but for grad_operand, and of c
  T *grad_ih,
      *grad_hh;  // (steps, batch, gates * hidden): of the products, 0 where a row is not alive; one without norm
  // (sum_rows, sums_width): gradients of the weights are sums of its rows; in the order of the weights, each present
  // or not; 0 at first.
  A* sums;
};

// Places of the sums of gradients in a row, and its width; -1 for what is absent.
struct LayerNormLstmSums {
  int64_t bias, norm_ih, norm_hh, norm_cell, norm_cell_bias, peephole, width;

  PYNN_HD static LayerNormLstmSums of(const LayerNormLstmShape& s, bool bias, bool norm_cell_bias, bool peephole) {
    LayerNormLstmSums sums{};
    const auto place = [&](bool present, int64_t count) {
      const int64_t at = sums.width;
      sums.width += present ? count : 0;
      return present ? at : -1;
    };
    sums.bias = place(bias, s.width());
    sums.norm_ih = place(s.norm, s.width());
    sums.norm_hh = place(s.norm, s.width());
    sums.norm_cell = place(s.norm, s.hidden);
    sums.norm_cell_bias = place(norm_cell_bias, s.hidden);
    sums.peephole = place(peephole, s.width() - s.hidden);
    return sums;
  }
  template <class T>
  PYNN_HD static LayerNormLstmSums of(const LayerNormLstmShape& s, const LayerNormLstmWeights<T>& w) {
    return of(s, w.bias, w.norm_cell_bias, w.peephole);
  }
};

}  // namespace pynn

namespace pynn::PYNN_LAUNCH_NAMESPACE {

template <class T>
struct LayerNormLstm {
  using A = accumulate_t<T>;
#if defined(PYNN_CUDA) || defined(PYNN_SIM)
  static constexpr bool kProducts = false;  // the caller makes the products with weight_hh
#else
  static constexpr bool kProducts = true;
  // Elements that `pack` writes and the products use besides; of a pass forward or backward.
  static int64_t packed_size(const LayerNormLstmShape& shape);
  static void pack(const T* weight_hh, const LayerNormLstmShape& shape, bool backward, A* packed);
  // out (batch, gates * hidden) = weight_hh of the rows of operand (batch, hidden).
  static void multiply(const T* operand, const LayerNormLstmShape& shape, A* packed, T* out);
  // out (batch, hidden): of the operand, from the gradient of the product (batch, gates * hidden).
  static void multiply_back(const T* grad, const LayerNormLstmShape& shape, A* packed, A* out);
#endif

  // out = h after the dropout, (steps, batch, hidden) of both: the same mask at all steps. In place or not.
  static void drop(const T* h, T* out, int64_t steps, const int64_t* key, double rate, const LayerNormLstmShape& shape,
                   void* stream);
  // `scratch` has scratch_size() elements, for one pass.
  static int64_t scratch_size(const LayerNormLstmShape& shape, bool backward);
  static void fwd(const LayerNormLstmForward<T>& call, const LayerNormLstmShape& shape, int64_t t, A* scratch,
                  void* stream);
  // t = -1 after the last: no row is alive, and grad_operand is added to grad_h.
  static void bwd(const LayerNormLstmBackward<T>& call, const LayerNormLstmShape& shape, int64_t t, A* scratch,
                  void* stream);
  static int64_t sum_rows(const LayerNormLstmShape& shape);  // of LayerNormLstmBackward::sums
};

}  // namespace pynn::PYNN_LAUNCH_NAMESPACE
