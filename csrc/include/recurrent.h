// Recurrent layers of one direction over whole sequences - LSTM, GRU and the plain RNN - and their gradients.
//
//   lstm  c[t] = f * c[t-1] + i * g,  h[t] = o * tanh(c[t])       i, f, o = sigmoid(.), g = tanh(.)
//   gru   h[t] = (1 - z) * n + z * h[t-1],  n = tanh(x n + r * (h n))    r, z = sigmoid(.)
//   rnn   h[t] = tanh(.) or relu(.)
//
// where (.) = weight_ih x[t] + bias_ih + weight_hh h[t-1] + bias_hh; with weight_hr the state is h[t] = weight_hr (o *
// tanh(c[t])). Gate rows are torch's: i f g o; r z n. Every tensor is contiguous and time-major: (steps, batch, ...).
#pragma once
#include "dtype.h"

namespace pynn {

enum class Cell : int64_t { lstm, gru, rnn_tanh, rnn_relu };

// Rows of the weights per hidden unit.
PYNN_HD constexpr int64_t gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
// Values per hidden unit and step that forward keeps for backward. lstm: i f g o after their activations. gru: r z n
// and the hidden share of n, weight_hh h + bias_hh, that r multiplies. rnn: nothing, the output says it all.
PYNN_HD constexpr int64_t saved_of(Cell cell) { return cell == Cell::lstm || cell == Cell::gru ? 4 : 0; }
// Gradients per hidden unit and step of the pre-activations. gru: of r z n, and of n's hidden share (n's times r).
PYNN_HD constexpr int64_t gradients_of(Cell cell) { return cell == Cell::lstm || cell == Cell::gru ? 4 : 1; }

struct RecurrentShape {
  Cell cell;
  int64_t steps, batch, input, hidden;
  int64_t state;   // width of h: hidden, or the rows of weight_hr
  bool projected;  // there is a weight_hr
  bool reverse;    // from the last step to the first
  int64_t rows() const { return steps * batch; }
};

template <class T>
struct RecurrentWeights {
  const T* ih;       // (gates * hidden, input)
  const T* hh;       // (gates * hidden, state)
  const T* bias_ih;  // (gates * hidden) or nullptr
  const T* bias_hh;  // (gates * hidden) or nullptr
  const T* hr;       // (state, hidden) or nullptr
};

// A row b is alive at the steps t < lengths[b]. At the others its state stands still and its output is 0.
template <class T>
struct RecurrentForward {
  using A = accumulate_t<T>;
  const T* input;  // (steps, batch, input)
  // weight_ih x, without a bias: (steps, batch, gates * hidden); or nullptr where the launcher makes products itself.
  // input and weights.ih are not read where it is given.
  const T* products;
  RecurrentWeights<T> weights;
  const T* h0;             // (batch, state)
  const A* c0;             // (batch, hidden), lstm only
  const int64_t* lengths;  // (batch), or nullptr for all steps; values outside 0..steps count as the nearer end
  T* output;               // (steps, batch, state)
  T* h_n;                  // (batch, state)
  A* c_n;                  // (batch, hidden), lstm only
  // What backward needs, or nullptr; undefined where a row is not alive. gates may be the memory of products (lstm).
  T* gates;  // (steps, batch, saved * hidden)
  A* cells;  // (steps, batch, hidden): c[t], lstm only
};

template <class T>
struct RecurrentBackward {
  using A = accumulate_t<T>;
  const T* grad_output;  // (steps, batch, state) or nullptr
  const T* grad_h_n;     // (batch, state) or nullptr
  const A* grad_c_n;     // (batch, hidden) or nullptr
  const T* input;
  RecurrentWeights<T> weights;
  const T* h0;
  const A* c0;
  const int64_t* lengths;
  const T *output, *gates;
  const A* cells;
  T* grad_h0;  // nullptr where nobody asks for it, of launchers that make the products
  A* grad_c0;
  // Launchers that leave the products to the caller fill these; nullptr for the others.
  T* grad_gates;   // (steps, batch, gradients * hidden), 0 where a row is not alive
  T* grad_states;  // (steps, batch, state) with weight_hr: the whole gradient of each h[t], 0 where a row is not alive
  T* hiddens;      // (steps, batch, hidden) with weight_hr: o * tanh(c), 0 where a row is not alive
  // Launchers that make the products fill those of these that are not nullptr, and grad_gates too.
  T *grad_input, *grad_weight_ih, *grad_weight_hh, *grad_bias_ih, *grad_bias_hh, *grad_weight_hr;
  // Such grad_gates of steps = 1, from which launchers that make the products make gradients of weights and biases
  // alone; they read only input and h0 besides. Or nullptr.
  const T* gates_given;
};

}  // namespace pynn

namespace pynn::PYNN_LAUNCH_NAMESPACE {

// The launchers. `scratch` is device memory of at least the bytes the function beside it asks for, on 64 bytes.
template <class T>
struct Recurrent {
#if defined(PYNN_CUDA) || defined(PYNN_SIM)
  // The products of whole sequences (weight_ih x, the gradients of input and weights) are the caller's, with the
  // library's matrix multiplication; the launchers do what happens step by step.
  static constexpr bool kProducts = false;
#else
  static constexpr bool kProducts = true;
#endif

  static int64_t fwd_scratch(const RecurrentShape& shape);
  static void fwd(const RecurrentForward<T>& call, const RecurrentShape& shape, void* scratch, void* stream);

  static int64_t bwd_scratch(const RecurrentShape& shape);
  static void bwd(const RecurrentBackward<T>& call, const RecurrentShape& shape, void* scratch, void* stream);
};

}  // namespace pynn::PYNN_LAUNCH_NAMESPACE
