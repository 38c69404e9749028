// group_norm on the CPU.
//
// Statistics take one pass over a group, the moments around a guess of the mean from a few of its elements, so a large
// mean costs no digits; a second pass around the mean follows where the guess turns out far from it.
// Sums run in fp32 lanes for at most kFlush steps and move to double. The normalised value is (x - center) * scale +
// shift in fp32; center is the rounded mean when the mean is large (then the difference is exact) and 0 otherwise, and
// shift, computed in double, carries what center leaves of the mean.
//
// (N, C, pixels): one task is one group, a contiguous run, or several small ones; coefficients are broadcast per
// channel. (N, pixels, C): one task is a block of whole groups of one sample, as many as the second-level cache holds;
// lanes are
//                 channels. A group wider than kColumns is a block of its own, walked in chunks of kColumns channels.
// A task owns its groups' statistics and its part of y or dx; the backward leaves per-sample channel sums in scratch,
// which a last step adds over samples in order. So no result depends on the number of threads.
#include "group_norm.h"

#include "group_norm_loops.h"
#include "parallel.h"

namespace pynn::cpu {
namespace {

using namespace group_norm;

constexpr int64_t kTaskElements = 16384;  // elements that are worth another thread

// Statistics from the moments around a guess.
GroupStats stats_around(double guess, const Sums& moments, double count, double eps) {
  const double delta = (guess * count + moments.first) / count - guess;  // exact for small integers
  const double variance = (moments.second - moments.first * delta) / count;
  return {delta, 1 / sqrt((variance < 0 ? 0 : variance) + eps), guess};
}
// Whether the guess is so far from the mean that the variance lost digits.
bool is_poor(const Sums& moments, double count) { return moments.first * moments.first > 0.5 * count * moments.second; }

template <class A>
void set_affine(const GroupStats& stats, const A* weight, const A* bias, int64_t first, int64_t channels, A* scales,
                A* shifts) {
  for (int64_t c = 0; c < channels; ++c) {
    const Affine values = affine(stats, weight, bias, first + c);
    scales[c] = A(values.scale), shifts[c] = A(values.shift);
  }
}

// ---------------------------------------------------------------- (N, C, pixels)

template <bool kSilu, class T>
struct Contiguous {
  using A = accumulate_t<T>;
  static constexpr bool kKeep = kSilu && std::is_same_v<T, A>;  // dz fits dx without rounding
  const GroupNormShape& shape;
  const A *weight, *bias;

  // A task takes several small groups, one step for all of them after the other: a group's few operations on scalars,
  // each of which waits for the last, then run beside those of the next group.
  static constexpr int64_t kTogether = 8;
  int64_t block() const { return std::clamp<int64_t>(kTaskElements / 2 / shape.group_size(), 1, kTogether); }
  int64_t groups() const { return shape.batch * shape.groups; }
  int64_t tasks() const { return (groups() + block() - 1) / block(); }
  int64_t task_elements() const { return block() * shape.group_size(); }

  // Calls body(i, group) for the groups of a task.
  template <class Body>
  void each_group(int64_t task, const Body& body) const {
    const int64_t first = task * block(), count = std::min(block(), groups() - first);
    for (int64_t i = 0; i < count; ++i) body(i, first + i);
  }
  // Calls body(offset, channel, channels, scales, shifts) for the channels of a group, kColumns at a time; the channel
  // counts through the batch.
  template <class Body>
  void each_chunk(const GroupStats& stats, int64_t group, const Body& body) const {
    for (int64_t c = 0; c < shape.width; c += kColumns<T>) {
      const int64_t channels = std::min(kColumns<T>, shape.width - c), channel = group * shape.width + c;
      A scales[kColumns<T>], shifts[kColumns<T>];
      set_affine(stats, weight, bias, channel % shape.channels(), channels, scales, shifts);
      body(channel * shape.pixels, channel, channels, scales, shifts);
    }
  }

