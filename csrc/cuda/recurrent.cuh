// Recurrent layers on a GPU: what the kernels that recurrent_tiers.cuh chooses work on, and their launches.
#pragma once
#include <algorithm>
#include <type_traits>

#include "recurrent_prepare.cuh"
#include "recurrent_tiers.cuh"

namespace pynn::cuda {
namespace {
namespace recurrent {

inline int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }
template <class T>
constexpr int64_t kPackOf = 16 / sizeof(T);

// Memory of a launcher: pieces that each begin on 64 bytes.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class V>
  V* take(int64_t count) {
    char* const begin = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(count * int64_t(sizeof(V)), 64);
    return reinterpret_cast<V*>(begin);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Calls body with the number of gates of a cell, as a constant.
template <class Body>
void with_gates(Cell cell, const Body& body) {
  if (cell == Cell::lstm)
    body(std::integral_constant<int, 4>());
  else if (cell == Cell::gru)
    body(std::integral_constant<int, 3>());
  else
    body(std::integral_constant<int, 1>());
}

template <class T, int gates>
Operands<T> operands_of(const T* left, int64_t left_stride, const T* right, int64_t length, int64_t right_stride,
                        int64_t rows, int64_t units) {
  return {left,
          right,
          left_stride,
          right_stride,
          units * right_stride,
          rows,
          int(units),
          int(ceil_div(length, kPackOf<T>)),
          int(ceil_div(length, Tile<T, gates>::kDepth))};
}

// The width of rows of a left operand: whole stages of the sum.
template <class T, int gates>
int64_t left_width(int64_t length) {
  return round_up(length, Tile<T, gates>::kDepth);
}

template <class T>
void launch_begin(const Begin<T>& b, void* stream) {
  const int64_t blocks = std::max(b.batch, ceil_div(std::max(b.zero_count, b.gates * b.hidden), kCopyThreads));
  LAUNCH(begin_kernel<T>, unsigned(std::min<int64_t>(blocks, 1024)), kCopyThreads, 0, stream, b);
}

// ---------------------------------------------------------------- forward

template <class T>
struct ForwardScratch {
  int64_t width;                    // of the state as a left operand
  int64_t hidden_width;             // of the hidden units as the projection's
  int64_t weights_width, hr_width;  // of copies of weights
  T *weights, *weights_hr, *states, *states_after, *hidden;
  accumulate_t<T>* bias;
  unsigned* flags;
  int64_t flag_count, bytes;

  ForwardScratch(void* memory, const RecurrentShape& s)
      : width(s.cell == Cell::lstm || s.cell == Cell::gru ? left_width<T, 4>(s.state) : left_width<T, 1>(s.state)),
        hidden_width(left_width<T, 1>(s.hidden)),
        weights_width(round_up(s.state, kPackOf<T>)),
        hr_width(round_up(s.hidden, kPackOf<T>)),
        flag_count(may_stay<T>(s) ? strips_of(s.batch) * unit_tiles_of(s.hidden) : 0) {
    const int64_t rows = gates_of(s.cell) * s.hidden;
    Scratch scratch(memory);
    weights = scratch.take<T>(rows * weights_width);
    weights_hr = scratch.take<T>(s.projected ? s.state * hr_width : 0);
    states = scratch.take<T>(s.batch * width);
    states_after = scratch.take<T>(s.batch * width);
    hidden = scratch.take<T>(s.projected ? s.batch * hidden_width : 0);
    bias = scratch.take<accumulate_t<T>>(biases_of(int(gates_of(s.cell))) * s.hidden);
    flags = scratch.take<unsigned>(flag_count);
    bytes = scratch.used();
  }
};
static_assert(Tile<float, 4>::kDepth == Tile<float, 3>::kDepth);

// Weights with rows of whole packs: themselves, or a copy.
template <class T>
const T* in_packs(const T* weights, int64_t rows, int64_t columns, int64_t width, T* copy, void* stream) {
  if (columns == width && is_aligned({weights})) return weights;
  LAUNCH(pad_kernel<T>, unsigned(std::min<int64_t>(rows, 65536)), kCopyThreads, 0, stream, copy, weights, rows, columns,
         width);
  return copy;
}

template <class T, int gates>
void launch_forward_step(const Forward<T>& f, const Operands<T>& o, const Next<T>& next, int64_t step, void* stream) {
  const auto run = [&]<int strips>(std::integral_constant<int, strips>) {
    const int64_t blocks = ceil_div(f.clock.batch, kStripRows * strips) * unit_tiles_of(o.units);
    LAUNCH((forward_step_kernel<T, gates, strips>), unsigned(blocks), kThreads,
           (Pipeline<T, gates, strips, false>::kSharedBytes), stream, f, o, next, step);
  };
  if constexpr (sizeof(T) < 8)
    if (f.clock.batch > 2 * kStripRows) return run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 1>());
}

template <class T, int gates>
void forward(const RecurrentForward<T>& call, const RecurrentShape& s, void* memory, void* stream) {
  const ForwardScratch<T> scratch(memory, s);
  const int64_t rows = gates * s.hidden;
  const T* const weights = in_packs(call.weights.hh, rows, s.state, scratch.weights_width, scratch.weights, stream);
  const bool biased = call.weights.bias_ih || call.weights.bias_hh;
  const Clock clock{s.steps, s.batch, call.lengths, s.reverse};
  Forward<T> f{clock,
               int(s.hidden),
               s.cell == Cell::rnn_relu ? Activation::relu : Activation::tanh,
               call.products,
               biased ? scratch.bias : nullptr,
               call.output,
               call.h_n,
               call.gates,
               call.c_n,
               call.cells};
  Operands<T> o =
      operands_of<T, gates>(scratch.states, scratch.width, weights, s.state, scratch.weights_width, s.batch, s.hidden);
  launch_begin<T>({s.batch, s.state, s.hidden, call.h0, s.cell == Cell::lstm ? call.c0 : nullptr, call.h_n,
                   s.cell == Cell::lstm ? call.c_n : nullptr, scratch.states, scratch.states_after, scratch.width, true,
                   scratch.hidden, s.projected ? s.batch * scratch.hidden_width : 0, scratch.flags, scratch.flag_count,
                   biased ? scratch.bias : nullptr, call.weights.bias_ih, call.weights.bias_hh, gates},
                  stream);

  if constexpr (sizeof(T) < 8) {
    const Device device = device_now();
    const BlockLayout layout = BlockLayout::of<T>(s.state, int(s.hidden), gates);
    const size_t bytes = team_bytes<T, gates>(o);
    const int tiles = int(unit_tiles_of(s.hidden));
    const ClusterLayout cluster = forward_cluster_layout<T, gates>(s, device);
    const auto forward_cluster = forward_cluster_kernel_of<T, gates>(cluster);
    int groups = 0;
    const Tier tier = tier_of<T>(
        s, layout, device, [&] { return cluster.blocks > 0 && can_run(forward_cluster, cluster, gates, s.batch); },
        [&] { return groups = team_groups(&forward_team_kernel<T, gates>, bytes, tiles, s.batch, device); });
    if (tier == Tier::block) {
      LAUNCH((forward_block_kernel<T, gates>), unsigned(strips_of(s.batch)), kThreads, size_t(layout.bytes()), stream,
             f, o);
      return;
    }
    if (tier == Tier::cluster) {
      LAUNCH_CLUSTERS(forward_cluster, cluster.blocks, unsigned(strips_of(s.batch) * cluster.blocks), kThreads,
                      size_t(cluster.bytes(gates)), stream, f, o, cluster);
      return;
    }
    if (tier == Tier::cooperative) {
      const Team team{tiles, groups, scratch.flags};
      LAUNCH_COOPERATIVE((forward_team_kernel<T, gates>), unsigned(tiles * groups), kThreads, bytes, stream, f, o,
                         scratch.states, scratch.states_after, team);
      return;
    }
  }
  if (s.projected) {
    if constexpr (gates == 4) {
      const T* const hr = in_packs(call.weights.hr, s.state, s.hidden, scratch.hr_width, scratch.weights_hr, stream);
      const Operands<T> hidden =
          operands_of<T, 1>(scratch.hidden, scratch.hidden_width, hr, s.hidden, scratch.hr_width, s.batch, s.state);
      f.output = nullptr;
      const Forward<T> projection{clock, int(s.state), Activation::identity, nullptr, nullptr, call.output, call.h_n};
      for (int64_t step = 0; step < s.steps; ++step) {
        o.left = step % 2 == 0 ? scratch.states : scratch.states_after;
        T* const after = step % 2 == 0 ? scratch.states_after : scratch.states;
        launch_forward_step<T, 4>(f, o, {scratch.hidden, scratch.hidden_width, 0}, step, stream);
        launch_forward_step<T, 1>(projection, hidden, {after, scratch.width, 0}, step, stream);
      }
    }
    return;
  }
  for (int64_t step = 0; step < s.steps; ++step) {
    o.left = step % 2 == 0 ? scratch.states : scratch.states_after;
    T* const after = step % 2 == 0 ? scratch.states_after : scratch.states;
    launch_forward_step<T, gates>(f, o, {after, scratch.width, 0}, step, stream);
  }
}

// ---------------------------------------------------------------- backward

template <class T>
struct BackwardScratch {
  int64_t length, width;            // of the sum over gates, and of its left operand
  int64_t state_width;              // of the gradients of the state as a left operand
  int64_t weights_width, hr_width;  // of transposed weights
  T *weights, *weights_hr, *gradients, *gradients_after, *states;
  accumulate_t<T>* carry;
  unsigned* flags;
  int64_t flag_count, bytes;

