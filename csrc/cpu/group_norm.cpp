// group_norm on the CPU.
//
// Statistics take two passes over a group: the mean, then the second moment around it, so a large mean costs no digits.
// Sums run in fp32 lanes for at most kFlush steps and move to double. The normalised value is (x - center) * scale +
// shift in fp32; center is the rounded mean when the mean is large (then the difference is exact) and 0 otherwise, and
// shift, computed in double, carries what center leaves of the mean.
//
// (N, C, pixels): one task is one group, a contiguous run; coefficients are broadcast per channel.
// (N, pixels, C): one task is a block of whole groups of one sample, about kColumns channels wide; lanes are channels,
//                 coefficients are vectors held in registers over all pixels. A group wider than kColumns is a block of
//                 its own, walked in chunks of kColumns channels.
// A task owns its groups' statistics and its part of y or dx; the backward leaves per-sample channel sums in scratch,
// which a last step adds over samples in order. So no result depends on the number of threads.
#include "group_norm.h"

#include "group_norm_loops.h"
#include "parallel.h"

namespace pynn::cpu {
namespace {

using namespace group_norm;

constexpr int64_t kTaskElements = 16384;  // elements that are worth another thread

// ---------------------------------------------------------------- (N, C, pixels)

template <bool kSilu, class T>
struct Contiguous {
  using A = accumulate_t<T>;
  static constexpr bool kKeep = kSilu && std::is_same_v<T, A>;  // dz fits dx without rounding
  const GroupNormShape& shape;
  const A *weight, *bias;

  int64_t tasks() const { return shape.batch * shape.groups; }
  int64_t task_elements() const { return shape.group_size(); }

  void forward(int64_t task, const T* x, double eps, T* y, A* mean, A* rstd) const {
    const int64_t count = shape.group_size(), first_channel = task % shape.groups * shape.width;
    x += task * count, y += task * count;
    const A center = A(run_moments<false>(x, count, A(0)).first / double(count));
    const GroupStats stats = finish(center, run_moments<true>(x, count, center), double(count), eps);
    mean[task] = A(stats.center + stats.delta), rstd[task] = A(stats.rstd);
    const GroupStats s = recenter<A>(stats);
    for (int64_t c = 0; c < shape.width; ++c)
      run_forward<kSilu>(x + c * shape.pixels, y + c * shape.pixels, shape.pixels, s.center,
                         affine(s, weight, bias, first_channel + c));
  }

  void backward(int64_t task, const T* dy, const T* x, const A* mean, const A* rstd, T* dx, double* sum_dz,
                double* sum_dzx) const {
    const int64_t count = shape.group_size(), first_channel = task % shape.groups * shape.width;
    dy += task * count, x += task * count, dx += task * count;
    GroupStats s{double(mean[task]), double(rstd[task]), 0};
    if (center_of<A>(s.delta, s.rstd) != 0) {
      s.center = s.delta;
      s.delta = run_moments<false>(x, count, A(s.center)).first / double(count);
    }
    Sums weighted;
    for (int64_t c = 0; c < shape.width; ++c) {
      const int64_t at = c * shape.pixels, channel = first_channel + c, out = task * shape.width + c;
      const Sums sums = run_backward_sums<kSilu, kKeep>(dy + at, x + at, dx + at, shape.pixels, s.center,
                                                        affine(s, weight, bias, channel));
      sum_dz[out] = sums.first, sum_dzx[out] = (sums.second - s.delta * sums.first) * s.rstd;
      const double w = weight ? weight[channel] : A(1);
      weighted.first += w * sum_dz[out], weighted.second += w * sum_dzx[out];
    }
    const Affine back = backward_affine(s, weighted, double(count));
    for (int64_t c = 0; c < shape.width; ++c) {
      const int64_t at = c * shape.pixels;
      const Affine forward = affine(s, weight, bias, first_channel + c);
      run_backward<kSilu, kKeep>(dy + at, x + at, dx + at, shape.pixels, s.center, forward, back);
    }
  }
};

// ---------------------------------------------------------------- (N, pixels, C)

template <bool kSilu, class T>
struct ChannelsLast {
  using A = accumulate_t<T>;
  static constexpr bool kKeep = kSilu && std::is_same_v<T, A>;
  const GroupNormShape& shape;
  const A *weight, *bias;

  int64_t groups_per_block() const { return std::max<int64_t>(1, kColumns<T> / shape.width); }
  int64_t blocks() const { return (shape.groups + groups_per_block() - 1) / groups_per_block(); }
  int64_t tasks() const { return shape.batch * blocks(); }
  int64_t task_elements() const { return std::min(shape.groups, groups_per_block()) * shape.group_size(); }

  // The groups of one task, and their channels in chunks.
  struct Part {
    int64_t sample, first_group, groups, first_channel, channels;
    template <class Body>
    void each_chunk(const Body& body) const {
      for (int64_t c = 0; c < channels; c += kColumns<T>) body(c, std::min(channels - c, kColumns<T>));
    }
  };
  Part part(int64_t task) const {
    const int64_t sample = task / blocks(), first = task % blocks() * groups_per_block();
    const int64_t groups = std::min(groups_per_block(), shape.groups - first);
    return {sample, first, groups, first * shape.width, groups * shape.width};
  }
  // Calls body(c, g) for the columns of a chunk, c counted from its first column and g from the part's first group.
  template <class Body>
  void each_column(int64_t first, int64_t count, const Body& body) const {
    int64_t g = first / shape.width, left = (g + 1) * shape.width - first;
    for (int64_t c = 0; c < count; ++c) {
      body(c, g);
      if (--left == 0) ++g, left = shape.width;
    }
  }
  int64_t offset(const Part& p) const { return p.sample * shape.pixels * shape.channels() + p.first_channel; }

