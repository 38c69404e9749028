// From the partial results of group_norm's passes to coefficients: kernels over statistics, small beside the passes
// themselves, and the scratch memory between all of them.
#pragma once
#include "group_norm_lanes.cuh"

namespace pynn::cuda {
namespace {

// Sums around a center over the pixels of a split.
struct Partial {
  double center, first, second;
};

// (x - center) * scale + shift
template <class A>
struct Coefficients {
  A center, scale, shift;
};
// What a group adds to dx: (x - center) * slope + constant.
template <class A>
struct GroupGradient {
  A slope, constant;
};

template <class A>
__device__ Coefficients<A> coefficients_of(const GroupStats& s, const A* weight, const A* bias, int64_t channel) {
  const Affine a = affine(s, weight, bias, channel);
  return {A(s.center), A(a.scale), A(a.shift)};
}

// ---------------------------------------------------------------- kernels

// Adds groups of kFold neighbouring splits; `span` pixels to a split before.
constexpr int kFold = 64;
__global__ void __launch_bounds__(kThreads)
    fold_kernel(Partial* out, const Partial* in, int64_t channels, int64_t splits, int64_t span, int64_t pixels) {
  const int64_t folded = (splits + kFold - 1) / kFold, item = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (item >= channels * folded) return;  // the whole warp
  const int64_t channel = item / folded, begin = item % folded * kFold, end = min(begin + kFold, splits);
  const double center = in[channel * splits + begin].center;
  double first = 0, second = 0;
  for (int64_t i = begin + threadIdx.x % 32; i < end; i += 32) {
    const Partial p = in[channel * splits + i];
    const double count = double(min(span, pixels - i * span)), shift = p.center - center;
    second += p.second + shift * (2 * p.first + count * shift);
    first += p.first + count * shift;
  }
  first = sum_lanes(first), second = sum_lanes(second);
  if (threadIdx.x % 32 == 0) out[item] = {center, first, second};
}

constexpr int kCombineWarps = kThreads / 32;

// Partial results of channels, `splits` of `span` pixels each.
struct Partials {
  const Partial* data;
  int64_t splits, span;
};

// known_mean, known_rstd: nullptr in the forward, which writes mean and rstd; otherwise they are what stats are made
// of, and partial results exist only for large means.
template <class A>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Coefficients<A>* coefficients, GroupStats* stats, A* mean, A* rstd, const A* known_mean,
                   const A* known_rstd, Partials partials, const A* weight, const A* bias, double eps,
                   GroupNormShape shape, int warps) {
  SHARED_ARRAY(double, slots, 2 * kCombineWarps);
  const Team team(warps);
  const bool active = team.item < shape.batch * shape.groups;
  const int64_t item = active ? team.item : 0;
  const int64_t channel = item % shape.groups * shape.width, count = shape.width * partials.splits;
  GroupStats s{0, 0, 0};
  bool from_partials = active;
  double center = 0;
  if (known_mean && active) {
    s = {double(known_mean[item]), double(known_rstd[item]), 0};
    from_partials = is_far(s.delta, s.rstd);
  }
  const Partial* mine = partials.data + item * count;
  Sums sums;
  if (from_partials) {
    center = mine[0].center;
    for (int64_t i = team.thread; i < count; i += team.threads) {
      const Partial p = mine[i];
      const double pixels = double(min(partials.span, shape.pixels - i % partials.splits * partials.span));
      const double shift = p.center - center;
      sums.second += p.second + shift * (2 * p.first + pixels * shift);
      sums.first += p.first + pixels * shift;
    }
  }
  sums.first = team.sum(sums.first, slots);
  sums.second = team.sum(sums.second, slots + kCombineWarps);
  if (!active) return;
  if (!known_mean) {
    const GroupStats exact = finish(center, sums, double(shape.group_size()), eps);
    if (team.thread == 0) mean[item] = A(exact.center + exact.delta), rstd[item] = A(exact.rstd);
    s = recenter<A>(exact);
  } else if (from_partials) {
    s.center = s.delta;
    s.delta = sums.first / double(shape.group_size()) + (center - s.center);
  }
  if (stats && team.thread == 0) stats[item] = s;
  for (int64_t c = team.thread; c < shape.width; c += team.threads)
    coefficients[item * shape.width + c] = coefficients_of(s, weight, bias, channel + c);
}

// Each channel's sums of dz and dz * (x - mean) * rstd go to rows of sums (batch, 2 * channels); each group's weighted
// sums become its part of dx.
template <class A>
__global__ void __launch_bounds__(kThreads)
    combine_gradient_kernel(GroupGradient<A>* gradients, double* sums, Partials partials, const GroupStats* stats,
                            const A* weight, GroupNormShape shape, int warps, int lanes) {
  SHARED_ARRAY(double, slots, 2 * kCombineWarps);
  const Team team(warps);
  const bool active = team.item < shape.batch * shape.groups;
  const int64_t item = active ? team.item : 0;
  const GroupStats s = stats[item];
  const int64_t channel = item % shape.groups * shape.width;
  double* row = sums + item / shape.groups * (2 * shape.channels());
  Sums weighted;
  for (int64_t base = 0; base < shape.width; base += team.threads / lanes) {
    const int64_t c = base + team.thread / lanes;
    Sums own;
    if (c < shape.width) {
      const Partial* mine = partials.data + (item * shape.width + c) * partials.splits;
      for (int64_t i = team.thread % lanes; i < partials.splits; i += lanes)
        own.first += mine[i].first, own.second += mine[i].second;
    }
    own.first = sum_lanes(own.first, lanes / 2), own.second = sum_lanes(own.second, lanes / 2);
    if (team.thread % lanes == 0 && c < shape.width && active) {
      const double normalised = (own.second - s.delta * own.first) * s.rstd;
      const double w = weight ? weight[channel + c] : A(1);
      row[channel + c] = own.first, row[shape.channels() + channel + c] = normalised;
      weighted.first += w * own.first, weighted.second += w * normalised;
    }
  }
  weighted.first = team.sum(weighted.first, slots);
  weighted.second = team.sum(weighted.second, slots + kCombineWarps);
  if (!active || team.thread != 0) return;
  const Affine a = backward_affine(s, weighted, double(shape.group_size()));
  gradients[item] = {A(a.scale), A(a.shift)};
}

constexpr int kSampleColumns = 32, kSampleLanes = kThreads / kSampleColumns, kSampleRows = 256;

// Adds kSampleRows rows of (rows, 2 * channels) at a time: into `out`, or, without it, into dbias and dweight.
template <class A>
__global__ void __launch_bounds__(kThreads)
    add_samples_kernel(double* out, A* dbias, A* dweight, const double* in, int64_t rows, int64_t channels) {
  SHARED_ARRAY(double, partial, kThreads);
  const int64_t columns = 2 * channels, column_blocks = (columns + kSampleColumns - 1) / kSampleColumns;
  const int64_t block = blockIdx.x / column_blocks, begin = block * kSampleRows;
  const int64_t column = blockIdx.x % column_blocks * kSampleColumns + threadIdx.x % kSampleColumns;
  const int64_t end = min(begin + kSampleRows, rows);
  double sum = 0;
  if (column < columns)
    for (int64_t row = begin + threadIdx.x / kSampleColumns; row < end; row += kSampleLanes)
      sum += in[row * columns + column];
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (int(threadIdx.x) >= kSampleColumns || column >= columns) return;
  for (int lane = 1; lane < kSampleLanes; ++lane) sum += partial[lane * kSampleColumns + threadIdx.x];
  if (out)
    out[block * columns + column] = sum;
  else if (column < channels)
    dbias[column] = A(sum);
  else
    dweight[column - channels] = A(sum);
}

// ---------------------------------------------------------------- scratch and launches

// Hands out parts of the scratch; without memory it only counts them.
class Scratch {
 public:
  explicit Scratch(double* memory) : memory_(memory) {}
  template <class V>
  V* take(int64_t count) {
    double* const begin = memory_ ? memory_ + used_ : nullptr;
    used_ += ceil_div(count * int64_t(sizeof(V)), sizeof(double));
    return reinterpret_cast<V*>(begin);
  }
  int64_t used() const { return used_; }

