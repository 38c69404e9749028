// group_norm on the CPU.
//
// Statistics take one pass over a group, the moments around 0; where the mean turns out large against the deviations, a
// second pass around the mean follows, so a large mean costs no digits.
// Sums run in fp32 lanes for at most kFlush steps and move to double. The normalised value is (x - center) * scale +
// shift in fp32; center is the rounded mean when the mean is large (then the difference is exact) and 0 otherwise, and
// shift, computed in double, carries what center leaves of the mean.
//
// (N, C, pixels): one task is one group, a contiguous run, or several small ones; coefficients are broadcast per
// channel. (N, pixels, C): one task is a block of whole groups of one sample, as many as the second-level cache holds,
// if it can be the sample; lanes are channels. A group wider than kColumns is a block of its own, walked in chunks of
// kColumns channels. With an activation, the gradient before it (dz) is kept from the pass that sums it up for the one
// that writes dx. Results that would not stay in the caches are written past them.
// A task owns its groups' statistics and its part of y or dx; the backward leaves per-sample channel sums in scratch,
// which a last step adds over samples in order. So no result depends on the number of threads.
#include "group_norm.h"

#include <vector>

#include "group_norm_loops.h"
#include "parallel.h"

namespace pynn::cpu {
namespace {

using namespace group_norm;

constexpr int64_t kTaskElements = 16384;    // elements that are worth another thread
constexpr int64_t kKeptBytes = 512 << 10;   // of dz, in the second-level cache
constexpr int64_t kInputBytes = 448 << 10;  // of x, read twice, likewise

// Statistics of groups, for loops over groups: divisions and roots of one group after the other would wait.
template <int64_t kMost>
struct GroupLists {
  double center[kMost], delta[kMost], rstd[kMost];
  double weighted[2][kMost];  // backward: sums of weight * dz and of weight * dz * (x - mean) * rstd
  GroupStats operator[](int64_t g) const { return {delta[g], rstd[g], center[g]}; }
};

// moments(centers, first, second) sums up x - center and its square. The first sums are around 0; where that is so far
// from the mean that the variance lost digits, they are taken again around the mean.
template <class A, int64_t kMost, class Moments>
void compute_statistics(int64_t groups, double count, double eps, GroupLists<kMost>& s, A* mean, A* rstd,
                        const Moments& moments) {
  double first[kMost], second[kMost];
  std::fill_n(s.center, groups, 0.0);
  moments(s.center, first, second);
  bool again = false;
  for (int64_t g = 0; g < groups; ++g)
    if (first[g] * first[g] > 0.5 * count * second[g]) again = true, s.center[g] = A(first[g] / count);
  if (again) moments(s.center, first, second);
  for (int64_t g = 0; g < groups; ++g) {
    const double delta = (s.center[g] * count + first[g]) / count - s.center[g];  // exact for small integers
    const double variance = (second[g] - first[g] * delta) / count;
    s.delta[g] = delta;
    s.rstd[g] = 1 / sqrt((variance < 0 ? 0 : variance) + eps);
  }
  for (int64_t g = 0; g < groups; ++g) {
    const GroupStats r = recenter<A>(s[g]);
    mean[g] = A(s.center[g] + s.delta[g]), rstd[g] = A(s.rstd[g]);
    s.center[g] = r.center, s.delta[g] = r.delta;
  }
}

// The same in the backward pass, from what forward left; moments(centers, first) where the mean is large.
template <class A, int64_t kMost, class Moments>
void read_statistics(int64_t groups, double count, const A* mean, const A* rstd, GroupLists<kMost>& s,
                     const Moments& moments) {
  bool centered = false;
  for (int64_t g = 0; g < groups; ++g) {
    s.center[g] = center_of<A>(mean[g], rstd[g]), s.rstd[g] = rstd[g];
    s.delta[g] = mean[g] - s.center[g];
    s.weighted[0][g] = s.weighted[1][g] = 0;
    centered |= s.center[g] != 0;
  }
  if (!centered) return;
  double first[kMost];
  moments(s.center, first);
  for (int64_t g = 0; g < groups; ++g)
    if (s.center[g] != 0) s.delta[g] = first[g] / count;
}

// What both layouts share. A task's groups follow each other in the batch, `first_group` is the first of them; its
// channels come in chunks, whose columns `first` .. first + count are counted from the task's first channel.
template <class T>
struct Channels {
  using A = accumulate_t<T>;
  const GroupNormShape& shape;
  const A *weight, *bias;