  void forward(int64_t task, const T* x, double eps, T* y, A* mean, A* rstd) const {
    const int64_t size = shape.group_size();
    const double count = double(size);
    A centers[kTogether];
    Sums moments[kTogether];
    GroupStats stats[kTogether];
    each_group(task, [&](int64_t i, int64_t group) { centers[i] = run_center(x + group * size, size); });
    each_group(task,
               [&](int64_t i, int64_t group) { moments[i] = run_moments<true>(x + group * size, size, centers[i]); });
    each_group(task, [&](int64_t i, int64_t group) {
      if (is_poor(moments[i], count)) {
        centers[i] = A(centers[i] + moments[i].first / count);
        moments[i] = run_moments<true>(x + group * size, size, centers[i]);
      }
      stats[i] = stats_around(centers[i], moments[i], count, eps);
      mean[group] = A(stats[i].center + stats[i].delta), rstd[group] = A(stats[i].rstd);
      stats[i] = recenter<A>(stats[i]);
    });
    each_group(task, [&](int64_t i, int64_t group) {
      each_chunk(stats[i], group, [&](int64_t at, int64_t, int64_t channels, const A* scales, const A* shifts) {
        run_forward<kSilu>(x + at, y + at, channels, shape.pixels, A(stats[i].center), scales, shifts);
      });
    });
  }

  void backward(int64_t task, const T* dy, const T* x, const A* mean, const A* rstd, T* dx, double* sum_dz,
                double* sum_dzx) const {
    const int64_t size = shape.group_size();
    const double count = double(size);
    GroupStats stats[kTogether];
    Affine back[kTogether];
    each_group(task, [&](int64_t i, int64_t group) {
      GroupStats& s = stats[i] = {double(mean[group]), double(rstd[group]), 0};
      if (center_of<A>(s.delta, s.rstd) != 0) {
        s.center = s.delta;
        s.delta = run_moments<false>(x + group * size, size, A(s.center)).first / count;
      }
    });
    each_group(task, [&](int64_t i, int64_t group) {
      const GroupStats& s = stats[i];
      Sums weighted;
      each_chunk(s, group, [&](int64_t at, int64_t c, int64_t channels, const A* scales, const A* shifts) {
        double *to_dz = sum_dz + c, *to_dzx = sum_dzx + c;
        run_backward_sums<kSilu, kKeep>(dy + at, x + at, dx + at, channels, shape.pixels, A(s.center), scales, shifts,
                                        to_dz, to_dzx);
        for (int64_t j = 0; j < channels; ++j) {
          const double w = weight ? weight[c % shape.channels() + j] : A(1);
          to_dzx[j] = (to_dzx[j] - s.delta * to_dz[j]) * s.rstd;
          weighted.first += w * to_dz[j], weighted.second += w * to_dzx[j];
        }
      });
      back[i] = backward_affine(s, weighted, count);
    });
    each_group(task, [&](int64_t i, int64_t group) {
      each_chunk(stats[i], group, [&](int64_t at, int64_t, int64_t channels, const A* scales, const A* shifts) {
        run_backward<kSilu, kKeep>(dy + at, x + at, dx + at, channels, shape.pixels, A(stats[i].center), scales, shifts,
                                   back[i]);
      });
    });
  }
};

// ---------------------------------------------------------------- (N, pixels, C)

template <bool kSilu, class T>
struct ChannelsLast {
  using A = accumulate_t<T>;
  static constexpr bool kKeep = kSilu && std::is_same_v<T, A>;
  const GroupNormShape& shape;
  const A *weight, *bias;
  int64_t block;  // groups of a task

  // Groups that one task takes: x and dx of a task fit the second-level cache; fewer where threads would be idle. Every
  // group is summed on its own, so this shows in no result.
  int64_t groups_per_block() const {
    constexpr int64_t kBytes = 256 << 10, kLeast = 64;
    const int64_t group_bytes = shape.group_size() * int64_t(sizeof(T));
    const int64_t wanted = (thread_count() + shape.batch - 1) / shape.batch;
    const int64_t groups = std::min({kBytes / group_bytes, kColumns<T> / shape.width, shape.groups / wanted});
    return std::clamp<int64_t>(groups, std::min(shape.groups, (kLeast - 1) / shape.width + 1), shape.groups);
  }
  int64_t blocks() const { return (shape.groups + block - 1) / block; }
  int64_t tasks() const { return shape.batch * blocks(); }
  int64_t task_elements() const { return block * shape.group_size(); }

  ChannelsLast(const GroupNormShape& shape, const A* weight, const A* bias)
      : shape(shape), weight(weight), bias(bias), block(groups_per_block()) {}

