// group_norm on a GPU.
//
// Forward, (batch, channels, pixels) and a group of at most 40 KB: a team of warps keeps the group in registers; one
// read, one write. Statistics take two passes over the registers, as on the CPU.
// Forward otherwise, in three kernels:
//   moments   each thread sums x - center and its square around a center of its own, one of its first elements, so that
//             a large mean costs no digits; lanes move their sums to the center of the leading one. A partial result
//             per (sample, channel, split).
//   combine   a team per group moves the partial results to one center, adds them, and leaves the coefficients of each
//             channel.
//   apply     elementwise.
// Backward: the coefficients again (with the part of the mean that fp32 lost, where it matters), then sums of dz and
// dz * (x - center) per channel and split, then a group's coefficients of dx, then dx; dweight and dbias are added over
// the samples.
//
// Everything is added in an order that only the shapes decide, and no block waits for another.
#pragma once
#include "group_norm_combine.cuh"

namespace pynn::cuda {
namespace {

// ---------------------------------------------------------------- a group in registers

constexpr int kFusedThreads = 512, kFusedWarps = kFusedThreads / 32;
constexpr int kHeld = 5;  // packs of a thread: as many as registers hold without spilling

struct FusedShape {
  int64_t items, groups;
  int width, pixels, warps;
  bool aligned;
};

template <class T, bool kSilu>
__global__ void __launch_bounds__(kFusedThreads, 1)
    fused_kernel(T* y, accumulate_t<T>* mean, accumulate_t<T>* rstd, const T* x, const accumulate_t<T>* weight,
                 const accumulate_t<T>* bias, double eps, FusedShape shape) {
  using A = accumulate_t<T>;
  SHARED_ARRAY(double, slots, 3 * kFusedWarps);
  const Team team(shape.warps);
  const int size = shape.width * shape.pixels;
  const int mine = team.item < shape.items ? size : 0;  // elements to read and write
  const int64_t begin = team.item * size;
  const auto index_of = [&](int i) { return (i * team.threads + team.thread) * kPack<T>; };
  const auto valid_of = [&](int i) { return max(0, min(kPack<T>, mine - index_of(i))); };

  Pack<T> held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = load_pack(x + begin + index_of(i), valid_of(i), shape.aligned);
  constexpr int kSums = kPack<T> < 4 ? kPack<T> : 4;
  A sums[kSums] = {}, squares[kSums] = {};
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) sums[k % kSums] += to_float(held[i].element[k]);
  const auto total = [](const A(&values)[kSums]) {
    double sum = 0;
#pragma unroll
    for (int k = 0; k < kSums; k += 2) sum += double(values[k] + values[k + 1]);
    return sum;
  };
  const A center = A(team.sum(total(sums), slots) / size);
#pragma unroll
  for (int k = 0; k < kSums; ++k) sums[k] = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int valid = valid_of(i);
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      const A d = k < valid ? to_float(held[i].element[k]) - center : A(0);
      sums[k % kSums] += d;
      squares[k % kSums] = fma(d, d, squares[k % kSums]);
    }
  }
  const double first = team.sum(total(sums), slots + kFusedWarps);
  const double second = team.sum(total(squares), slots + 2 * kFusedWarps);
  if (mine == 0) return;
  const GroupStats exact = finish(center, {first, second}, size, eps), s = recenter<A>(exact);
  if (team.thread == 0) mean[team.item] = A(exact.center + exact.delta), rstd[team.item] = A(exact.rstd);

  const int64_t first_channel = team.item % shape.groups * shape.width;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int valid = valid_of(i);
    if (valid == 0) break;
    const unsigned index = unsigned(index_of(i)), channel = index / unsigned(shape.pixels);
    int64_t c = first_channel + channel;
    unsigned left = (channel + 1) * unsigned(shape.pixels) - index;  // elements before the next channel
    Coefficients<A> a = coefficients_of(s, weight, bias, c);
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      const A z = fma(to_float(held[i].element[k]) - a.center, a.scale, a.shift);
      held[i].element[k] = from_float<T>(activate<T, kSilu>(z));
      if (--left == 0 && k + 1 < valid) {
        left = unsigned(shape.pixels);
        a = coefficients_of(s, weight, bias, ++c);
      }
    }
    store_pack(y + begin + index, held[i], valid, shape.aligned);
  }
}

// Packs of a group that is kept in registers.
constexpr int64_t kMostFusedPacks = kFusedThreads * kHeld;
template <class T>
bool fits_registers(const GroupNormShape& s) {
  return (!s.channels_last || s.pixels == 1) && s.group_size() <= kMostFusedPacks * kPack<T>;
}

// ---------------------------------------------------------------- statistics