  // Calls body(first, count) for the chunks of that many groups.
  template <class Body>
  void each_chunk(int64_t groups, const Body& body) const {
    const int64_t channels = groups * shape.width;
    for (int64_t c = 0; c < channels; c += kColumns<T>) body(c, std::min(channels - c, kColumns<T>));
  }
  // Calls body(g, begin, end) for the groups of a chunk: g counted from the task's first group, columns from the
  // chunk's first.
  template <class Body>
  void each_group(int64_t first, int64_t count, const Body& body) const {
    for (int64_t g = first / shape.width; g * shape.width < first + count; ++g)
      body(g, std::max<int64_t>(g * shape.width - first, 0), std::min((g + 1) * shape.width - first, count));
  }
  // Calls body(begin, end, c) for the columns of a chunk that are of one sample; column j is its channel c + j.
  template <class Body>
  void each_sample(int64_t first_group, int64_t first, int64_t count, const Body& body) const {
    int64_t c = (first_group * shape.width + first) % shape.channels();
    for (int64_t j = 0; j < count; c = 0) {
      const int64_t end = std::min(count, j + shape.channels() - c);
      body(j, end, c - j);
      j = end;
    }
  }

  template <int64_t kMost>
  void set_forward(int64_t first_group, const GroupLists<kMost>& lists, int64_t first, int64_t count,
                   Coefficients<T>& k) const {
    each_group(first, count, [&](int64_t g, int64_t begin, int64_t end) {
      fill_columns(k.center, begin, end, A(lists.center[g]));
      fill_columns(k.delta, begin, end, lists.delta[g]);
      fill_columns(k.rstd, begin, end, lists.rstd[g]);
    });
    each_sample(first_group, first, count, [&](int64_t begin, int64_t end, int64_t c) {
      for (int64_t j = begin; j < end; ++j) {
        const Affine values = affine({k.delta[j], k.rstd[j], 0}, weight, bias, c + j);
        k.scale[j] = A(values.scale), k.shift[j] = A(values.shift);
      }
    });
  }
  // Sums of dz and dz * (x - center) of a chunk's channels go to to_dz and to_dzx, with (x - mean) * rstd instead, and
  // into the sums of their groups, weighted. The sums given are used up.
  template <int64_t kMost>
  void finish_sums(int64_t first_group, GroupLists<kMost>& lists, int64_t first, int64_t count,
                   const Coefficients<T>& k, double* sum_dz, double* sum_dzx, double* to_dz, double* to_dzx) const {
    to_dz += first_group * shape.width + first, to_dzx += first_group * shape.width + first;
    each_sample(first_group, first, count, [&](int64_t begin, int64_t end, int64_t c) {
      for (int64_t j = begin; j < end; ++j) {
        const double dz = sum_dz[j], dzx = (sum_dzx[j] - k.delta[j] * dz) * k.rstd[j],
                     w = weight ? weight[c + j] : A(1);
        to_dz[j] = dz, to_dzx[j] = dzx;
        sum_dz[j] = w * dz, sum_dzx[j] = w * dzx;
      }
    });
    each_group(first, count, [&](int64_t g, int64_t begin, int64_t end) {
      double dz = lists.weighted[0][g], dzx = lists.weighted[1][g];
      for (int64_t j = begin; j < end; ++j) dz += sum_dz[j], dzx += sum_dzx[j];
      lists.weighted[0][g] = dz, lists.weighted[1][g] = dzx;
    });
  }
  // From the weighted sums to what they contribute to dx: slope * (x - center) + constant.
  template <int64_t kMost>
  void finish_groups(GroupLists<kMost>& lists, int64_t groups) const {
    for (int64_t g = 0; g < groups; ++g) {
      const Sums weighted = {lists.weighted[0][g], lists.weighted[1][g]};
      const Affine back = backward_affine(lists[g], weighted, double(shape.group_size()));
      lists.weighted[0][g] = back.scale, lists.weighted[1][g] = back.shift;
    }
  }
  template <int64_t kMost>
  void set_backward(const GroupLists<kMost>& lists, int64_t first, int64_t count, Coefficients<T>& k) const {
    each_group(first, count, [&](int64_t g, int64_t begin, int64_t end) {
      fill_columns(k.slope, begin, end, A(lists.weighted[0][g]));
      fill_columns(k.constant, begin, end, A(lists.weighted[1][g]));
    });
  }
};

// Where dz of a task, in the compute type, waits for the second pass, which then does not compute it again: in dx, or
// in memory of this thread; nullptr where that would be too much for the cache.
template <class A, class T>
A* kept_memory(T* dx, int64_t count) {
  if constexpr (std::is_same_v<A, T>) return dx;
  if (count * int64_t(sizeof(A)) > kKeptBytes) return nullptr;
  thread_local std::vector<A> memory;
  if (int64_t(memory.size()) < count) memory.resize(size_t(count));
  return memory.data();
}

// Calls body with the value as std::bool_constant.
template <class Body>
void with_constant(bool value, const Body& body) {
  value ? body(std::true_type{}) : body(std::false_type{});
}

// ---------------------------------------------------------------- (N, C, pixels)

template <bool kSilu, class T>
struct Contiguous : Channels<T> {
  using A = accumulate_t<T>;
  using Channels<T>::shape;

