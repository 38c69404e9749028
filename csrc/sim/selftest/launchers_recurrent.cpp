// Every launcher of csrc/include/recurrent.h: all cells, the four kinds of kernels, lengths, both directions, a
// projection, tails of rows and units. Results are compared with a plain loop in float64, row by row.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#include "../launch.h"
#include "launchers.h"
#include "recurrent.h"

namespace {

using launchers::Run;
using namespace pynn;

// Devices on which the launchers choose their kernels: an H200, devices with too little shared memory for a layer in
// one block, with clusters or without, and those with too few processors for a cooperative launch.
struct Device {
  int processors, kilobytes, cluster = 0;
};
constexpr Device kLarge{132, 227, 8}, kClusters{132, 61, 8}, kTeams{132, 61}, kFew{5, 44}, kSmall{1, 61};

struct Case {
  Cell cell;
  int64_t steps, batch, hidden;
  bool lengths = false, reverse = false, biases = true;
  int64_t projection = 0;
  Device device = kLarge;
  bool gradients_of_output = true, gradients_of_last = true;
};
constexpr Case kCases[] = {
    {Cell::lstm, 4, 3, 5, true, false},
    {Cell::lstm, 3, 18, 16, true, true},
    {Cell::lstm, 2, 2, 40, false, false, false},
    {Cell::gru, 4, 3, 5, true, true},
    {Cell::gru, 3, 17, 24, false, false, true, 0, kLarge, false, true},
    {Cell::rnn_tanh, 3, 3, 9, true, false},
    {Cell::rnn_relu, 3, 2, 40, true, true, true, 0, kLarge, true, false},
    {Cell::lstm, 3, 3, 7, true, false, true, 4},  // with a projection
    {Cell::lstm, 2, 34, 20, true, true, false, 9},
    {Cell::lstm, 1, 40, 20, true, false},  // one launch per step
    {Cell::gru, 1, 35, 20, false, true},
    {Cell::rnn_tanh, 1, 33, 9},
    {Cell::lstm, 0, 2, 5},
    {Cell::lstm, 3, 0, 5},
};
// Kinds of kernels that give the same bits: a device, and the kernels it runs last forward and backward.
struct Kind {
  Device device;
  const char *forward, *backward;
};
struct Kinds {
  Case c;
  std::vector<Kind> kinds;
};
#define BLOCK "forward_block", "backward_block"
#define CLUSTER "forward_cluster", "backward_cluster"
#define TEAM "forward_team", "backward_team"
#define STEP "forward_step", "backward_step"
const Kinds kKinds[] = {
    {{Cell::lstm, 2, 3, 88, true, false}, {{kLarge, BLOCK}, {kClusters, CLUSTER}, {kTeams, TEAM}, {kSmall, STEP}}},
    // More strips of rows than teams.
    {{Cell::lstm, 2, 18, 72, true, true}, {{kLarge, BLOCK}, {{132, 44, 8}, CLUSTER}, {kFew, TEAM}}},
    {{Cell::gru, 3, 3, 96, true, true}, {{kClusters, CLUSTER}, {kTeams, TEAM}, {kSmall, STEP}}},
    {{Cell::rnn_relu, 3, 3, 144, true, false}, {{{132, 45, 8}, CLUSTER}, {{132, 45}, TEAM}, {{1, 50}, STEP}}},
    // A part of the weights in registers.
    {{Cell::lstm, 3, 17, 200, true, true}, {{{132, 50, 8}, CLUSTER}, {kLarge, CLUSTER}, {kSmall, STEP}}},
    {{Cell::gru, 3, 3, 216, true, false}, {{{132, 64, 8}, CLUSTER}, {kSmall, STEP}}},
    // In float32 two groups of units for each of eight blocks: three blocks have none.
    {{Cell::lstm, 4, 3, 72, true, false}, {{{132, 37, 8}, CLUSTER}, {kLarge, BLOCK}}},
};

struct alignas(64) Line {
  char bytes[64];
};

template <class T>
double wide(T value) {
  return double(to_float(value));
}
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <class T>
constexpr double kTolerance = sizeof(T) == 8            ? 1e-13
                              : sizeof(T) == 4          ? 2e-5
                              : std::is_same_v<T, Half> ? 4e-3
                                                        : 3e-2;

// Throws where a result is further from the reference than the type allows, relative to the largest one.
template <class T>
void compare(const char* name, const T* got, const std::vector<double>& expected, double tolerance) {
  double largest = 1;
  for (const double value : expected) largest = std::max(largest, std::fabs(value));
  for (size_t i = 0; i < expected.size(); ++i)
    if (!(std::fabs(wide(got[i]) - expected[i]) <= tolerance * largest))
      throw std::runtime_error(std::string("recurrent: ") + name + " element " + std::to_string(i) + " is " +
                               std::to_string(wide(got[i])) + ", expected " + std::to_string(expected[i]));
}

// A layer in float64, with the states rounded as T, and what came out of it.
template <class T>
struct Reference {
  const Case& c;
  int64_t gates, hidden, state;
  const RecurrentForward<T>& in;
  std::vector<double> output, h_n, c_n, grad_gates, grad_states, hiddens, grad_h0, grad_c0;

