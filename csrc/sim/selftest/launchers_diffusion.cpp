// Every launcher of csrc/include/diffusion.h on small odd shapes: rows that begin inside a pack, tails, one row for
// all, many rows in one block, more blocks than one, unaligned tensors, timesteps outside of the table.
#include "diffusion.h"
#include "launchers.h"

namespace {

using launchers::Run;
using pynn::DiffusionShape;

struct Case {
  int64_t batch, inner;
  bool t_per_row, key_per_row;
  size_t misaligned = 0;  // elements by which every large tensor is moved off its 16-byte boundary
};
constexpr Case kCases[] = {
    {1, 1, false, false},   {3, 7, true, true},    {2, 1032, true, true},    {1100, 1, true, false},
    {2, 2049, false, true}, {5, 64, false, false}, {3, 203, true, false, 1}, {70, 33, true, true, 1},
};

template <class T>
struct Operands {
  Run& run;
  const Case& c;
  DiffusionShape shape;
  size_t size;
  const int64_t *t, *s, *key;
  const double* table;

  Operands(Run& run, const Case& c, int columns)
      : run(run),
        c(c),
        shape{c.batch, c.inner, c.t_per_row ? c.batch : 1, c.key_per_row ? c.batch : 1, 5},
        size(size_t(c.batch * c.inner)) {
    const int64_t timesteps = shape.timesteps;
    // Every sixth timestep is none of the table's.
    t = run.input<int64_t>(size_t(shape.t_count), [=](size_t i) { return int64_t(i) % (timesteps + 1); });
    s = run.input<int64_t>(size_t(shape.t_count), [=](size_t i) { return int64_t(i) % (timesteps + 1) - 1 - i % 2; });
    key = run.input<int64_t>(2 * size_t(shape.key_count), [](size_t i) { return int64_t(3 * i + 1); });
    // Rows fall from near 1 to near 0, the second column the other way: right for every kind of table.
    table = run.input<double>(size_t(columns) * size_t(timesteps + 1), [=](size_t i) {
      const double level = double(i / size_t(columns)) / double(timesteps + 2);
      return i % 2 ? level : 1 - level;
    });
  }

  const T* normals() { return run.normals<T>(size + c.misaligned) + c.misaligned; }
  // Elements in front of an unaligned output stay as they were: not part of the results.
  T* output() {
    T* memory = run.output<T>(size + c.misaligned);
    memset(static_cast<void*>(memory), 0, c.misaligned * sizeof(T));
    return memory + c.misaligned;
  }
  pynn::DiffusionNoise<T> given() { return {normals(), nullptr}; }
  pynn::DiffusionNoise<T> made() const { return {nullptr, key}; }
};

template <class T>
void launch_case(Run& run, const Case& c) {
  using Diffusion = launch::Diffusion<T>;
  using C = pynn::accumulate_t<T>;
  {
    Operands<T> o(run, c, pynn::kForwardColumns);
    Diffusion::normal(o.output(), o.key, o.shape, nullptr);
    Diffusion::forward_jump_fwd(o.output(), o.output(), o.normals(), o.t, nullptr, o.table, o.made(), o.shape, nullptr);
    Diffusion::forward_jump_fwd(o.output(), nullptr, o.normals(), o.t, o.s, o.table, o.given(), o.shape, nullptr);
    Diffusion::forward_jump_bwd(o.output(), o.normals(), o.t, o.s, o.table, false, o.shape, nullptr);
    Diffusion::forward_jump_bwd(o.output(), o.normals(), o.t, nullptr, o.table, true, o.shape, nullptr);
  }
  {
    Operands<T> o(run, c, pynn::kReverseColumns);
    const pynn::ReverseClip clip{true, -1, 1}, no_clip{false, 0, 0};
    Diffusion::reverse_step_fwd(o.output(), o.output(), o.normals(), o.normals(), nullptr, o.t, o.table, clip, o.made(),
                                o.shape, nullptr);
    Diffusion::reverse_step_fwd(o.output(), nullptr, o.normals(), o.normals(), o.normals(), o.t, o.table, no_clip,
                                o.given(), o.shape, nullptr);
    Diffusion::reverse_step_bwd(o.output(), o.output(), nullptr, o.normals(), o.normals(), o.normals(), nullptr, o.t,
                                o.table, clip, o.made(), o.shape, nullptr);
    Diffusion::reverse_step_bwd(o.output(), o.output(), o.output(), o.normals(), o.normals(), o.normals(), o.normals(),
                                o.t, o.table, no_clip, o.made(), o.shape, nullptr);
  }
  {
    Operands<T> o(run, c, pynn::kLossColumns);
    const C* dloss = run.input<C>(size_t(c.batch), [](size_t i) { return C(1 + i % 3); });
    double* partial = run.scratch<double>(size_t(launch::loss_partial_sums(o.shape)));
    Diffusion::loss_fwd(run.output<C>(size_t(c.batch)), partial, o.normals(), o.normals(), o.t, o.table, o.made(),
                        o.shape, nullptr);
    Diffusion::loss_bwd(o.output(), o.output(), dloss, o.normals(), o.normals(), o.t, o.table, o.given(), o.shape,
                        nullptr);
    Diffusion::loss_bwd(o.output(), nullptr, dloss, o.normals(), o.normals(), o.t, o.table, o.made(), o.shape, nullptr);
  }
}

void launch_all(Run& run) {
  launchers::for_each_type(run, [&]<class T>(T) {
    for (const Case& c : kCases) launch_case<T>(run, c);
  });
}

const launchers::Op op{"diffusion", &launch_all};

}  // namespace
