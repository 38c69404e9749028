// One step of an LSTM with layer normalisation and its kin on a GPU: a block per row. A thread has the same units in
// every pass over the row, so what one pass leaves for the next needs no synchronisation; only sums over the row do.
#pragma once
#include "layer_norm_lstm.h"
#include "recurrent_cells.cuh"
#include "warp_sum.cuh"

namespace pynn::cuda {
namespace {
namespace layer_norm {
using recurrent::sigmoid;
using recurrent::tanh_of;

constexpr int kThreads = 256, kWarps = kThreads / 32;

// The sums of the block's values, the same for every thread. Called by whole blocks.
template <int count>
__device__ __forceinline__ void sum_block(double (&value)[count]) {
  SHARED_ARRAY(double, partial, count* kWarps);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const double sum = sum_lanes(value[i]);
    if (lane == 0) partial[i * kWarps + warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < count; ++i) {
    value[i] = 0;
    for (int w = 0; w < kWarps; ++w) value[i] += partial[i * kWarps + w];
  }
  __syncthreads();
}

template <class Body>
__device__ __forceinline__ void each_unit(int64_t count, const Body& body) {
  for (int64_t u = threadIdx.x; u < count; u += kThreads) body(u);
}

__device__ __forceinline__ bool is_dropped(const Randomness& random, int64_t plane, int64_t row, int64_t unit,
                                           uint32_t threshold) {
  uint32_t words[4];
  philox4x32(uint64_t(random.key[0]), random.counter(plane, row, unit), words);
  const int word = int(unit % 4);
  return (word == 0 ? words[0] : word == 1 ? words[1] : word == 2 ? words[2] : words[3]) < threshold;
}

// Rates as the kernels use them.
template <class A>
struct Rates {
  Randomness random;
  A zoneout_hidden, zoneout_cell, survivors;  // survivors: their factor
  uint32_t hidden_threshold, cell_threshold, dropout_threshold;
  bool training, dropout;

  Rates(const Zoneout& z, double rate, const int64_t* key, const LayerNormLstmShape& s)
      : random{key, s.batch, ceil_div(s.hidden, 4)},
        zoneout_hidden(A(z.hidden)),
        zoneout_cell(A(z.cell)),
        survivors(A(1 / (1 - rate))),
        hidden_threshold(threshold_of(z.hidden)),
        cell_threshold(threshold_of(z.cell)),
        dropout_threshold(threshold_of(rate)),
        training(z.training),
        dropout(rate > 0) {}

  // What zoneout keeps of the old value.
  __device__ __forceinline__ A kept(int64_t plane, int64_t row, int64_t u, A rate, uint32_t threshold) const {
    if (!training || rate == 0) return rate;
    return is_dropped(random, plane, row, u, threshold) ? A(1) : A(0);
  }
  __device__ __forceinline__ A kept_hidden(int64_t t, int64_t row, int64_t u) const {
    return kept(Randomness::hidden_plane(t), row, u, zoneout_hidden, hidden_threshold);
  }
  __device__ __forceinline__ A kept_cell(int64_t t, int64_t row, int64_t u) const {
    return kept(Randomness::cell_plane(t), row, u, zoneout_cell, cell_threshold);
  }
  __device__ __forceinline__ A factor(int64_t row, int64_t u) const {
    if (!dropout) return A(1);
    return is_dropped(random, Randomness::dropout_plane(), row, u, dropout_threshold) ? A(0) : survivors;
  }
};

// A row's pre-activations without the peepholes.
template <class T>
struct Shares {
  using A = accumulate_t<T>;
  const LayerNormLstmWeights<T>& w;
  const T *ih, *hh;
  A mean_ih, scale_ih, mean_hh, scale_hh;