  // A task takes several small groups, one step for all of them after the other: a group's few operations on scalars,
  // each of which waits for the last, then run beside those of the next group.
  static constexpr int64_t kTogether = 8;
  int64_t block() const {
    const int64_t groups = std::min(kTaskElements / 2 / shape.group_size(), kColumns<T> / shape.width);
    return std::clamp<int64_t>(groups, 1, kTogether);
  }
  int64_t groups() const { return shape.batch * shape.groups; }
  int64_t tasks() const { return (groups() + block() - 1) / block(); }
  int64_t task_elements() const { return block() * shape.group_size(); }
  bool whole_vectors() const { return shape.pixels % kComputeLanes<T> == 0; }

  template <bool kSecond>
  void moments(int64_t count, const T* x, const double* centers, double* first, double* second) const {
    const int64_t size = shape.group_size();
    add_lanes_of(count, first, second, [&](int64_t i) __attribute__((always_inline)) {
      return run_moments<kSecond>(x + i * size, size, A(centers[i]));
    });
  }

  void forward(int64_t task, const T* x, double eps, T* y, A* mean, A* rstd, bool stream) const {
    const int64_t size = shape.group_size(), group = task * block(), count = std::min(block(), groups() - group);
    x += group * size;
    GroupLists<kTogether> lists;
    compute_statistics(
        count, double(size), eps, lists, mean + group, rstd + group,
        [&](const double* centers, double* first, double* second) { moments<true>(count, x, centers, first, second); });
    if (!y) return;
    y += group * size;
    this->each_chunk(count, [&](int64_t first, int64_t channels) {
      Coefficients<T> k(channels);
      this->set_forward(group, lists, first, channels, k);
      const int64_t at = first * shape.pixels;
      with_constant(stream, [&](auto streams) {
        run_forward<kSilu, streams>(x + at, y + at, channels, shape.pixels, k, count * size);
      });
    });
  }

  void backward(int64_t task, const T* dy, const T* x, const A* mean, const A* rstd, T* dx, double* sum_dz,
                double* sum_dzx, bool stream) const {
    const int64_t size = shape.group_size(), group = task * block(), count = std::min(block(), groups() - group);
    dy += group * size, x += group * size, dx += group * size;
    GroupLists<kTogether> lists;
    read_statistics(count, double(size), mean + group, rstd + group, lists, [&](const double* centers, double* first) {
      double unused[kTogether];
      moments<false>(count, x, centers, first, unused);
    });
    A* const kept = kSilu ? kept_memory<A>(dx, count * size) : nullptr;
    with_constant(kept, [&](auto keep) {
      constexpr bool kKeep = kSilu && keep;
      Coefficients<T> k(std::min(count * shape.width, kColumns<T>));
      this->each_chunk(count, [&](int64_t first, int64_t channels) {
        double dz[kColumns<T>], dzx[kColumns<T>];
        this->set_forward(group, lists, first, channels, k);
        const int64_t at = first * shape.pixels;
        run_backward_sums<kSilu, kKeep>(dy + at, x + at, kept + at, channels, shape.pixels, k, dz, dzx);
        this->finish_sums(group, lists, first, channels, k, dz, dzx, sum_dz, sum_dzx);
      });
      this->finish_groups(lists, count);
      this->each_chunk(count, [&](int64_t first, int64_t channels) {
        if (count * shape.width > kColumns<T>) this->set_forward(group, lists, first, channels, k);
        this->set_backward(lists, first, channels, k);
        const int64_t at = first * shape.pixels;
        with_constant(stream && !(kKeep && std::is_same_v<T, A>), [&](auto streams) {
          run_backward<kSilu, kKeep, streams>(dy + at, x + at, kept + at, dx + at, channels, shape.pixels, k);
        });
      });
    });
  }
};

// ---------------------------------------------------------------- (N, pixels, C)

template <bool kSilu, class T>
struct ChannelsLast : Channels<T> {
  using A = accumulate_t<T>;
  using Channels<T>::shape;
  static constexpr int64_t kMost = kColumns<T>;  // groups of a task
  int64_t block;