  Reference(const Case& c, const RecurrentShape& s, const RecurrentForward<T>& in, const RecurrentBackward<T>& back)
      : c(c), gates(gates_of(s.cell)), hidden(s.hidden), state(s.state), in(in) {
    const size_t rows = size_t(s.rows()), batch = size_t(s.batch);
    output.resize(rows * size_t(state)), h_n.resize(batch * size_t(state)), c_n.resize(batch * size_t(hidden));
    grad_gates.resize(rows * size_t(gradients_of(s.cell) * hidden)), grad_states.resize(rows * size_t(state));
    hiddens.resize(rows * size_t(hidden)), grad_h0.resize(batch * size_t(state)),
        grad_c0.resize(batch * size_t(hidden));
    for (int64_t b = 0; b < s.batch; ++b) compute_row(s, b, back);
  }

  struct Step {
    std::vector<double> before, c_before, gate[4], c, share, h;
  };

  double weight(int64_t gate, int64_t unit, int64_t k) const {
    return wide(in.weights.hh[(gate * hidden + unit) * state + k]);
  }
  double projection(int64_t k, int64_t unit) const { return wide(in.weights.hr[k * hidden + unit]); }

  void compute_row(const RecurrentShape& s, int64_t b, const RecurrentBackward<T>& back) {
    const int64_t length = in.lengths ? std::clamp<int64_t>(in.lengths[b], 0, s.steps) : s.steps;
    std::vector<double> h(size_t(state), 0.0), cell(size_t(hidden), 0.0);
    for (int64_t k = 0; k < state; ++k) h[size_t(k)] = wide(in.h0[b * state + k]);
    if (s.cell == Cell::lstm)
      for (int64_t u = 0; u < hidden; ++u) cell[size_t(u)] = double(in.c0[b * hidden + u]);
    std::vector<Step> steps;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t place = (s.reverse ? length - 1 - i : i) * s.batch + b;
      steps.push_back(step_forward(s, place, h, cell));
      h = steps.back().h, cell = steps.back().c;
      std::copy(h.begin(), h.end(), output.begin() + place * state);
    }
    std::copy(h.begin(), h.end(), h_n.begin() + b * state);
    std::copy(cell.begin(), cell.end(), c_n.begin() + b * hidden);