// known_mean, known_rstd: nullptr, or statistics of which only large means are looked at again.
template <class T, bool kColumns>
__global__ void __launch_bounds__(kThreads, 3)
    moments_kernel(Partial* partials, const T* x, const accumulate_t<T>* known_mean, const accumulate_t<T>* known_rstd,
                   int64_t width, Tiling t) {
  using A = accumulate_t<T>;
  constexpr int kOwn = kSets<T, kColumns>;
  const Lane lane = lane_of<T, kColumns>(t);
  if (known_mean) {
    bool far = false;
    each_set<T, kColumns>(lane, width, [&](int, int64_t group) {
      const int64_t at = lane.sample * (t.channels / width) + group;
      far |= is_far(known_mean[at], known_rstd[at]);
    });
    if (!__any_sync(kFullWarp, far)) {
      each_set<T, kColumns>(lane, width, [&](int k, int64_t) {
        if (lane.leads) partials[t.partial(lane, k)] = {0, 0, 0};
      });
      return;
    }
  }
  A center[kOwn] = {}, first[kPack<T>] = {}, second[kPack<T>] = {};
  const T* from = x + lane.offset;
  for (int i = 0; i < lane.packs; i += kBatch, from += kBatch * lane.step) {
    Pack<T> in[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) in[b] = load_pack(from + b * lane.step, lane.valid(i + b), t.aligned);
    if (i == 0) {
#pragma unroll
      for (int k = 0; k < kOwn; ++k) center[k] = center_among<T, kColumns>(in, lane, k);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int valid = lane.valid(i + b);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        const A d = k < valid ? to_float(in[b].element[k]) - center[k % kOwn] : A(0);
        first[k] += d;
        second[k] = fma(d, d, second[k]);
      }
    }
  }
  const double count = kColumns ? lane.packs : lane.packs > 0 ? (lane.packs - 1) * kPack<T> + lane.last : 0;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    double sum = first[k], squares = second[k];
    if constexpr (!kColumns) {
#pragma unroll
      for (int j = 1; j < kPack<T>; ++j) sum += double(first[j]), squares += double(second[j]);
    }
    const double common = of_leader<kColumns>(center[k], t), shift = lane.packs > 0 ? center[k] - common : 0;
    squares += shift * (2 * sum + count * shift);
    sum += count * shift;
    sum = sum_sharing<kColumns>(sum, t);
    squares = sum_sharing<kColumns>(squares, t);
    if (lane.leads && k < lane.whole) partials[t.partial(lane, k)] = {common, sum, squares};
  }
}

// ---------------------------------------------------------------- elementwise passes

template <class T, bool kColumns>
struct Sets {
  Coefficients<accumulate_t<T>> set[kSets<T, kColumns>] = {};
  __device__ Sets(const Coefficients<accumulate_t<T>>* coefficients, const Lane& lane, const Tiling& t) {
#pragma unroll
    for (int k = 0; k < kSets<T, kColumns>; ++k)
      if (k < lane.whole) set[k] = coefficients[lane.sample * t.channels + lane.channel + k];
  }
};

template <class T, bool kSilu, bool kColumns>
__global__ void __launch_bounds__(kThreads, 3)
    apply_kernel(T* y, const T* x, const Coefficients<accumulate_t<T>>* coefficients, Tiling t) {
  const Lane lane = lane_of<T, kColumns>(t);
  const Sets<T, kColumns> sets(coefficients, lane, t);
  const T* from = x + lane.offset;
  T* to = y + lane.offset;
  for (int i = 0; i < lane.packs; i += kBatch, from += kBatch * lane.step, to += kBatch * lane.step) {
    Pack<T> packs[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) packs[b] = load_pack(from + b * lane.step, lane.valid(i + b), t.aligned);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        const auto& a = sets.set[k % kSets<T, kColumns>];
        const auto z = fma(to_float(packs[b].element[k]) - a.center, a.scale, a.shift);
        packs[b].element[k] = from_float<T>(activate<T, kSilu>(z));
      }
      store_pack(to + b * lane.step, packs[b], lane.valid(i + b), t.aligned);
    }
  }
}

// Resident blocks of a multiprocessor to compile for: what fits without spilling.
template <class T, bool kSilu, bool kColumns>
constexpr int kGradientBlocks = sizeof(T) == 2 && kSilu && kColumns ? 2 : 3;

constexpr int kTwo = kBatch / 2;  // packs of each tensor that the backward loads at once

// Packs i, i + 1, ... of x and of dy.
template <class T>
__device__ void load_both(Pack<T> (&in)[kTwo], Pack<T> (&grad)[kTwo], const T* x, const T* dy, const Lane& lane, int i,
                          bool aligned) {
#pragma unroll
  for (int b = 0; b < kTwo; ++b) {
    in[b] = load_pack(x + b * lane.step, lane.valid(i + b), aligned);
    grad[b] = load_pack(dy + b * lane.step, lane.valid(i + b), aligned);
  }
}