  // The groups of one task, and their channels in chunks.
  struct Part {
    int64_t sample, first_group, groups, first_channel, channels;
    template <class Body>
    void each_chunk(const Body& body) const {
      for (int64_t c = 0; c < channels; c += kColumns<T>) body(c, std::min(channels - c, kColumns<T>));
    }
  };
  Part part(int64_t task) const {
    const int64_t sample = task / blocks(), first = task % blocks() * block;
    const int64_t groups = std::min(block, shape.groups - first);
    return {sample, first, groups, first * shape.width, groups * shape.width};
  }
  // Calls body(g, begin, end) for the groups of a chunk: g counted from the part's first group, columns from the
  // chunk's first.
  template <class Body>
  void each_group(int64_t first, int64_t count, const Body& body) const {
    for (int64_t g = first / shape.width; g * shape.width < first + count; ++g)
      body(g, std::max<int64_t>(g * shape.width - first, 0), std::min((g + 1) * shape.width - first, count));
  }
  int64_t offset(const Part& p) const { return p.sample * shape.pixels * shape.channels() + p.first_channel; }

  // Each group's sums of x - center and its square (kSecond), with the centers of `stats`.
  template <bool kSecond>
  void moments(const Part& p, const T* x, const GroupStats* stats, ColumnSums<T>& group_sums) const {
    group_sums.reset(p.groups);
    p.each_chunk([&](int64_t first, int64_t count) {
      A centers[kColumns<T>];
      store(centers + (count - 1) / kComputeLanes<T> * kComputeLanes<T>, Vec<A>{});
      each_group(first, count, [&](int64_t g, int64_t begin, int64_t end) {
        std::fill(centers + begin, centers + end, A(stats[g].center));
      });
      ColumnSums<T> sums(count);
      Block<T>(shape, count).template moments<kSecond>(x + first, centers, sums);
      each_group(first, count, [&](int64_t g, int64_t begin, int64_t end) {
        Sums total;
        for (int64_t c = begin; c < end; ++c) total.first += sums.first[c], total.second += sums.second[c];
        group_sums.add(g, total);
      });
    });
  }

  // Centers near the means; the sample is four pixels.
  void guess_centers(const Part& p, const T* x, GroupStats* stats) const {
    const int64_t step = (shape.pixels - 1) / 3 * shape.channels();
    for (int64_t g = 0; g < p.groups; ++g) {
      double first = 0, second = 0;
      for (int64_t c = g * shape.width; c < (g + 1) * shape.width; ++c)
        for (int64_t i = 0; i < 4; ++i) {
          const double v = to_float(x[c + i * step]);
          first += v, second += v * v;
        }
      stats[g].center = guess_center<A>(first / double(4 * shape.width), second / double(4 * shape.width));
    }
  }

  void set_forward(const Part& p, const GroupStats* stats, int64_t first, int64_t count, Columns<T>& columns) const {
    each_group(first, count, [&](int64_t g, int64_t begin, int64_t end) {
      std::fill(columns.center + begin, columns.center + end, A(stats[g].center));
      set_affine(stats[g], weight, bias, p.first_channel + first + begin, end - begin, columns.scale + begin,
                 columns.shift + begin);
    });
  }

  void forward(int64_t task, const T* x, double eps, T* y, A* mean, A* rstd) const {
    const Part p = part(task);
    const double count = double(shape.group_size());
    x += offset(p), y += offset(p);
    GroupStats stats[kColumns<T>];
    ColumnSums<T> sums(p.groups);
    guess_centers(p, x, stats);
    moments<true>(p, x, stats, sums);
    bool again = false;
    for (int64_t g = 0; g < p.groups; ++g)
      if (is_poor(sums[g], count)) again = true, stats[g].center = A(stats[g].center + sums.first[g] / count);
    if (again) moments<true>(p, x, stats, sums);
    for (int64_t g = 0; g < p.groups; ++g) {
      stats[g] = stats_around(stats[g].center, sums[g], count, eps);
      const int64_t at = p.sample * shape.groups + p.first_group + g;
      mean[at] = A(stats[g].center + stats[g].delta), rstd[at] = A(stats[g].rstd);
      stats[g] = recenter<A>(stats[g]);
    }
    p.each_chunk([&](int64_t first, int64_t chunk) {
      Columns<T> columns(chunk);
      set_forward(p, stats, first, chunk, columns);
      Block<T>(shape, chunk).template forward<kSilu>(x + first, y + first, columns);
    });
  }