  // Each group's sums of x - center and its square (kSecond), with the centers of `stats`.
  template <bool kSecond>
  void moments(const Part& p, const T* x, const GroupStats* stats, Sums* group_sums) const {
    std::fill(group_sums, group_sums + p.groups, Sums{});
    p.each_chunk([&](int64_t first, int64_t count) {
      Columns<T> columns(count);
      ColumnSums<T> sums;
      each_column(first, count, [&](int64_t c, int64_t g) { columns.center[c] = A(stats[g].center); });
      with_vectors<T>(count, [&](auto vectors) {
        Block<T, vectors>(shape, count).template moments<kSecond>(x + first, columns, sums);
      });
      each_column(first, count, [&](int64_t c, int64_t g) {
        group_sums[g].first += sums.first[c], group_sums[g].second += sums.second[c];
      });
    });
  }

  void forward(int64_t task, const T* x, double eps, T* y, A* mean, A* rstd) const {
    const Part p = part(task);
    const double count = double(shape.group_size());
    x += offset(p), y += offset(p);
    GroupStats stats[kColumns<T>];
    std::fill(stats, stats + p.groups, GroupStats{});
    Sums sums[kColumns<T>];
    moments<false>(p, x, stats, sums);
    for (int64_t g = 0; g < p.groups; ++g) stats[g].center = A(sums[g].first / count);
    moments<true>(p, x, stats, sums);
    for (int64_t g = 0; g < p.groups; ++g) {
      stats[g] = finish(stats[g].center, sums[g], count, eps);
      const int64_t at = p.sample * shape.groups + p.first_group + g;
      mean[at] = A(stats[g].center + stats[g].delta), rstd[at] = A(stats[g].rstd);
      stats[g] = recenter<A>(stats[g]);
    }
    p.each_chunk([&](int64_t first, int64_t chunk) {
      Columns<T> columns(chunk);
      each_column(first, chunk, [&](int64_t c, int64_t g) {
        columns.forward(c, stats[g], affine(stats[g], weight, bias, p.first_channel + first + c));
      });
      with_vectors<T>(chunk, [&](auto vectors) {
        Block<T, vectors>(shape, chunk).template forward<kSilu>(x + first, y + first, columns);
      });
    });
  }

  void backward(int64_t task, const T* dy, const T* x, const A* mean, const A* rstd, T* dx, double* sum_dz,
                double* sum_dzx) const {
    const Part p = part(task);
    const double count = double(shape.group_size());
    dy += offset(p), x += offset(p), dx += offset(p);
    GroupStats stats[kColumns<T>];
    std::fill(stats, stats + p.groups, GroupStats{});
    Sums sums[kColumns<T>];
    bool centered = false;
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t at = p.sample * shape.groups + p.first_group + g;
      stats[g] = {double(mean[at]), double(rstd[at]), center_of<A>(mean[at], rstd[at])};
      centered |= stats[g].center != 0;
    }
    if (centered) {
      moments<false>(p, x, stats, sums);
      for (int64_t g = 0; g < p.groups; ++g)
        if (stats[g].center != 0) stats[g].delta = sums[g].first / count;
    }
    std::fill(sums, sums + p.groups, Sums{});
    p.each_chunk([&](int64_t first, int64_t chunk) {
      Columns<T> columns(chunk);
      ColumnSums<T> channel_sums;
      each_column(first, chunk, [&](int64_t c, int64_t g) {
        columns.forward(c, stats[g], affine(stats[g], weight, bias, p.first_channel + first + c));
      });
      with_vectors<T>(chunk, [&](auto vectors) {
        Block<T, vectors>(shape, chunk)
            .template backward_sums<kSilu, kKeep>(dy + first, x + first, dx + first, columns, channel_sums);
      });
      each_column(first, chunk, [&](int64_t c, int64_t g) {
        const int64_t channel = p.first_channel + first + c, out = p.sample * shape.channels() + channel;
        const double w = weight ? weight[channel] : A(1);
        sum_dz[out] = channel_sums.first[c];
        sum_dzx[out] = (channel_sums.second[c] - stats[g].delta * channel_sums.first[c]) * stats[g].rstd;
        sums[g].first += w * sum_dz[out], sums[g].second += w * sum_dzx[out];
      });
    });
    Affine back[kColumns<T>];
    for (int64_t g = 0; g < p.groups; ++g) back[g] = backward_affine(stats[g], sums[g], count);
    p.each_chunk([&](int64_t first, int64_t chunk) {
      Columns<T> columns(chunk);
      each_column(first, chunk, [&](int64_t c, int64_t g) {
        columns.forward(c, stats[g], affine(stats[g], weight, bias, p.first_channel + first + c));
        columns.backward(c, back[g]);
      });
      with_vectors<T>(chunk, [&](auto vectors) {
        Block<T, vectors>(shape, chunk).template backward<kSilu, kKeep>(dy + first, x + first, dx + first, columns);
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