template <class T, bool kSilu, bool kColumns>
__global__ void __launch_bounds__(kThreads, kGradientBlocks<T, kSilu, kColumns>)
    gradient_sums_kernel(Partial* partials, const T* dy, const T* x, const Coefficients<accumulate_t<T>>* coefficients,
                         Tiling t) {
  using A = accumulate_t<T>;
  const Lane lane = lane_of<T, kColumns>(t);
  const Sets<T, kColumns> sets(coefficients, lane, t);
  A first[kPack<T>] = {}, second[kPack<T>] = {};
  int64_t offset = lane.offset;
  for (int i = 0; i < lane.packs; i += kTwo, offset += kTwo * lane.step) {
    Pack<T> in[kTwo], grad[kTwo];
    load_both(in, grad, x + offset, dy + offset, lane, i, t.aligned);
#pragma unroll
    for (int b = 0; b < kTwo; ++b) {
      const int valid = lane.valid(i + b);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        const auto& a = sets.set[k % kSets<T, kColumns>];
        const A d = to_float(in[b].element[k]) - a.center;
        const A dz = activate_grad<T, kSilu>(to_float(grad[b].element[k]), fma(d, a.scale, a.shift));
        if (k < valid) first[k] += dz, second[k] = fma(dz, d, second[k]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kSets<T, kColumns>; ++k) {
    double sum = first[k], products = second[k];
    if constexpr (!kColumns) {
#pragma unroll
      for (int j = 1; j < kPack<T>; ++j) sum += double(first[j]), products += double(second[j]);
    }
    sum = sum_sharing<kColumns>(sum, t);
    products = sum_sharing<kColumns>(products, t);
    if (lane.leads && k < lane.whole) partials[t.partial(lane, k)] = {0, sum, products};
  }
}

template <class T, bool kSilu, bool kColumns>
__global__ void __launch_bounds__(kThreads, kGradientBlocks<T, kSilu, kColumns>)
    gradient_kernel(T* dx, const T* dy, const T* x, const Coefficients<accumulate_t<T>>* coefficients,
                    const GroupGradient<accumulate_t<T>>* gradients, int64_t width, Tiling t) {
  using A = accumulate_t<T>;
  const Lane lane = lane_of<T, kColumns>(t);
  const Sets<T, kColumns> sets(coefficients, lane, t);
  GroupGradient<A> group_part[kSets<T, kColumns>] = {};
  each_set<T, kColumns>(lane, width, [&](int k, int64_t group) {
    group_part[k] = gradients[lane.sample * (t.channels / width) + group];
  });
  int64_t offset = lane.offset;
  for (int i = 0; i < lane.packs; i += kTwo, offset += kTwo * lane.step) {
    Pack<T> in[kTwo], grad[kTwo];
    load_both(in, grad, x + offset, dy + offset, lane, i, t.aligned);
#pragma unroll
    for (int b = 0; b < kTwo; ++b) {
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) {
        const auto& a = sets.set[k % kSets<T, kColumns>];
        const GroupGradient<A>& g = group_part[k % kSets<T, kColumns>];
        const A d = to_float(in[b].element[k]) - a.center;
        const A dz = activate_grad<T, kSilu>(to_float(grad[b].element[k]), fma(d, a.scale, a.shift));
        grad[b].element[k] = from_float<T>(fma(a.scale, dz, fma(g.slope, d, g.constant)));
      }
      store_pack(dx + offset + b * lane.step, grad[b], lane.valid(i + b), t.aligned);
    }
  }
}

// ---------------------------------------------------------------- launches

template <class T>
using Parameters = const accumulate_t<T>*;

template <class T>
void launch_fused(T* y, accumulate_t<T>* mean, accumulate_t<T>* rstd, const T* x, Parameters<T> weight,
                  Parameters<T> bias, double eps, const GroupNormShape& shape, void* stream) {
  const int64_t items = shape.batch * shape.groups, packs = ceil_div(shape.group_size(), kPack<T>);
  const int warps = power_of_two(ceil_div(packs, 32 * kHeld), kFusedWarps), block = std::max(128, warps * 32);
  const bool aligned = is_aligned({x, y}) && shape.group_size() % kPack<T> == 0;
  const FusedShape fused{items, shape.groups, int(shape.width), int(shape.pixels), warps, aligned};
  const auto run = [&](auto silu) {
    LAUNCH((fused_kernel<T, silu>), blocks_for(items, warps, block), block, 0, stream, y, mean, rstd, x, weight, bias,
           eps, fused);
  };
  shape.silu ? run(std::true_type{}) : run(std::false_type{});
}

template <class T>
Partials launch_moments(const PartialBuffers& buffers, const T* x, const accumulate_t<T>* mean,
                        const accumulate_t<T>* rstd, const GroupNormShape& shape, void* stream) {
  const Tiling t = tiling_of<T>(shape, {x});
  with_variant(false, t.columns, [&](auto, auto columns) {
    LAUNCH((moments_kernel<T, columns>), t.blocks(), kThreads, 0, stream, buffers.first, x, mean, rstd, shape.width, t);
  });
  return fold(buffers, t, stream);
}

template <class T>
void launch_forward(T* y, accumulate_t<T>* mean, accumulate_t<T>* rstd, const T* x, Parameters<T> weight,
                    Parameters<T> bias, double eps, const ForwardScratch<T>& scratch, const GroupNormShape& shape,
                    void* stream) {
  const Partials partials = launch_moments<T>(scratch.partials, x, nullptr, nullptr, shape, stream);
  const int64_t items = shape.batch * shape.groups;
  const int warps = combine_warps(shape.width * partials.splits);
  LAUNCH(combine_kernel<accumulate_t<T>>, blocks_for(items, warps, kThreads), kThreads, 0, stream, scratch.coefficients,
         nullptr, mean, rstd, nullptr, nullptr, partials, weight, bias, eps, shape, warps);
  if (!y) return;
  const Tiling t = tiling_of<T>(shape, {x, y});
  with_variant(shape.silu, t.columns, [&](auto silu, auto columns) {
    LAUNCH((apply_kernel<T, silu, columns>), t.blocks(), kThreads, 0, stream, y, x, scratch.coefficients, t);
  });
}

template <class T>
void launch_input_gradient(T* dx, const T* dy, const T* x, Parameters<T> weight, Parameters<T> bias,
                           const accumulate_t<T>* mean, const accumulate_t<T>* rstd, const BackwardScratch<T>& scratch,
                           const GroupNormShape& shape, void* stream) {
  using A = accumulate_t<T>;
  const int64_t items = shape.batch * shape.groups;
  Partials partials = launch_moments<T>(scratch.partials, x, mean, rstd, shape, stream);
  const int warps = combine_warps(shape.width * partials.splits);
  LAUNCH(combine_kernel<A>, blocks_for(items, warps, kThreads), kThreads, 0, stream, scratch.coefficients,
         scratch.stats, nullptr, nullptr, mean, rstd, partials, weight, bias, 0, shape, warps);

  const Tiling t = tiling_of<T>(shape, {dy, x, dx});
  with_variant(shape.silu, t.columns, [&](auto silu, auto columns) {
    LAUNCH((gradient_sums_kernel<T, silu, columns>), t.blocks(), kThreads, 0, stream, scratch.partials.first, dy, x,
           scratch.coefficients, t);
  });
  partials = fold(scratch.partials, t, stream);
  LAUNCH(combine_gradient_kernel<A>, blocks_for(items, warps, kThreads), kThreads, 0, stream, scratch.gradients,
         scratch.sums, partials, scratch.stats, weight, shape, warps, power_of_two(partials.splits, 32));
  with_variant(shape.silu, t.columns, [&](auto silu, auto columns) {
    LAUNCH((gradient_kernel<T, silu, columns>), t.blocks(), kThreads, 0, stream, dx, dy, x, scratch.coefficients,
           scratch.gradients, shape.width, t);
  });
}

}  // namespace