 private:
  double* memory_;
  int64_t used_ = 0;
};

struct PartialBuffers {
  Partial *first, *next;  // `next` for folding: all levels one after the other
  PartialBuffers(Scratch& scratch, const Tiling& t) : first(scratch.take<Partial>(t.partials())) {
    int64_t folded = 0;
    for (int64_t splits = t.splits; splits > kFold;) folded += splits = ceil_div(splits, kFold);
    next = scratch.take<Partial>(t.batch * t.channels * folded);
  }
};

// Folds until no channel has more than kFold partial results.
inline Partials fold(const PartialBuffers& buffers, const Tiling& t, void* stream) {
  Partials p{buffers.first, t.splits, t.span};
  Partial* out = buffers.next;
  const int64_t channels = t.batch * t.channels;
  while (p.splits > kFold) {
    const int64_t folded = ceil_div(p.splits, kFold);
    LAUNCH(fold_kernel, blocks_for(channels * folded, 1, kThreads), kThreads, 0, stream, out, p.data, channels,
           p.splits, p.span, t.pixels);
    p = {out, folded, p.span * kFold};
    out += channels * folded;
  }
  return p;
}

// Warps that combine a group of so many partial results.
inline int combine_warps(int64_t results) { return results <= 256 ? 1 : kCombineWarps; }

// Calls body(silu, columns) with the kernels' template arguments.
template <class Body>
void with_variant(bool silu, bool columns, const Body& body) {
  const auto with_silu = [&](auto silu) { columns ? body(silu, std::true_type{}) : body(silu, std::false_type{}); };
  silu ? with_silu(std::true_type{}) : with_silu(std::false_type{});
}

template <class T>
struct ForwardScratch : Scratch {
  PartialBuffers partials;
  Coefficients<accumulate_t<T>>* coefficients;

