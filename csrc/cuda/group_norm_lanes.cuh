// How the threads of a warp share a tensor in the group_norm kernels, and how they add up what they found.
//
// A thread handles packs, 16 bytes each, that lie a constant step apart. Two layouts:
//   runs      (batch, channels, pixels): `lanes` neighbouring threads walk a span of one channel's pixels; every
//             element of a thread belongs to the same channel.
//   columns   (batch, pixels, channels): `lanes` neighbouring threads cover lanes * kPack channels, the 32 / lanes rows
//             of a warp walk a span of pixels; element k of every pack of a thread belongs to the same channel.
// Spans depend on the shape of one sample alone, never on the batch or on alignment, so neither do the bits of a
// result.
#pragma once
#include <algorithm>

#include "arithmetic.cuh"
#include "group_norm.h"
#include "group_norm_math.h"
#include "pack.cuh"
#include "warp_sum.cuh"

namespace pynn::cuda {
namespace {

using namespace pynn::group_norm;

constexpr int kThreads = 256;
constexpr int kBatch = 4;                 // packs that a thread loads before it uses the first
constexpr int kMostPacks = 64;            // of a thread
constexpr int64_t kManyWarps = 132 * 32;  // a sample of so many warps keeps a large GPU busy

template <class T>
constexpr int kPack = 16 / int(sizeof(T));

template <class T>
using Pack = PackOf<T, kPack<T>>;
template <class T>
__device__ Pack<T> load_pack(const T* from, int valid, bool aligned) {
  Pack<T> pack;
  load_pack(pack, from, valid, aligned);
  return pack;
}

// The smallest power of two that is at least `count`, and at most `most`, itself one.
inline int power_of_two(int64_t count, int most) {
  int power = 1;
  while (power < most && power < count) power *= 2;
  return power;
}

// A thread's part of a tensor.
struct Lane {
  int64_t offset, step;  // of the first pack, and from pack to pack, in elements
  int packs;             // 0 where there is nothing to do
  int whole, last;       // elements of every pack, and of the last one
  int64_t sample, channel, split;
  bool leads;  // among the lanes with the same channels

  __device__ int valid(int i) const { return i + 1 < packs ? whole : i < packs ? last : 0; }
};

struct Tiling {
  int64_t batch, channels, pixels;
  int lanes;
  int64_t span;    // pixels of a split
  int64_t splits;  // of a channel
  int64_t chunks;  // columns: of a row
  bool columns, aligned;

