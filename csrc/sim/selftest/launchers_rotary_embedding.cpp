// The launcher of csrc/include/rotary_embedding.h: both kinds of pairs, whole packs and single elements, channels that
// stay, in place and back; compared with the formula in float64.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "launchers.h"
#include "rotary_embedding.h"

namespace {

using launchers::Run;
using pynn::RotaryEmbeddingCall;
using pynn::RotaryStrides;

struct Case {
  int64_t batch, heads, length, width, pairs;
  bool interleaved, inverse, own_tables, in_place;
};
constexpr Case kCases[] = {
    {2, 3, 5, 32, 16, false, false, false, false}, {2, 3, 5, 32, 16, true, true, true, true},
    {1, 2, 7, 13, 5, false, true, false, false},   {2, 1, 3, 13, 6, true, false, true, false},
    {1, 2, 3, 48, 8, true, false, false, true},    {1, 1, 40, 16, 8, false, false, false, false},
};

template <class T>
void launch_case(Run& run, const Case& c) {
  using F = pynn::accumulate_t<T>;
  const int64_t rows = c.batch * c.heads * c.length, count = rows * c.width;
  const T* x = run.normals<T>(size_t(count));
  T* y = run.output<T>(size_t(count));
  if (c.in_place)
    for (int64_t i = 0; i < count; ++i) y[i] = x[i];
  const size_t table = size_t((c.own_tables ? c.batch : 1) * c.length * c.pairs);
  const F* cos = run.input<F>(table, [](size_t i) { return F(std::cos(0.7 * double(i))); });
  const F* sin = run.input<F>(table, [](size_t i) { return F(std::sin(0.7 * double(i))); });
  // (batch, length, heads, width), as a projection has them.
  const RotaryStrides strides{c.length * c.heads * c.width, c.width, c.heads * c.width};
  launch::RotaryEmbedding<T>::run(
      {c.in_place ? y : x, y, cos, sin, strides, strides, c.own_tables ? c.length * c.pairs : 0, c.pairs, c.batch,
       c.heads, c.length, c.width, c.pairs, c.interleaved, c.inverse},
      nullptr);
  const double tolerance = sizeof(T) == 8 ? 1e-14 : sizeof(T) == 4 ? 1e-6 : 1e-2;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t position = row / c.heads, n = position / c.length;
    const int64_t angle = ((c.own_tables ? n * c.length : 0) + position % c.length) * c.pairs;
    for (int64_t d = 0; d < c.width; ++d) {
      const auto value = [&](int64_t channel) { return double(pynn::to_float(x[row * c.width + channel])); };
      double expected = value(d);
      if (d < 2 * c.pairs) {
        const int64_t pair = c.interleaved ? d / 2 : d % c.pairs;
        const bool second = c.interleaved ? d % 2 : d >= c.pairs;
        const double s = double(sin[angle + pair]) * (c.inverse ? -1 : 1);
        const int64_t partner = c.interleaved ? d ^ 1 : second ? d - c.pairs : d + c.pairs;
        expected = value(d) * double(cos[angle + pair]) + (second ? s : -s) * value(partner);
      }
      const double got = double(pynn::to_float(y[row * c.width + d]));
      if (std::fabs(got - expected) <= tolerance * (1 + std::fabs(expected))) continue;
      std::printf("rotary_embedding: y[%lld, %lld] is %g, expected %g\n", (long long)row, (long long)d, got, expected);
      std::exit(1);
    }
  }
}

void launch_all(Run& run) {
  launchers::for_each_type(run, [&]<class T>(T) {
    for (const Case& c : kCases) launch_case<T>(run, c);
  });
}

const launchers::Op op{"rotary_embedding", &launch_all};

}  // namespace