template <class T>
int64_t GroupNorm<T>::fwd_scratch(const GroupNormShape& shape, bool with_y) {
  return with_y && fits_registers<T>(shape) ? 0 : ForwardScratch<T>(nullptr, shape).used();
}
template <class T>
int64_t GroupNorm<T>::bwd_scratch(const GroupNormShape& shape) {
  return BackwardScratch<T>(nullptr, shape).used();
}

template <class T>
void GroupNorm<T>::fwd(const T* x, const A* weight, const A* bias, double eps, T* y, A* mean, A* rstd, double* scratch,
                       const GroupNormShape& shape, void* stream) {
  if (y && fits_registers<T>(shape))
    launch_fused<T>(y, mean, rstd, x, weight, bias, eps, shape, stream);
  else
    launch_forward<T>(y, mean, rstd, x, weight, bias, eps, {scratch, shape}, shape, stream);
}

template <class T>
void GroupNorm<T>::bwd(const T* dy, const T* x, const A* weight, const A* bias, const A* mean, const A* rstd, T* dx,
                       A* dweight, A* dbias, double* memory, const GroupNormShape& shape, void* stream) {
  const BackwardScratch<T> scratch(memory, shape);
  launch_input_gradient<T>(dx, dy, x, weight, bias, mean, rstd, scratch, shape, stream);
  launch_add_samples(scratch.sums, dbias, dweight, shape, stream);
}

template struct GroupNorm<double>;
template struct GroupNorm<float>;
template struct GroupNorm<Half>;
template struct GroupNorm<BFloat16>;

}  // namespace pynn::cuda