  __device__ __forceinline__ A normed_ih(int64_t at) const { return (to_float(ih[at]) - mean_ih) * scale_ih; }
  __device__ __forceinline__ A normed_hh(int64_t at) const { return (to_float(hh[at]) - mean_hh) * scale_hh; }
  __device__ __forceinline__ A operator()(int64_t at) const {
    const A bias = w.bias ? to_float(w.bias[at]) : A(0);
    if (!w.norm_ih) return to_float(ih[at]) + to_float(hh[at]) + bias;
    return fma(normed_ih(at), A(to_float(w.norm_ih[at])), fma(normed_hh(at), A(to_float(w.norm_hh[at])), bias));
  }
};

// Gates of a unit, and the new c before zoneout.
template <class T>
struct Gates {
  using A = accumulate_t<T>;
  A i, f, g, o, fresh;
  __device__ __forceinline__ Gates(const Shares<T>& shares, const LayerNormLstmShape& s, A c, int64_t u) {
    const T* const peephole = shares.w.peephole;
    const auto seen = [&](A pre, int64_t at, A state) {
      return peephole ? fma(A(to_float(peephole[at + u])), state, pre) : pre;
    };
    i = sigmoid<T>(seen(shares(u), 0, c));
    f = s.coupled ? 1 - i : sigmoid<T>(seen(shares(s.hidden + u), s.hidden, c));
    g = tanh_of(shares(s.cell() + u));
    fresh = fma(f, c, i * g);
    o = sigmoid<T>(seen(shares(s.out() + u), s.out_peephole(), fresh));
  }
};

// What tanh takes of the new c.
template <class T>
__device__ __forceinline__ accumulate_t<T> seen_of(const LayerNormLstmWeights<T>& w, accumulate_t<T> normed,
                                                   int64_t u) {
  return fma(normed, accumulate_t<T>(to_float(w.norm_cell[u])),
             w.norm_cell_bias ? accumulate_t<T>(to_float(w.norm_cell_bias[u])) : accumulate_t<T>(0));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    drop_kernel(const T* h, T* out, int64_t steps, Rates<accumulate_t<T>> rates, LayerNormLstmShape s) {
  const int64_t row = blockIdx.x;
  each_unit(s.hidden, [&](int64_t u) {
    const accumulate_t<T> factor = rates.factor(row, u);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = (t * s.batch + row) * s.hidden + u;
      out[at] = from_float<T>(to_float(h[at]) * factor);
    }
  });
}

// scratch: (batch, 2, hidden).
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(LayerNormLstmForward<T> call, LayerNormLstmShape s, Rates<accumulate_t<T>> rates, int64_t t,
                   accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  const int64_t row = blockIdx.x, hidden = s.hidden, width = s.width(), place = t * s.batch + row;
  T* const output = call.output + place * hidden;
  if (t >= s.length(call.lengths, row)) return each_unit(hidden, [&](int64_t u) { output[u] = T{}; });
  A *const c = call.c + row * hidden, *const fresh = scratch + row * 2 * hidden, *const out = fresh + hidden;
  T* const h = call.h + row * hidden;
  Shares<T> shares{call.weights, call.products_ih + place * width, call.products_hh + row * width, 0, 0, 0, 0};
  if (s.norm) {
    double sums[2] = {}, squares[2] = {};
    each_unit(width, [&](int64_t at) { sums[0] += to_float(shares.ih[at]), sums[1] += to_float(shares.hh[at]); });
    sum_block(sums);
    shares.mean_ih = A(sums[0] / double(width)), shares.mean_hh = A(sums[1] / double(width));
    each_unit(width, [&](int64_t at) {
      const A ih = to_float(shares.ih[at]) - shares.mean_ih, hh = to_float(shares.hh[at]) - shares.mean_hh;
      squares[0] += ih * ih, squares[1] += hh * hh;
    });
    sum_block(squares);
    shares.scale_ih = A(1 / sqrt(squares[0] / double(width) + call.epsilon));
    shares.scale_hh = A(1 / sqrt(squares[1] / double(width) + call.epsilon));
  }
  double sum[1] = {}, square[1] = {};
  each_unit(hidden, [&](int64_t u) {
    const Gates<T> gates(shares, s, c[u], u);
    fresh[u] = gates.fresh, out[u] = gates.o;
    sum[0] += gates.fresh;
  });
  A mean = 0, scale = 0;
  if (s.norm) {
    sum_block(sum);
    mean = A(sum[0] / double(hidden));
    each_unit(hidden, [&](int64_t u) { square[0] += (fresh[u] - mean) * (fresh[u] - mean); });
    sum_block(square);
    scale = A(1 / sqrt(square[0] / double(hidden) + call.epsilon));
    if (call.statistics && threadIdx.x == 0) {
      A* const to = call.statistics + place * kStatistics;
      to[kMeanIh] = shares.mean_ih, to[kScaleIh] = shares.scale_ih;
      to[kMeanHh] = shares.mean_hh, to[kScaleHh] = shares.scale_hh;
      to[kMeanCell] = mean, to[kScaleCell] = scale;
    }
  }
  each_unit(hidden, [&](int64_t u) {
    const A kept_c = rates.kept_cell(t, row, u), kept_h = rates.kept_hidden(t, row, u);
    const A seen = s.norm ? seen_of(call.weights, (fresh[u] - mean) * scale, u) : fresh[u];
    const A new_c = fma(kept_c, c[u], (1 - kept_c) * fresh[u]);
    const T new_h = from_float<T>(fma(kept_h, A(to_float(h[u])), (1 - kept_h) * (out[u] * tanh_of(seen))));
    c[u] = new_c;
    if (call.cells) call.cells[place * hidden + u] = new_c;
    h[u] = output[u] = new_h;
    if (call.operand) call.operand[row * hidden + u] = from_float<T>(to_float(new_h) * rates.factor(row, u));
  });
}

// scratch: (batch, 3 + gates, hidden).
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(LayerNormLstmBackward<T> call, LayerNormLstmShape s, LayerNormLstmSums places,
                    Rates<accumulate_t<T>> rates, int64_t t, accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  const int64_t row = blockIdx.x, hidden = s.hidden, width = s.width(), place = t * s.batch + row;
  const int64_t length = s.length(call.lengths, row);
  A *const grad_h = call.grad_h + row * hidden, *const grad_c = call.grad_c + row * hidden;
  // What the product of the later step says of h.
  if (call.grad_operand)
    each_unit(hidden, [&](int64_t u) {
      grad_h[u] = fma(call.grad_operand[row * hidden + u], rates.factor(row, u), grad_h[u]);
    });
  if (t < 0) return;
  T *const grad_ih = call.grad_ih + place * width, *const grad_hh = call.grad_hh + place * width;
  if (t >= length) return each_unit(width, [&](int64_t at) { grad_ih[at] = grad_hh[at] = T{}; });
  const int64_t before = s.before(t, length);
  const A* const c = before < 0 ? call.c0 + row * hidden : call.cells + (before * s.batch + row) * hidden;
  A *const fresh = scratch + row * (3 + s.gates()) * hidden, *const to_fresh = fresh + hidden,
           *const to_normed = to_fresh + hidden, *const d = to_normed + hidden;
  A* const sums = call.sums + row * places.width;
  const auto add = [&](int64_t first, int64_t at, A value) {
    if (first >= 0) sums[first + at] += value;
  };
  const LayerNormLstmWeights<T>& w = call.weights;
  Shares<T> shares{w, call.products_ih + place * width, call.products_hh + place * width, 0, 0, 0, 0};
  A mean = 0, scale = 0;
  if (s.norm) {
    const A* const from = call.statistics + place * kStatistics;
    shares.mean_ih = from[kMeanIh], shares.scale_ih = from[kScaleIh];
    shares.mean_hh = from[kMeanHh], shares.scale_hh = from[kScaleHh];
    mean = from[kMeanCell], scale = from[kScaleCell];
  }
  // Down to the new c, but for what the norm's mean and scale pass on: that takes two sums over the row.
  double means[2] = {};
  each_unit(hidden, [&](int64_t u) {
    const Gates<T> gates(shares, s, c[u], u);
    const A normed = (gates.fresh - mean) * scale;
    const A tanh_c = tanh_of(s.norm ? seen_of(w, normed, u) : gates.fresh);
    const A kept_h = rates.kept_hidden(t, row, u), kept_c = rates.kept_cell(t, row, u);
    A dh = grad_h[u];
    if (call.grad_output) dh += to_float(call.grad_output[place * hidden + u]);
    grad_h[u] = dh * kept_h;
    dh *= 1 - kept_h;
    const A dc = grad_c[u];
    grad_c[u] = dc * kept_c;
    const A to_out = dh * tanh_c * fma(-gates.o, gates.o, gates.o);
    const A to_seen = dh * gates.o * fma(-tanh_c, tanh_c, A(1));
    A to_c = dc * (1 - kept_c);
    if (w.peephole) {
      to_c = fma(to_out, A(to_float(w.peephole[s.out_peephole() + u])), to_c);
      add(places.peephole, s.out_peephole() + u, to_out * gates.fresh);
    }
    if (s.norm) {
      const A to_hat = to_seen * to_float(w.norm_cell[u]);
      add(places.norm_cell, u, to_seen * normed);
      add(places.norm_cell_bias, u, to_seen);
      means[0] += to_hat, means[1] += to_hat * normed;
      to_normed[u] = to_hat;
    } else {
      to_c += to_seen;
    }
    fresh[u] = gates.fresh, to_fresh[u] = to_c;
    d[u] = gates.i;
    if (!s.coupled) d[hidden + u] = gates.f;
    d[s.cell() + u] = gates.g, d[s.out() + u] = to_out;
  });
  if (s.norm) sum_block(means);
  const A mean_normed = A(means[0] / double(hidden)), mean_product = A(means[1] / double(hidden));
  // The gradients of the pre-activations, and the sums that the norms of the shares take.
  double totals[4] = {};
  const auto finish = [&](int64_t at, A grad) {
    add(places.bias, at, grad);
    if (!s.norm) {
      grad_ih[at] = from_float<T>(grad);
      return;
    }
    const A ih = shares.normed_ih(at), hh = shares.normed_hh(at);
    add(places.norm_ih, at, grad * ih);
    add(places.norm_hh, at, grad * hh);
    const A to_ih = grad * to_float(w.norm_ih[at]), to_hh = grad * to_float(w.norm_hh[at]);
    totals[0] += to_ih, totals[1] += to_ih * ih, totals[2] += to_hh, totals[3] += to_hh * hh;
    d[at] = grad;
  };
  each_unit(hidden, [&](int64_t u) {
    A dc = to_fresh[u];
    if (s.norm) dc = fma(to_normed[u] - mean_normed - (fresh[u] - mean) * scale * mean_product, scale, dc);
    const A old = c[u], i = d[u], f = s.coupled ? 1 - i : d[hidden + u], g = d[s.cell() + u];
    const A to_i = dc * (s.coupled ? g - old : g) * fma(-i, i, i), to_f = dc * old * fma(-f, f, f);
    A to_old = fma(dc, f, grad_c[u]);
    if (w.peephole) {
      to_old = fma(to_i, A(to_float(w.peephole[u])), to_old);
      add(places.peephole, u, to_i * old);
      if (!s.coupled) {
        to_old = fma(to_f, A(to_float(w.peephole[hidden + u])), to_old);
        add(places.peephole, hidden + u, to_f * old);
      }
    }
    grad_c[u] = to_old;
    finish(u, to_i);
    if (!s.coupled) finish(hidden + u, to_f);
    finish(s.cell() + u, dc * i * fma(-g, g, A(1)));
    finish(s.out() + u, d[s.out() + u]);
  });
  if (!s.norm) return;
  sum_block(totals);
  const A mean_ih = A(totals[0] / double(width)), product_ih = A(totals[1] / double(width)),
          mean_hh = A(totals[2] / double(width)), product_hh = A(totals[3] / double(width));
  each_unit(hidden, [&](int64_t u) {
    for (int64_t at = u; at < width; at += hidden) {
      const A to_ih = fma(d[at], A(to_float(w.norm_ih[at])), -mean_ih);
      const A to_hh = fma(d[at], A(to_float(w.norm_hh[at])), -mean_hh);
      grad_ih[at] = from_float<T>(fma(shares.normed_ih(at), -product_ih, to_ih) * shares.scale_ih);
      grad_hh[at] = from_float<T>(fma(shares.normed_hh(at), -product_hh, to_hh) * shares.scale_hh);
    }
  });
}

}  // namespace layer_norm
}  // namespace

template <class T>
int64_t LayerNormLstm<T>::scratch_size(const LayerNormLstmShape& s, bool backward) {
  return s.batch * (backward ? 3 + s.gates() : 2) * s.hidden;
}

template <class T>
void LayerNormLstm<T>::drop(const T* h, T* out, int64_t steps, const int64_t* key, double rate,
                            const LayerNormLstmShape& s, void* stream) {
  const layer_norm::Rates<A> rates({0, 0, false}, rate, key, s);
  LAUNCH((layer_norm::drop_kernel<T>), unsigned(s.batch), layer_norm::kThreads, 0, stream, h, out, steps, rates, s);
}

template <class T>
void LayerNormLstm<T>::fwd(const LayerNormLstmForward<T>& call, const LayerNormLstmShape& s, int64_t t, A* scratch,
                           void* stream) {
  const layer_norm::Rates<A> rates(call.zoneout, call.dropout, call.key, s);
  LAUNCH((layer_norm::forward_kernel<T>), unsigned(s.batch), layer_norm::kThreads, 0, stream, call, s, rates, t,
         scratch);
}

template <class T>
void LayerNormLstm<T>::bwd(const LayerNormLstmBackward<T>& call, const LayerNormLstmShape& s, int64_t t, A* scratch,
                           void* stream) {
  const layer_norm::Rates<A> rates(call.zoneout, call.dropout, call.key, s);
  const auto places = LayerNormLstmSums::of(s, call.weights);
  LAUNCH((layer_norm::backward_kernel<T>), unsigned(s.batch), layer_norm::kThreads, 0, stream, call, s, places, rates,
         t, scratch);
}

template <class T>
int64_t LayerNormLstm<T>::sum_rows(const LayerNormLstmShape& s) {
  return s.batch;
}

template struct LayerNormLstm<double>;
template struct LayerNormLstm<float>;
template struct LayerNormLstm<Half>;
template struct LayerNormLstm<BFloat16>;

}  // namespace pynn::cuda
