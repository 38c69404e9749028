// Every launcher of csrc/include/layer_norm_lstm.h: with all options and with none, both directions, rows of every
// length, more units than a block has threads, and lengths that are out of range.
#include "launchers.h"
#include "layer_norm_lstm.h"

namespace {

using launchers::Run;
using pynn::LayerNormLstmShape;

constexpr int64_t kSteps = 2, kBatch = 3, kLengths[kBatch] = {2, 99, -1}, kKey[2] = {-5, 7};

template <class T>
void launch_case(Run& run, int64_t hidden, bool all, bool coupled, bool training, bool reverse) {
  using A = pynn::accumulate_t<T>;
  using Lstm = launch::LayerNormLstm<T>;
  const LayerNormLstmShape s{kSteps, kBatch, 1, hidden, coupled, all, reverse};
  const size_t units = size_t(hidden), width = size_t(s.width()), row = size_t(kBatch * hidden);
  const auto some = [&](bool wanted, size_t count) { return wanted ? run.normals<T>(count) : nullptr; };
  const auto copy_of = [&]<class E>(const E* values, size_t count) {
    E* memory = run.output<E>(count);
    for (size_t i = 0; i < count; ++i) memory[i] = values[i];
    return memory;
  };
  const int64_t* lengths = all ? run.input<int64_t>(kBatch, [](size_t i) { return kLengths[i]; }) : nullptr;
  const int64_t* key = all ? run.input<int64_t>(2, [](size_t i) { return kKey[i]; }) : nullptr;
  const double dropout = all ? 0.5 : 0;
  const pynn::Zoneout zoneout{all ? 0.25 : 0, all ? 0.5 : 0, training};
  const pynn::LayerNormLstmWeights<T> weights{some(all, width), some(all, width), some(all, width),
                                              some(all, units), some(all, units), some(all, width - units)};
  const T *ih = run.normals<T>(kSteps * kBatch * width), *hh = run.normals<T>(kSteps * kBatch * width);
  T *output = run.output<T>(kSteps * row), *h = copy_of(run.normals<T>(row), row);
  A *c = copy_of(run.normals<A>(row), row), *cells = copy_of(run.normals<A>(kSteps * row), kSteps * row);
  const size_t statistics_size = all ? size_t(kSteps * kBatch * pynn::kStatistics) : 0;
  A* statistics = all ? copy_of(run.normals<A>(statistics_size), statistics_size) : nullptr;
  T* operand = all ? run.output<T>(row) : nullptr;
  if (all) Lstm::drop(h, operand, 1, key, dropout, s, nullptr);
  A* scratch = run.scratch<A>(size_t(Lstm::scratch_size(s, false)));
  for (int64_t step = 0; step < kSteps; ++step) {
    const int64_t t = reverse ? kSteps - 1 - step : step;
    Lstm::fwd({weights, ih, hh + t * kBatch * s.width(), lengths, key, 1e-5, dropout, zoneout, output, h, c, operand,
               cells, statistics},
              s, t, scratch, nullptr);
  }
  A *grad_h = copy_of(run.normals<A>(row), row), *grad_c = copy_of(run.normals<A>(row), row);
  T* grad_ih = run.output<T>(kSteps * kBatch * width);
  T* grad_hh = all ? run.output<T>(kSteps * kBatch * width) : grad_ih;
  const auto places = pynn::LayerNormLstmSums::of(s, weights);
  const size_t sums_size = size_t(Lstm::sum_rows(s) * places.width);
  A* sums = copy_of(run.normals<A>(sums_size), sums_size);
  const T* grad_output = some(all, kSteps * row);
  const A *c0 = run.normals<A>(row), *grad_operand = run.normals<A>(row);
  scratch = run.scratch<A>(size_t(Lstm::scratch_size(s, true)));
  for (int64_t step = 0; step <= kSteps; ++step) {
    const int64_t t = step == kSteps ? -1 : reverse ? step : kSteps - 1 - step;
    Lstm::bwd({weights, grad_output, ih, hh, c0, cells, statistics, lengths, key, dropout, zoneout,
               step ? grad_operand : nullptr, grad_h, grad_c, grad_ih, grad_hh, sums},
              s, t, scratch, nullptr);
  }
}

void launch_all(Run& run) {
  launchers::for_each_type(run, [&]<class T>(T) {
    launch_case<T>(run, 7, true, false, true, false);
    launch_case<T>(run, 300, true, true, true, true);
    launch_case<T>(run, 5, false, false, false, false);
    launch_case<T>(run, 3, true, false, false, true);
  });
}

const launchers::Op op{"layer_norm_lstm", &launch_all};

}  // namespace