  BackwardScratch(void* memory, const RecurrentShape& s)
      : length(gates_of(s.cell) * s.hidden),
        width(left_width<T, 1>(length)),
        state_width(left_width<T, 1>(s.state)),
        weights_width(round_up(length, kPackOf<T>)),
        hr_width(round_up(s.state, kPackOf<T>)),
        flag_count(may_stay<T>(s) ? strips_of(s.batch) * unit_tiles_of(s.hidden) : 0) {
    Scratch scratch(memory);
    weights = scratch.take<T>(s.state * weights_width);
    weights_hr = scratch.take<T>(s.projected ? s.hidden * hr_width : 0);
    gradients = scratch.take<T>(s.batch * width);
    gradients_after = scratch.take<T>(s.batch * width);
    states = scratch.take<T>(s.projected ? s.batch * state_width : 0);
    carry = scratch.take<accumulate_t<T>>(s.cell == Cell::gru ? s.batch * s.hidden : 0);
    flags = scratch.take<unsigned>(flag_count);
    bytes = scratch.used();
  }
};

template <class T>
const T* transposed(const T* weights, int64_t rows, int64_t columns, int64_t width, T* copy, void* stream) {
  LAUNCH(transpose_kernel<T>, unsigned(ceil_div(width, kCopyTile) * ceil_div(columns, kCopyTile)), kCopyThreads, 0,
         stream, copy, weights, rows, columns, width);
  return copy;
}

template <class T>
void launch_backward_step(const Backward<T>& b, const Operands<T>& o, const Next<T>& next, int64_t step, void* stream) {
  const auto run = [&]<int strips>(std::integral_constant<int, strips>) {
    const int64_t blocks = ceil_div(b.clock.batch, kStripRows * strips) * unit_tiles_of(o.units);
    LAUNCH((backward_step_kernel<T, strips>), unsigned(blocks), kThreads, (Pipeline<T, 1, strips, false>::kSharedBytes),
           stream, b, o, next, step);
  };
  if constexpr (sizeof(T) < 8)
    if (b.clock.batch > 2 * kStripRows) return run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 1>());
}

template <class T>
void backward(const RecurrentBackward<T>& call, const RecurrentShape& s, void* memory, void* stream) {
  const BackwardScratch<T> scratch(memory, s);
  const T* const weights =
      transposed(call.weights.hh, scratch.length, s.state, scratch.weights_width, scratch.weights, stream);
  Backward<T> b{{s.steps, s.batch, call.lengths, s.reverse},
                int(s.state),
                s.cell,
                s.projected ? Stage::state : Stage::whole,
                call.grad_output,
                call.grad_h_n,
                call.h0,
                call.output,
                call.gates,
                call.c0,
                call.cells,
                call.grad_h0,
                call.grad_gates,
                call.grad_states,
                nullptr,
                call.grad_c0,
                scratch.carry};
  Operands<T> o = operands_of<T, 1>(scratch.gradients, scratch.width, weights, scratch.length, scratch.weights_width,
                                    s.batch, s.state);
  launch_begin<T>(
      {s.batch, s.state, s.hidden, call.grad_h_n, s.cell == Cell::lstm ? call.grad_c_n : nullptr, call.grad_h0,
       s.cell == Cell::lstm ? call.grad_c0 : nullptr, scratch.gradients, scratch.gradients_after, scratch.width, false,
       scratch.states, s.projected ? s.batch * scratch.state_width : 0, scratch.flags, scratch.flag_count},
      stream);
  const int pitch = int(s.hidden);

  if constexpr (sizeof(T) < 8) {
    const Device device = device_now();
    const BlockLayout layout = BlockLayout::of<T>(scratch.length, int(s.hidden), 1);
    const size_t bytes = team_bytes<T, 1>(o);
    const int tiles = int(unit_tiles_of(s.hidden));
    const ClusterLayout cluster = backward_cluster_layout<T>(s, device);
    const auto backward_cluster = backward_cluster_kernel_of<T>(cluster);
    int groups = 0;
    const Tier tier = tier_of<T>(
        s, layout, device, [&] { return cluster.blocks > 0 && can_run(backward_cluster, cluster, 1, s.batch); },
        [&] { return groups = team_groups(&backward_team_kernel<T>, bytes, tiles, s.batch, device); });
    if (tier == Tier::block) {
      LAUNCH(backward_block_kernel<T>, unsigned(strips_of(s.batch)), kThreads, size_t(layout.bytes()), stream, b, o,
             int(scratch.length));
      return;
    }
    if (tier == Tier::cluster) {
      LAUNCH_CLUSTERS(backward_cluster, cluster.blocks, unsigned(strips_of(s.batch) * cluster.blocks), kThreads,
                      size_t(cluster.bytes(1)), stream, b, o, cluster);
      return;
    }
    if (tier == Tier::cooperative) {
      const Team team{tiles, groups, scratch.flags};
      LAUNCH_COOPERATIVE(backward_team_kernel<T>, unsigned(tiles * groups), kThreads, bytes, stream, b, o,
                         scratch.gradients, scratch.gradients_after, pitch, team);
      return;
    }
  }
  Backward<T> hidden = b;
  Operands<T> states{};
  if (s.projected) {
    const T* const hr = transposed(call.weights.hr, s.state, s.hidden, scratch.hr_width, scratch.weights_hr, stream);
    states = operands_of<T, 1>(scratch.states, scratch.state_width, hr, s.state, scratch.hr_width, s.batch, s.hidden);
    hidden.units = int(s.hidden), hidden.stage = Stage::hidden, hidden.hiddens = call.hiddens;
  }
  for (int64_t step = 0; step <= s.steps; ++step) {
    o.left = step % 2 == 0 ? scratch.gradients : scratch.gradients_after;
    const Next<T> next{step % 2 == 0 ? scratch.gradients_after : scratch.gradients, scratch.width, pitch};
    if (!s.projected) {
      launch_backward_step(b, o, next, step, stream);
      continue;
    }
    launch_backward_step(b, o, {scratch.states, scratch.state_width, 0}, step, stream);
    if (step < s.steps) launch_backward_step(hidden, states, next, step, stream);
  }
}

}  // namespace recurrent
}  // namespace

template <class T>
int64_t Recurrent<T>::fwd_scratch(const RecurrentShape& shape) {
  return recurrent::ForwardScratch<T>(nullptr, shape).bytes;
}
template <class T>
int64_t Recurrent<T>::bwd_scratch(const RecurrentShape& shape) {
  return recurrent::BackwardScratch<T>(nullptr, shape).bytes;
}

template <class T>
void Recurrent<T>::fwd(const RecurrentForward<T>& call, const RecurrentShape& shape, void* scratch, void* stream) {
  if (shape.batch == 0) return;
  recurrent::with_gates(shape.cell, [&](auto gates) { recurrent::forward<T, gates>(call, shape, scratch, stream); });
}

template <class T>
void Recurrent<T>::bwd(const RecurrentBackward<T>& call, const RecurrentShape& shape, void* scratch, void* stream) {
  if (shape.batch == 0) return;
  recurrent::backward(call, shape, scratch, stream);
}

template struct Recurrent<double>;
template struct Recurrent<float>;
template struct Recurrent<Half>;
template struct Recurrent<BFloat16>;

}  // namespace pynn::cuda