  ForwardScratch(double* memory, const GroupNormShape& shape)
      : Scratch(memory),
        partials(*this, tiling_of<T>(shape, {})),
        coefficients(take<Coefficients<accumulate_t<T>>>(shape.batch * shape.channels())) {}
};

template <class T>
struct BackwardScratch : ForwardScratch<T> {
  GroupStats* stats;
  GroupGradient<accumulate_t<T>>* gradients;
  double* sums;  // (batch, 2 * channels), then what is left of it after each addition of rows

  BackwardScratch(double* memory, const GroupNormShape& shape)
      : ForwardScratch<T>(memory, shape),
        stats(this->template take<GroupStats>(shape.batch * shape.groups)),
        gradients(this->template take<GroupGradient<accumulate_t<T>>>(shape.batch * shape.groups)) {
    int64_t rows = shape.batch, all = rows;
    while (rows > kSampleRows) all += rows = ceil_div(rows, kSampleRows);
    sums = this->template take<double>(all * 2 * shape.channels());
  }
};

// sums: of BackwardScratch.
template <class A>
void launch_add_samples(double* sums, A* dbias, A* dweight, const GroupNormShape& shape, void* stream) {
  const int64_t columns = 2 * shape.channels(), column_blocks = ceil_div(columns, kSampleColumns);
  for (int64_t rows = shape.batch; rows > 0;) {
    const int64_t blocks = ceil_div(rows, kSampleRows);
    double* const out = blocks > 1 ? sums + rows * columns : nullptr;
    LAUNCH(add_samples_kernel<A>, unsigned(column_blocks * blocks), kThreads, 0, stream, out, dbias, dweight, sums,
           rows, shape.channels());
    sums = out, rows = out ? blocks : 0;
  }
}

}  // namespace
}  // namespace pynn::cuda