  void backward(int64_t task, const T* dy, const T* x, const A* mean, const A* rstd, T* dx, double* sum_dz,
                double* sum_dzx) const {
    const Part p = part(task);
    const double count = double(shape.group_size());
    dy += offset(p), x += offset(p), dx += offset(p);
    GroupStats stats[kColumns<T>];
    ColumnSums<T> sums(p.groups);
    bool centered = false;
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t at = p.sample * shape.groups + p.first_group + g;
      stats[g] = {double(mean[at]), double(rstd[at]), center_of<A>(mean[at], rstd[at])};
      centered |= stats[g].center != 0;
    }
    if (centered) {
      moments<false>(p, x, stats, sums);
      for (int64_t g = 0; g < p.groups; ++g)
        if (stats[g].center != 0) stats[g].delta = sums.first[g] / count;
    }
    sums.reset(p.groups);
    p.each_chunk([&](int64_t first, int64_t chunk) {
      Columns<T> columns(chunk);
      ColumnSums<T> channel_sums(chunk);
      set_forward(p, stats, first, chunk, columns);
      Block<T>(shape, chunk)
          .template backward_sums<kSilu, kKeep>(dy + first, x + first, dx + first, columns, channel_sums);
      const int64_t first_channel = p.first_channel + first, out = p.sample * shape.channels() + first_channel;
      each_group(first, chunk, [&](int64_t g, int64_t begin, int64_t end) {
        const GroupStats s = stats[g];
        Sums total;
        for (int64_t c = begin; c < end; ++c) {
          const double dz = channel_sums.first[c], dzx = (channel_sums.second[c] - s.delta * dz) * s.rstd;
          const double w = weight ? weight[first_channel + c] : A(1);
          sum_dz[out + c] = dz, sum_dzx[out + c] = dzx;
          total.first += w * dz, total.second += w * dzx;
        }
        sums.add(g, total);
      });
    });
    p.each_chunk([&](int64_t first, int64_t chunk) {
      Columns<T> columns(chunk);
      set_forward(p, stats, first, chunk, columns);
      each_group(first, chunk, [&](int64_t g, int64_t begin, int64_t end) {
        const Affine back = backward_affine(stats[g], sums[g], count);
        std::fill(columns.slope + begin, columns.slope + end, A(back.scale));
        std::fill(columns.constant + begin, columns.constant + end, A(back.shift));
      });
      Block<T>(shape, chunk).template backward<kSilu, kKeep>(dy + first, x + first, dx + first, columns);
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
  if (shape.silu) return body(Contiguous<true, T>{shape, weight, bias});
  return body(Contiguous<false, T>{shape, weight, bias});
}

template <class Walker, class Body>
void each_task(const Walker& walker, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kTaskElements / walker.task_elements());
  parallel_for(walker.tasks(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task);
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
int64_t GroupNorm<T>::fwd_scratch(const GroupNormShape&) {
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
    each_task(walker, [&](int64_t task) { walker.forward(task, x, eps, y, mean, rstd); });
  });
}

template <class T>
void GroupNorm<T>::bwd(const T* dy, const T* x, const A* weight, const A* bias, const A* mean, const A* rstd, T* dx,
                       A* dweight, A* dbias, double* scratch, const GroupNormShape& shape, void*) {
  double *sum_dz = scratch, *sum_dzx = scratch + shape.batch * shape.channels();
  with_layout<T>(shape, weight, bias, [&](const auto& walker) {
    each_task(walker, [&](int64_t task) { walker.backward(task, dy, x, mean, rstd, dx, sum_dz, sum_dzx); });
  });
  add_samples(sum_dzx, dweight, shape.batch, shape.channels());
  add_samples(sum_dz, dbias, shape.batch, shape.channels());
}

template struct GroupNorm<float>;
template struct GroupNorm<double>;
template struct GroupNorm<Half>;
template struct GroupNorm<BFloat16>;

}  // namespace pynn::cpu
