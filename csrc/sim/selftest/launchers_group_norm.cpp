// Every launcher of csrc/include/group_norm.h: groups in registers and groups in parts, runs and columns, tails,
// unaligned tensors, more partial results than one kernel adds, more samples than one kernel adds, large means.
#include "group_norm.h"
#include "launchers.h"

namespace {

using launchers::Run;
using pynn::GroupNormShape;

struct Case {
  GroupNormShape shape;
  bool affine = true, far = false;
  size_t misaligned = 0;  // elements by which every large tensor is moved off its 16-byte boundary
};
constexpr Case kSmall[] = {
    // batch, groups, width, pixels, channels_last, silu
    {{2, 2, 3, 1, false, true}},         {{3, 1, 2, 16, false, false}, false},
    {{2, 3, 2, 35, false, true}},        {{2, 2, 4, 64, false, true}, true, true, 1},
    {{2, 1, 1, 5200, false, false}},     {{2, 2, 8, 9, true, true}, true, true},
    {{1, 3, 5, 33, true, false}, false}, {{2, 1, 16, 40, true, true}, true, false, 1},
};
constexpr Case kLarge[] = {
    {{1, 1, 2, 70000, false, true}, true, true},
    {{2, 1, 40, 1100, true, false}},
    {{260, 1, 2, 2, false, true}},
};

template <class T>
void launch_case(Run& run, const Case& c) {
  using GroupNorm = launch::GroupNorm<T>;
  using A = pynn::accumulate_t<T>;
  const GroupNormShape& s = c.shape;
  const size_t size = size_t(s.batch * s.channels() * s.pixels), channels = size_t(s.channels()),
               items = size_t(s.batch * s.groups);
  // Elements in front of an unaligned output stay as they were: not part of the results.
  const auto output = [&] {
    T* memory = run.output<T>(size + c.misaligned);
    memset(static_cast<void*>(memory), 0, c.misaligned * sizeof(T));
    return memory + c.misaligned;
  };
  const T* dy = run.normals<T>(size + c.misaligned) + c.misaligned;
  const T* x = run.normals<T>(size + c.misaligned) + c.misaligned;
  const A* weight = c.affine ? run.normals<A>(channels) : nullptr;
  const A* bias = c.affine ? run.normals<A>(channels) : nullptr;
  double* scratch = run.scratch<double>(size_t(GroupNorm::fwd_scratch(s, true)));
  GroupNorm::fwd(x, weight, bias, 1e-5, output(), run.output<A>(items), run.output<A>(items), scratch, s, nullptr);
  scratch = run.scratch<double>(size_t(GroupNorm::fwd_scratch(s, false)));
  GroupNorm::fwd(x, nullptr, nullptr, 1e-5, nullptr, run.output<A>(items), run.output<A>(items), scratch, s, nullptr);
  const A* mean = run.input<A>(items, [&](size_t i) { return A(i % 2 && c.far ? 3 : 0.25); });
  const A* rstd = run.input<A>(items, [](size_t) { return A(1); });
  scratch = run.scratch<double>(size_t(GroupNorm::bwd_scratch(s)));
  A *dweight = run.output<A>(channels), *dbias = run.output<A>(channels);
  GroupNorm::bwd(dy, x, weight, bias, mean, rstd, output(), dweight, dbias, scratch, s, nullptr);
}

void launch_all(Run& run) {
  launchers::for_each_type(run, [&]<class T>(T) {
    for (const Case& c : kSmall) launch_case<T>(run, c);
  });
  for (const Case& c : kLarge) launch_case<pynn::BFloat16>(run, c);
}

const launchers::Op op{"group_norm", &launch_all};

}  // namespace