  int64_t warps() const { return columns ? batch * splits * chunks : ceil_div(batch * channels * splits * lanes, 32); }
  unsigned blocks() const { return unsigned(ceil_div(warps() * 32, kThreads)); }
  int64_t partials() const { return batch * channels * splits; }
  // Where the partial result of a thread's k-th channel lies.
  __device__ int64_t partial(const Lane& lane, int k) const {
    return (lane.sample * channels + lane.channel + k) * splits + lane.split;
  }
};

// tensors: all that is read or written in packs.
template <class T>
Tiling tiling_of(const GroupNormShape& s, std::initializer_list<const void*> tensors) {
  Tiling t{s.batch, s.channels(), s.pixels};
  const int64_t wanted = s.channels() * s.pixels / (32 * kPack<T> * kManyWarps);
  const int packs = power_of_two(std::max<int64_t>(wanted, kBatch), kMostPacks);
  t.columns = s.channels_last || s.pixels == 1;
  if (t.columns) {
    const int64_t row_packs = ceil_div(t.channels, kPack<T>);
    t.lanes = power_of_two(row_packs, 32 / power_of_two(t.pixels, 4));
    t.chunks = ceil_div(row_packs, t.lanes);
    t.span = int64_t(32 / t.lanes) * packs;
    t.aligned = is_aligned(tensors) && t.channels % kPack<T> == 0;
  } else {
    t.lanes = power_of_two(ceil_div(t.pixels, kPack<T>), 32);
    t.chunks = 1;
    t.span = int64_t(t.lanes) * kPack<T> * packs;
    t.aligned = is_aligned(tensors) && t.pixels % kPack<T> == 0;
  }
  t.splits = ceil_div(t.pixels, t.span);
  return t;
}

template <class T, bool kColumns>
__device__ Lane lane_of(const Tiling& t) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  Lane lane{};
  if constexpr (kColumns) {
    const int64_t warp = thread / 32, chunk = warp % t.chunks, rest = warp / t.chunks;
    const int column = int(thread % t.lanes), row = int(thread % 32) / t.lanes, rows = 32 / t.lanes;
    lane.split = rest % t.splits, lane.sample = rest / t.splits, lane.channel = (chunk * t.lanes + column) * kPack<T>;
    if (lane.sample >= t.batch || lane.channel >= t.channels) return lane;
    const int64_t begin = lane.split * t.span + row, end = min((lane.split + 1) * t.span, t.pixels);
    lane.offset = (lane.sample * t.pixels + begin) * t.channels + lane.channel;
    lane.step = rows * t.channels;
    lane.packs = begin < end ? int((end - begin + rows - 1) / rows) : 0;
    lane.whole = lane.last = int(min(int64_t(kPack<T>), t.channels - lane.channel));
    lane.leads = row == 0;
  } else {
    const int64_t item = thread / t.lanes, run = item / t.splits;
    const int in_run = int(thread % t.lanes), step = t.lanes * kPack<T>;
    lane.split = item % t.splits, lane.sample = run / t.channels, lane.channel = run % t.channels;
    if (lane.sample >= t.batch) return lane;
    const int64_t begin = lane.split * t.span + in_run * kPack<T>, end = min((lane.split + 1) * t.span, t.pixels);
    lane.offset = run * t.pixels + begin;
    lane.step = step;
    lane.packs = begin < end ? int((end - begin + step - 1) / step) : 0;
    lane.whole = kPack<T>;
    lane.last = int(min(int64_t(kPack<T>), end - begin - int64_t(lane.packs - 1) * step));
    lane.leads = in_run == 0;
  }
  return lane;
}

// The sum over the lanes that share channels; in each of them. Called by whole warps.
template <bool kColumns>
__device__ double sum_sharing(double value, const Tiling& t) {
  return kColumns ? sum_lanes(value, 16, t.lanes) : sum_lanes(value, t.lanes / 2);
}
// The value of the leading one of those lanes.
template <bool kColumns, class V>
__device__ V of_leader(V value, const Tiling& t) {
  const int lane = int(threadIdx.x % 32);
  return __shfl_sync(kFullWarp, value, kColumns ? lane % t.lanes : lane / t.lanes * t.lanes);
}

// The channels that a thread keeps apart: one, or one per element of a pack.
template <class T, bool kColumns>
constexpr int kSets = kColumns ? kPack<T> : 1;

// Calls body(k, group) for each of them: channel lane.channel + k.
template <class T, bool kColumns, class Body>
__device__ void each_set(const Lane& lane, int64_t width, const Body& body) {
  int64_t group = lane.channel / width, left = (group + 1) * width - lane.channel;
#pragma unroll
  for (int k = 0; k < kSets<T, kColumns>; ++k) {
    if (k >= lane.whole) break;
    body(k, group);
    if (--left == 0) ++group, left = width;
  }
}

// Of the loaded packs, an element near the mean of those of set k: a center that loses no digits when it is subtracted.
template <class T, bool kColumns>
__device__ accumulate_t<T> center_among(const Pack<T> (&in)[kBatch], const Lane& lane, int set) {
  using A = accumulate_t<T>;
  const auto each = [&](const auto& body) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
#pragma unroll
      for (int k = kColumns ? set : 0; k < (kColumns ? set + 1 : kPack<T>); ++k)
        if (k < lane.valid(b)) body(to_float(in[b].element[k]));
  };
  A sum = 0, count = 0;
  each([&](A v) { sum += v, count += 1; });
  const A mean = sum / count;
  A center = to_float(in[0].element[set]), nearest = fabs(center - mean);
  each([&](A v) {
    const A distance = fabs(v - mean);
    if (distance < nearest) center = v, nearest = distance;
  });
  return center;
}

// A team: whole warps that work on one item, some teams to a block.
struct Team {
  int warps, threads, thread;
  int64_t item;

  __device__ explicit Team(int warps)
      : warps(warps),
        threads(warps * 32),
        thread(int(threadIdx.x) % threads),
        item(int64_t(blockIdx.x) * (blockDim.x / threads) + threadIdx.x / threads) {}

  // The sum over the team, in each thread. Called by the whole block; slots: a double per warp of the block.
  __device__ double sum(double value, double* slots) const {
    value = sum_lanes(value);
    if (warps == 1) return value;
    const int warp = int(threadIdx.x) / 32;
    if (threadIdx.x % 32 == 0) slots[warp] = value;
    __syncthreads();
    const double* mine = slots + warp / warps * warps;
    double total = 0;
    for (int i = 0; i < warps; ++i) total += mine[i];
    return total;
  }
};
inline unsigned blocks_for(int64_t items, int warps, int block) {
  return unsigned(ceil_div(items * warps * 32, block));
}

template <class T, bool kSilu>
__device__ accumulate_t<T> activate(accumulate_t<T> z) {
  if constexpr (!kSilu) return z;
  const accumulate_t<T> e = exp_of<T>(z < 0 ? z : -z);
  return divide<T>(z < 0 ? z * e : z, 1 + e);
}
// grad * act'(z); neither sigmoid(z) nor sigmoid(-z) is taken as 1 minus the other.
template <class T, bool kSilu>
__device__ accumulate_t<T> activate_grad(accumulate_t<T> grad, accumulate_t<T> z) {
  using A = accumulate_t<T>;
  if constexpr (!kSilu) return grad;
  const A e = exp_of<T>(z < 0 ? z : -z), r = divide<T>(1, 1 + e), er = e * r;
  return grad * ((z < 0 ? er : r) * fma(z, z < 0 ? r : er, A(1)));
}

}  // namespace
}  // namespace pynn::cuda