  // Groups that one task takes: x of a task fits the second-level cache, a whole sample if it can be; fewer where
  // threads would be idle. Every group is summed on its own, so this shows in no result.
  int64_t groups_per_block() const {
    constexpr int64_t kLeast = 64;
    const int64_t group_bytes = shape.group_size() * int64_t(sizeof(T));
    const int64_t wanted = (thread_count() + shape.batch - 1) / shape.batch;
    const int64_t groups = std::min({kInputBytes / group_bytes, kMost / shape.width, shape.groups / wanted});
    return std::clamp<int64_t>(groups, std::min(shape.groups, (kLeast - 1) / shape.width + 1), shape.groups);
  }
  int64_t blocks() const { return (shape.groups + block - 1) / block; }
  int64_t tasks() const { return shape.batch * blocks(); }
  int64_t task_elements() const { return block * shape.group_size(); }
  bool whole_vectors() const {
    return shape.channels() % kComputeLanes<T> == 0 && block * shape.width % kComputeLanes<T> == 0;
  }

  ChannelsLast(const GroupNormShape& shape, const A* weight, const A* bias)
      : Channels<T>{shape, weight, bias}, block(groups_per_block()) {}

  // The groups of one task: their number, the first of them in the batch, where x begins.
  struct Part {
    int64_t groups, first, offset;
  };
  Part part(int64_t task) const {
    const int64_t sample = task / blocks(), first = task % blocks() * block;
    return {std::min(block, shape.groups - first), sample * shape.groups + first,
            sample * shape.pixels * shape.channels() + first * shape.width};
  }

  // Each group's sums of x - center and its square (kSecond).
  template <bool kSecond>
  void moments(int64_t groups, const T* x, const double* group_centers, double* group_first,
               double* group_second) const {
    std::fill_n(group_first, groups, 0.0), std::fill_n(group_second, groups, 0.0);
    this->each_chunk(groups, [&](int64_t first, int64_t count) {
      A centers[kColumns<T>];
      store(centers + (count - 1) / kComputeLanes<T> * kComputeLanes<T>, Vec<A>{});
      this->each_group(first, count, [&](int64_t g, int64_t begin, int64_t end) {
        std::fill(centers + begin, centers + end, A(group_centers[g]));
      });
      ColumnSums<T> sums(count);
      Block<T>(shape, count).template moments<kSecond>(x + first, centers, sums);
      this->each_group(first, count, [&](int64_t g, int64_t begin, int64_t end) {
        Sums total;
        for (int64_t c = begin; c < end; ++c) total.first += sums.first[c], total.second += sums.second[c];
        group_first[g] += total.first, group_second[g] += total.second;
      });
    });
  }

  void forward(int64_t task, const T* x, double eps, T* y, A* mean, A* rstd, bool stream) const {
    const Part p = part(task);
    x += p.offset;
    GroupLists<kMost> lists;
    compute_statistics(p.groups, double(shape.group_size()), eps, lists, mean + p.first, rstd + p.first,
                       [&](const double* centers, double* first, double* second) {
                         moments<true>(p.groups, x, centers, first, second);
                       });
    if (!y) return;
    y += p.offset;
    this->each_chunk(p.groups, [&](int64_t first, int64_t chunk) {
      Coefficients<T> k(chunk);
      this->set_forward(p.first, lists, first, chunk, k);
      with_constant(stream, [&](auto streams) {
        Block<T>(shape, chunk).template forward<kSilu, streams>(x + first, y + first, k);
      });
    });
  }