    std::vector<double> dh(size_t(state), 0.0), dc(size_t(hidden), 0.0);
    if (back.grad_h_n)
      for (int64_t k = 0; k < state; ++k) dh[size_t(k)] = wide(back.grad_h_n[b * state + k]);
    if (back.grad_c_n)
      for (int64_t u = 0; u < hidden; ++u) dc[size_t(u)] = double(back.grad_c_n[b * hidden + u]);
    for (int64_t i = length - 1; i >= 0; --i) {
      const int64_t place = (s.reverse ? length - 1 - i : i) * s.batch + b;
      if (back.grad_output)
        for (int64_t k = 0; k < state; ++k) dh[size_t(k)] += wide(back.grad_output[place * state + k]);
      step_backward(s, place, steps[size_t(i)], dh, dc);
    }
    std::copy(dh.begin(), dh.end(), grad_h0.begin() + b * state);
    std::copy(dc.begin(), dc.end(), grad_c0.begin() + b * hidden);
  }

  Step step_forward(const RecurrentShape& s, int64_t place, const std::vector<double>& h,
                    const std::vector<double>& cell) {
    Step step{h, cell, {}, cell, {}, h};
    std::vector<double> own(size_t(hidden), 0.0);
    for (auto& gate : step.gate) gate.resize(size_t(hidden));
    step.share.resize(size_t(hidden));
    for (int64_t u = 0; u < hidden; ++u) {
      const size_t at = size_t(u);
      double x[4] = {}, y[4] = {};
      for (int64_t g = 0; g < gates; ++g) {
        x[g] = wide(in.products[(place * gates + g) * hidden + u]);
        if (in.weights.bias_ih) x[g] += wide(in.weights.bias_ih[g * hidden + u]);
        if (in.weights.bias_hh) y[g] += wide(in.weights.bias_hh[g * hidden + u]);
        for (int64_t k = 0; k < state; ++k) y[g] += weight(g, u, k) * h[size_t(k)];
      }
      if (s.cell == Cell::lstm) {
        const double i = sigmoid(x[0] + y[0]), f = sigmoid(x[1] + y[1]), g = std::tanh(x[2] + y[2]),
                     o = sigmoid(x[3] + y[3]);
        step.gate[0][at] = i, step.gate[1][at] = f, step.gate[2][at] = g, step.gate[3][at] = o;
        step.c[at] = f * cell[at] + i * g;
        own[at] = o * std::tanh(step.c[at]);
      } else if (s.cell == Cell::gru) {
        const double r = sigmoid(x[0] + y[0]), z = sigmoid(x[1] + y[1]), n = std::tanh(x[2] + r * y[2]);
        step.gate[0][at] = r, step.gate[1][at] = z, step.gate[2][at] = n, step.share[at] = y[2];
        own[at] = (1 - z) * n + z * h[at];
      } else {
        const double a = x[0] + y[0];
        own[at] = s.cell == Cell::rnn_tanh ? std::tanh(a) : std::max(a, 0.0);
      }
      own[at] = wide(from_float<T>(accumulate_t<T>(own[at])));
      hiddens[size_t(place * hidden + u)] = own[at];
    }
    step.h = own;
    if (!s.projected) return step;
    step.h.assign(size_t(state), 0.0);
    for (int64_t k = 0; k < state; ++k) {
      for (int64_t u = 0; u < hidden; ++u) step.h[size_t(k)] += projection(k, u) * own[size_t(u)];
      step.h[size_t(k)] = wide(from_float<T>(accumulate_t<T>(step.h[size_t(k)])));
    }
    return step;
  }

