// The weight gradient where a group has few channels on one side.
//
// A block computes `count` output channels times up to kNarrowThreads filter taps (input channel, row, column) over a
// range of tiles of output pixels. It copies grad_output and the inputs of a tile to shared memory, in fp32; a thread
// owns one tap and, where there are fewer taps than threads, every slots-th column of the tile. Partial results are
// added by a second pass.
#pragma once
#include "conv2d_narrow.cuh"

namespace pynn::cuda {
namespace {

constexpr int kWeightRows = 8, kWeightColumns = 32;

struct NarrowWeights {
  NarrowAxis rows, columns;
  int64_t tiles, tiles_of_split, splits;
  int in_channels, out_channels, out_blocks, groups;  // channels of a group
  int taps, filter, lanes, lane_blocks;               // taps of a channel, and of a filter
  int channels;                                       // the most input channels that a block's taps belong to
  PaddingMode mode;

  NarrowWeights(const Conv2dShape& s, int count)
      : rows(rows_of(s), kWeightRows),
        columns(columns_of(s), kWeightColumns),
        tiles(s.batch * rows.tiles * columns.tiles),
        in_channels(int(s.in_channels / s.groups)),
        out_channels(int(s.out_channels / s.groups)),
        out_blocks(int(ceil_div(out_channels, count))),
        groups(int(s.groups)),
        taps(rows.kernel * columns.kernel),
        filter(in_channels * taps),
        lanes(4),
        mode(s.padding_mode) {
    constexpr int64_t kManyBlocks = 132 * 8;
    while (lanes < kNarrowThreads && lanes < filter) lanes *= 2;
    lane_blocks = int(ceil_div(filter, lanes));
    channels = std::min(in_channels, (lanes - 1) / taps + 2);
    const int64_t wanted = ceil_div(kManyBlocks, int64_t(groups) * out_blocks * lane_blocks);
    tiles_of_split = ceil_div(tiles, std::min(tiles, wanted));
    splits = ceil_div(tiles, tiles_of_split);
  }
  int64_t blocks() const { return splits * groups * out_blocks * lane_blocks; }
  int64_t shared_floats(int count) const {
    return int64_t(count) * kWeightRows * kWeightColumns + int64_t(channels) * rows.tile_in * columns.tile_in;
  }
};

template <class T, int count>
__global__ void __launch_bounds__(kNarrowThreads, 1)
    narrow_weight_kernel(accumulate_t<T>* partial, const T* dy, Strides4 dy_strides, const T* x, Strides4 x_strides,
                         NarrowWeights p, bool channels_fast) {
  using A = accumulate_t<T>;
  constexpr int kPixels = kWeightRows * kWeightColumns;
  DYNAMIC_SHARED(A, gradients);  // (pixel, output channel)
  A* const pixels = gradients + count * kPixels;
  const int tile_size = p.rows.tile_in * p.columns.tile_in;
  const int first_tap = int(blockIdx.x % p.lane_blocks) * p.lanes;
  int64_t rest = blockIdx.x / p.lane_blocks;
  const int first_out = int(rest % p.out_blocks) * count;
  rest /= p.out_blocks;
  const int group = int(rest % p.groups);
  const int64_t split = rest / p.groups;
  const int first_channel = first_tap / p.taps;
  const int channels = min(p.channels, p.in_channels - first_channel), outputs = min(count, p.out_channels - first_out);
  const int slots = kNarrowThreads / p.lanes, lane = int(threadIdx.x) % p.lanes, slot = int(threadIdx.x) / p.lanes;
  const int index = min(first_tap + lane, p.filter - 1), tap = index % p.taps;
  const A* const mine = pixels + (index / p.taps - first_channel) * tile_size +
                        tap / p.columns.kernel * p.rows.dilation * p.columns.tile_in +
                        tap % p.columns.kernel * p.columns.dilation;

  ChunkedSums<A, count> sums;
  const int64_t last = min((split + 1) * p.tiles_of_split, p.tiles);
  for (int64_t tile = split * p.tiles_of_split; tile < last; ++tile) {
    const int j0 = int(tile % p.columns.tiles) * kWeightColumns;
    const int i0 = int(tile / p.columns.tiles % p.rows.tiles) * kWeightRows;
    const int64_t n = tile / p.columns.tiles / p.rows.tiles;
    const int high = min(kWeightRows, p.rows.out - i0), wide = min(kWeightColumns, p.columns.out - j0);
    const T* const image = x + n * x_strides.n + (int64_t(group) * p.in_channels + first_channel) * x_strides.c;
    const T* const from = dy + n * dy_strides.n + (int64_t(group) * p.out_channels + first_out) * dy_strides.c;
    __syncthreads();
    for (int e = int(threadIdx.x); e < count * kPixels; e += kNarrowThreads) {
      const int o = channels_fast ? e % count : e / kPixels, pixel = channels_fast ? e / count : e % kPixels;
      const int i = pixel / kWeightColumns, j = pixel % kWeightColumns;
      const bool inside = o < outputs && i < high && j < wide;
      gradients[pixel * count + o] =
          inside ? A(to_float(from[o * dy_strides.c + (i0 + i) * dy_strides.h + (j0 + j) * dy_strides.w])) : A(0);
    }
    copy_tile(pixels, image, x_strides, channels, p.rows, p.columns, i0, j0, p.mode, channels_fast);
    __syncthreads();
    for (int i = 0; i < high; ++i) {
      const A* const row = mine + i * p.rows.stride * p.columns.tile_in;
      const A* const factors = gradients + i * kWeightColumns * count;
      for (int j = slot; j < wide; j += slots) {
        const A value = row[j * p.columns.stride];
#pragma unroll
        for (int o = 0; o < count; ++o) sums.add(value, factors[j * count + o], o);
        sums.end_row(1);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int o = 0; o < count; ++o) gradients[o * kNarrowThreads + threadIdx.x] = sums.value(o);
  __syncthreads();
  if (slot > 0 || first_tap + lane >= p.filter) return;
  const int64_t weights = int64_t(p.groups) * p.out_channels * p.filter;
  for (int o = 0; o < outputs; ++o) {
    double sum = 0;
    for (int k = 0; k < slots; ++k) sum += gradients[o * kNarrowThreads + k * p.lanes + lane];
    partial[split * weights + (int64_t(group) * p.out_channels + first_out + o) * p.filter + index] = A(sum);
  }
}

// Whether narrow_weight() takes a weight gradient.
inline bool is_narrow_weight(const Conv2dShape& s) {
  if (s.in_channels == 0 || s.batch == 0 || !fits_tiles(rows_of(s)) || !fits_tiles(columns_of(s)) ||
      s.in_channels / s.groups * s.kernel_height * s.kernel_width >= 1 << 28)
    return false;
  const int count = narrow_count(s.out_channels / s.groups);
  const NarrowWeights p(s, count);
  return p.shared_floats(count) <= kMostNarrowFloats && p.blocks() < int64_t(1) << 31;
}

inline int64_t narrow_weight_scratch(const Conv2dShape& s) {
  const NarrowWeights p(s, narrow_count(s.out_channels / s.groups));
  return p.splits * s.out_channels * p.filter * int64_t(sizeof(float));
}

template <class T>
void narrow_weight(T* dw, const T* dy, const Strides4& dy_strides, const T* x, const Strides4& x_strides,
                   const Conv2dShape& s, void* scratch, void* stream) {
  auto* const partial = static_cast<accumulate_t<T>*>(scratch);
  const auto run = [&](auto count) {
    const NarrowWeights p(s, count);
    LAUNCH((narrow_weight_kernel<T, count>), unsigned(p.blocks()), kNarrowThreads,
           size_t(p.shared_floats(count)) * sizeof(accumulate_t<T>), stream, partial, dy, dy_strides, x, x_strides, p,
           is_channels_last(x_strides));
    add_partials(dw, partial, s.out_channels * p.filter, p.splits, stream);
  };
  narrow_count(s.out_channels / s.groups) == 4 ? run(std::integral_constant<int, 4>())
                                               : run(std::integral_constant<int, 8>());
}

}  // namespace
}  // namespace pynn::cuda