  void backward(int64_t task, const T* dy, const T* x, const A* mean, const A* rstd, T* dx, double* sum_dz,
                double* sum_dzx, bool stream) const {
    const Part p = part(task);
    dy += p.offset, x += p.offset, dx += p.offset;
    GroupLists<kMost> lists;
    read_statistics(p.groups, double(shape.group_size()), mean + p.first, rstd + p.first, lists,
                    [&](const double* centers, double* first) {
                      double unused[kMost];
                      moments<false>(p.groups, x, centers, first, unused);
                    });
    const int64_t stride = std::is_same_v<T, A> ? shape.channels() : p.groups * shape.width;  // of what is kept
    A* const kept = kSilu ? kept_memory<A>(dx, stride * shape.pixels) : nullptr;
    with_constant(kept, [&](auto keep) {
      constexpr bool kKeep = kSilu && keep;
      Coefficients<T> k(std::min(p.groups * shape.width, kColumns<T>));
      this->each_chunk(p.groups, [&](int64_t first, int64_t chunk) {
        ColumnSums<T> sums(chunk);
        this->set_forward(p.first, lists, first, chunk, k);
        Block<T>(shape, chunk)
            .template backward_sums<kSilu, kKeep>(dy + first, x + first, kept + first, stride, k, sums);
        this->finish_sums(p.first, lists, first, chunk, k, sums.first, sums.second, sum_dz, sum_dzx);
      });
      this->finish_groups(lists, p.groups);
      this->each_chunk(p.groups, [&](int64_t first, int64_t chunk) {
        if (p.groups * shape.width > kColumns<T>) this->set_forward(p.first, lists, first, chunk, k);
        this->set_backward(lists, first, chunk, k);
        with_constant(stream && !(kKeep && std::is_same_v<T, A>), [&](auto streams) {
          Block<T>(shape, chunk)
              .template backward<kSilu, kKeep, streams>(dy + first, x + first, kept + first, stride, dx + first, k);
        });
      });
    });
  }
};

// Calls body(tasks) with the walker for this layout and activation.
template <class T, class Body>
void with_layout(const GroupNormShape& shape, const accumulate_t<T>* weight, const accumulate_t<T>* bias,
                 const Body& body) {
  if (shape.channels_last || shape.pixels == 1) {
    if (shape.silu) return body(ChannelsLast<true, T>{shape, weight, bias});
    return body(ChannelsLast<false, T>{shape, weight, bias});
  }
  if (shape.silu) return body(Contiguous<true, T>{{shape, weight, bias}});
  return body(Contiguous<false, T>{{shape, weight, bias}});
}

// Calls body(task, stream) for the walker's tasks; stream: whether they write `to` past the caches.
template <class Walker, class T, class Body>
void each_task(const Walker& walker, const T* to, const Body& body) {
  const int64_t bytes = walker.shape.batch * walker.shape.channels() * walker.shape.pixels * int64_t(sizeof(T));
  const bool stream = bytes >= kStreamBytes && walker.whole_vectors() &&
                      reinterpret_cast<uintptr_t>(to) % (sizeof(T) * kComputeLanes<T>) == 0;
  const int64_t grain = std::max<int64_t>(1, kTaskElements / walker.task_elements());
  parallel_for(walker.tasks(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task, stream);
    if (stream) stream_end();
  });
}

// out[c] = sum over samples of sums[n][c]
template <class A>
void add_samples(const double* sums, A* out, int64_t batch, int64_t channels) {
  constexpr int64_t kBlock = 64;
  parallel_for((channels + kBlock - 1) / kBlock, 1 + kTaskElements / (kBlock * batch + 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t first = begin * kBlock; first < std::min(channels, end * kBlock); first += kBlock) {
                   const int64_t count = std::min(channels - first, kBlock);
                   double total[kBlock] = {};
                   for (int64_t n = 0; n < batch; ++n)
                     for (int64_t c = 0; c < count; ++c) total[c] += sums[n * channels + first + c];
                   for (int64_t c = 0; c < count; ++c) out[first + c] = A(total[c]);
                 }
               });
}

}  // namespace

template <class T>
int64_t GroupNorm<T>::fwd_scratch(const GroupNormShape&, bool) {
  return 0;
}
template <class T>
int64_t GroupNorm<T>::bwd_scratch(const GroupNormShape& shape) {
  return 2 * shape.batch * shape.channels();
}

template <class T>
void GroupNorm<T>::fwd(const T* x, const A* weight, const A* bias, double eps, T* y, A* mean, A* rstd, double*,
                       const GroupNormShape& shape, void*) {
  with_layout<T>(shape, weight, bias, [&](const auto& walker) {
    each_task(walker, y, [&](int64_t task, bool stream) { walker.forward(task, x, eps, y, mean, rstd, stream); });
  });
}

template <class T>
void GroupNorm<T>::bwd(const T* dy, const T* x, const A* weight, const A* bias, const A* mean, const A* rstd, T* dx,
                       A* dweight, A* dbias, double* scratch, const GroupNormShape& shape, void*) {
  double *sum_dz = scratch, *sum_dzx = scratch + shape.batch * shape.channels();
  with_layout<T>(shape, weight, bias, [&](const auto& walker) {
    each_task(walker, dx, [&](int64_t task, bool stream) {
      walker.backward(task, dy, x, mean, rstd, dx, sum_dz, sum_dzx, stream);
    });
  });
  add_samples(sum_dzx, dweight, shape.batch, shape.channels());
  add_samples(sum_dz, dbias, shape.batch, shape.channels());
}

template struct GroupNorm<float>;
template struct GroupNorm<double>;
template struct GroupNorm<Half>;
template struct GroupNorm<BFloat16>;

}  // namespace pynn::cpu