  void step_backward(const RecurrentShape& s, int64_t place, const Step& step, std::vector<double>& dh,
                     std::vector<double>& dc) {
    std::copy(dh.begin(), dh.end(), grad_states.begin() + place * state);
    std::vector<double> own = dh, before(size_t(state), 0.0);
    if (s.projected) {
      own.assign(size_t(hidden), 0.0);
      for (int64_t u = 0; u < hidden; ++u)
        for (int64_t k = 0; k < state; ++k) own[size_t(u)] += projection(k, u) * dh[size_t(k)];
    }
    const int64_t gradients = gradients_of(s.cell);
    for (int64_t u = 0; u < hidden; ++u) {
      const size_t at = size_t(u);
      double d[4] = {};
      if (s.cell == Cell::lstm) {
        const double i = step.gate[0][at], f = step.gate[1][at], g = step.gate[2][at], o = step.gate[3][at],
                     t = std::tanh(step.c[at]), gradient = dc[at] + own[at] * o * (1 - t * t);
        d[0] = gradient * g * i * (1 - i), d[1] = gradient * step.c_before[at] * f * (1 - f);
        d[2] = gradient * i * (1 - g * g), d[3] = own[at] * t * o * (1 - o);
        dc[at] = gradient * f;
      } else if (s.cell == Cell::gru) {
        const double r = step.gate[0][at], z = step.gate[1][at], n = step.gate[2][at];
        d[2] = own[at] * (1 - z) * (1 - n * n), d[3] = d[2] * r;
        d[0] = d[2] * step.share[at] * r * (1 - r), d[1] = own[at] * (step.before[at] - n) * z * (1 - z);
        before[at] += own[at] * z;
      } else {
        d[0] = s.cell == Cell::rnn_tanh ? own[at] * (1 - step.h[at] * step.h[at]) : step.h[at] > 0 ? own[at] : 0;
      }
      for (int64_t g = 0; g < gradients; ++g) grad_gates[size_t((place * gradients + g) * hidden + u)] = d[g];
      for (int64_t g = 0; g < gates; ++g)
        for (int64_t k = 0; k < state; ++k)
          before[size_t(k)] += (s.cell == Cell::gru && g == 2 ? d[3] : d[g]) * weight(g, u, k);
    }
    dh = before;
  }
};

void expect_kernel(const char* expected) {
  if (expected && !std::strstr(pynn_sim_latest_kernel(), expected))
    throw std::runtime_error(std::string("recurrent: expected the kernel ") + expected + ", got " +
                             pynn_sim_latest_kernel());
}

