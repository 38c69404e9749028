// Every launcher of csrc/include/additive_attention.h: one tile and several of queries, keys and columns, each kind of
// mask with rows and columns of its own or broadcast, queries and keys that are hidden as a whole, with and without the
// weights, their gradient and that of the scores.
#include "additive_attention.h"
#include "launchers.h"

namespace {

using launchers::Run;
using pynn::AdditiveShape;
using pynn::ScoreMask;

constexpr int64_t kHeads = 2;

template <class T>
ScoreMask<T> mask_of(Run& run, const AdditiveShape& shape, typename ScoreMask<T>::Kind kind, bool broadcast) {
  using Kind = typename ScoreMask<T>::Kind;
  const int64_t rows = broadcast ? 1 : shape.queries, count = rows * shape.keys;
  ScoreMask<T> mask{kind, nullptr, {0, broadcast ? 0 : count}, broadcast ? 0 : shape.keys, 1};
  // The first query and the last key are hidden from all others where the mask has rows.
  const auto hidden = [&](size_t i) {
    return int64_t(i) % shape.keys == shape.keys - 1 || (!broadcast && int64_t(i) % count < shape.keys);
  };
  const size_t elements = size_t(broadcast ? count : kHeads * count);
  if (kind == Kind::boolean)
    mask.data = run.input<uint8_t>(elements, [&](size_t i) { return uint8_t(!hidden(i) && i % 3 != 1); });
  if (kind == Kind::floating)
    mask.data = run.input<T>(elements, [&](size_t i) {
      return pynn::from_float<T>(pynn::accumulate_t<T>(hidden(i) ? -INFINITY : double(i % 5) * 0.25));
    });
  if (kind == Kind::wide)
    mask.data = run.input<float>(elements, [&](size_t i) { return hidden(i) ? -INFINITY : float(i % 5) * 0.25f; });
  return mask;
}

template <class T>
void launch_case(Run& run, int64_t queries, int64_t keys, int64_t dim, int64_t value_dim,
                 typename ScoreMask<T>::Kind kind, bool broadcast, bool with_weights) {
  using A = pynn::accumulate_t<T>;
  using Launch = launch::AdditiveAttention<T>;
  const AdditiveShape shape{2, {1, kHeads}, kHeads, queries, keys, dim, value_dim};
  const auto size = [](int64_t rows, int64_t columns) { return size_t(kHeads * rows * columns); };
  const pynn::AdditiveOperands<T> operands{run.normals<T>(size(queries, dim)), run.normals<T>(size(keys, dim)),
                                           run.normals<T>(size(keys, value_dim)), run.normals<T>(size_t(dim)),
                                           mask_of<T>(run, shape, kind, broadcast)};
  auto* lse = run.output<pynn::attention_lse_t<T>>(size(queries, 1));
  Launch::fwd(run.output<T>(size(queries, value_dim)), lse, with_weights ? run.output<T>(size(queries, keys)) : nullptr,
              operands, shape, run.scratch<char>(size_t(Launch::fwd_scratch(shape))), nullptr);
  const pynn::AdditiveSaved<T> saved{run.normals<T>(size(queries, value_dim)),
                                     with_weights ? run.normals<T>(size(queries, keys)) : nullptr, lse};
  const pynn::AdditiveGradients<T> gradients{run.output<T>(size(queries, dim)), run.output<T>(size(keys, dim)),
                                             run.output<T>(size(keys, value_dim)), run.output<T>(size_t(dim)),
                                             with_weights ? run.output<A>(size(queries, keys)) : nullptr};
  Launch::bwd(gradients, saved, operands, shape, run.scratch<char>(size_t(Launch::bwd_scratch(shape))), nullptr);
}

void launch_all(Run& run) {
  launchers::for_each_type(run, [&]<class T>(T) {
    using Kind = typename ScoreMask<T>::Kind;
    launch_case<T>(run, 3, 5, 7, 4, Kind::none, false, false);
    launch_case<T>(run, 11, 40, 70, 33, Kind::boolean, false, true);
    launch_case<T>(run, 9, 33, 5, 3, Kind::floating, true, true);
    launch_case<T>(run, 2, 70, 3, 35, Kind::wide, false, false);
  });
}

const launchers::Op op{"additive_attention", &launch_all};

}  // namespace