template <class T>
void launch_case(Run& run, const Case& c, const Kind& kind = {}) {
  pynn_sim_device(c.device.processors, c.device.kilobytes * 1024, c.device.cluster);
  using Recurrent = launch::Recurrent<T>;
  using A = accumulate_t<T>;
  const bool lstm = c.cell == Cell::lstm, projected = c.projection > 0;
  const RecurrentShape s{c.cell,    c.steps,  c.batch, 3, c.hidden, projected ? c.projection : c.hidden,
                         projected, c.reverse};
  const int64_t gates = gates_of(c.cell);
  const auto size = [](int64_t count) { return size_t(count); };
  const size_t rows = size(s.rows()), states = size(s.batch * s.state), hiddens = size(s.batch * s.hidden);
  const auto weights = [&](int64_t count) {
    const T* normals = run.normals<T>(size(count));
    return run.input<T>(size(count),
                        [&](size_t i) { return from_float<T>(A(wide(normals[i]) / std::sqrt(double(s.hidden)))); });
  };
  // What a launcher writes only where a row is alive.
  const auto zeros = [&]<class V>(V, int64_t count) {
    V* memory = run.output<V>(size(count));
    memset(static_cast<void*>(memory), 0, size(count) * sizeof(V));
    return memory;
  };
  const auto scratch = [&](int64_t bytes) { return run.scratch<Line>(size(bytes + 63) / 64); };

  RecurrentForward<T> in{};
  const int64_t saved = saved_of(c.cell) * s.hidden * s.rows();
  in.products = run.normals<T>(rows * size(gates * s.hidden));
  in.weights.hh = weights(gates * s.hidden * s.state);
  if (c.biases) in.weights.bias_ih = weights(gates * s.hidden), in.weights.bias_hh = weights(gates * s.hidden);
  if (projected) in.weights.hr = weights(s.state * s.hidden);
  in.h0 = run.normals<T>(states), in.c0 = lstm ? run.normals<A>(hiddens) : nullptr;
  // Not sorted, one too long, one empty.
  if (c.lengths)
    in.lengths = run.input<int64_t>(size(c.batch), [&](size_t b) { return int64_t(b * 5 + 7) % (c.steps + 3) - 1; });
  in.output = run.output<T>(rows * size(s.state)), in.h_n = run.output<T>(states);
  in.c_n = lstm ? run.output<A>(hiddens) : nullptr;
  in.gates = saved ? zeros(T{}, saved) : nullptr;
  in.cells = lstm ? zeros(A{}, s.rows() * s.hidden) : nullptr;
  Recurrent::fwd(in, s, scratch(Recurrent::fwd_scratch(s)), nullptr);
  expect_kernel(kind.forward);

  RecurrentBackward<T> back{};
  if (c.gradients_of_output) back.grad_output = run.normals<T>(rows * size(s.state));
  if (c.gradients_of_last) {
    back.grad_h_n = run.normals<T>(states);
    back.grad_c_n = lstm ? run.normals<A>(hiddens) : nullptr;
  }
  back.weights = in.weights, back.h0 = in.h0, back.c0 = in.c0, back.lengths = in.lengths;
  back.output = in.output, back.gates = in.gates, back.cells = in.cells;
  back.grad_h0 = run.output<T>(states), back.grad_c0 = lstm ? run.output<A>(hiddens) : nullptr;
  back.grad_gates = run.output<T>(rows * size(gradients_of(c.cell) * s.hidden));
  if (projected) {
    back.grad_states = run.output<T>(rows * size(s.state));
    back.hiddens = run.output<T>(rows * size(s.hidden));
  }
  Recurrent::bwd(back, s, scratch(Recurrent::bwd_scratch(s)), nullptr);
  expect_kernel(kind.backward);

  const Reference<T> expected(c, s, in, back);
  const double tolerance = kTolerance<T>;
  compare("output", in.output, expected.output, tolerance);
  compare("h_n", in.h_n, expected.h_n, tolerance);
  compare("grad_gates", back.grad_gates, expected.grad_gates, tolerance);
  compare("grad_h0", back.grad_h0, expected.grad_h0, tolerance);
  if (lstm) {
    compare("c_n", in.c_n, expected.c_n, tolerance);
    compare("grad_c0", back.grad_c0, expected.grad_c0, tolerance);
  }
  if (projected) {
    compare("grad_states", back.grad_states, expected.grad_states, tolerance);
    compare("hiddens", back.hiddens, expected.hiddens, tolerance);
  }
}

template <class T>
void launch_kinds(Run& run, const Kinds& kinds) {
  std::vector<char> expected;
  for (const Kind& kind : kinds.kinds) {
    Run pass(0, run.once());
    Case c = kinds.c;
    c.device = kind.device;
    launch_case<T>(pass, c, kind);
    if (expected.empty()) expected = pass.results();
    if (pass.results() != expected)
      throw std::runtime_error("recurrent: the bits of results depend on the kind of kernel");
  }
  std::copy(expected.begin(), expected.end(), run.output<char>(expected.size()));
}

void launch_all(Run& run) {
  launchers::for_each_type(run, [&]<class T>(T) {
    // Half differs from BFloat16 by an instruction and a rounding.
    for (const Case& c : kCases)
      if (!std::is_same_v<T, Half> || c.hidden < 20) launch_case<T>(run, c);
  });
  for (const Kinds& kinds : kKinds) launch_kinds<BFloat16>(run, kinds);
  launch_kinds<float>(run, kKinds[0]);
  launch_kinds<float>(run, kKinds[std::size(kKinds) - 1]);
  pynn_sim_device(kLarge.processors, kLarge.kilobytes * 1024, kLarge.cluster);
}

const launchers::Op op{"recurrent", &launch_all};

}  // namespace
