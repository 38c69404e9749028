// Copies in the order the implicit GEMM reads: images with channels last and filters with the summed channels last,
// both padded with zeros to whole packs of 16 bytes.
#pragma once
#include "conv2d_gemm_output.cuh"
#include "conv2d_prologue_value.cuh"
#include "pack.cuh"

namespace pynn::cuda {
namespace {
namespace gemm {

// ---- images: (sample, pixel, group, channel)

// A block's tile: up to 64 channels, and as many pixels as make 4096 elements, with one element more for each pixel, so
// that a column of the tile lies in different banks.
constexpr int kTileChannels = 64, kTileElements = 4096;

template <class T>
struct ImageCopy {
  T* to;
  const T* from;
  Strides4 strides;
  int channels, padded, groups, width, pixels;  // channels and padded of one group
  int channel_tiles, tile_pixels;
};

// The same with the prologue of a convolution on the way.
template <class T>
struct PrologueCopy : ImageCopy<T> {
  Conv2dPrologue<T> prologue;
};

// A block copies one tile of one group through shared memory: it reads along whichever of channels and pixels is
// contiguous, and writes along channels.
template <class T, class Copy>
__global__ void __launch_bounds__(kThreads) copy_image_kernel(Copy p) {
  constexpr int kPack = kPackOf<T>;
  SHARED_ARRAY(T, tile, kTileElements + kTileElements / kPack);
  const int group = int(blockIdx.y) / p.channel_tiles;
  const int first_channel = int(blockIdx.y) % p.channel_tiles * kTileChannels;
  const int first_pixel = int(blockIdx.x) * p.tile_pixels;
  const T* from = p.from + blockIdx.z * p.strides.n + (group * p.channels + first_channel) * p.strides.c;
  const int channels = p.channels - first_channel, pixels = min(p.tile_pixels, p.pixels - first_pixel);
  const int width = min(kTileChannels, p.padded - first_channel);  // channels of the tile, those beyond the last too
  const bool along_channels = p.strides.c == 1;
  const int inner = along_channels ? width : pixels;
  for (int i = int(threadIdx.x); i < width * pixels; i += kThreads) {
    const int outer = i / inner, rest = i - outer * inner;
    const int pixel = along_channels ? outer : rest, channel = along_channels ? rest : outer;
    const int at = first_pixel + pixel, h = at / p.width, w = at - h * p.width;
    const T* element = from + h * p.strides.h + w * p.strides.w + channel * p.strides.c;
    T value = channel < channels ? *element : T{};
    if constexpr (std::is_same_v<Copy, PrologueCopy<T>>) {
      if (channel < channels) {
        const ChannelPrologue<T> of(p.prologue, blockIdx.z, group * p.channels + first_channel + channel);
        with_any_activation(p.prologue.activation, [&]<Activation kind>() { value = of.template of<kind>(value); });
      }
    }
    tile[pixel * (width + 1) + channel] = value;
  }
  __syncthreads();
  T* to = p.to + ((int64_t(blockIdx.z) * p.pixels + first_pixel) * p.groups + group) * p.padded + first_channel;
  const int packs = width / kPack;
  for (int i = int(threadIdx.x); i < packs * pixels; i += kThreads) {
    const int pixel = i / packs, channel = (i - pixel * packs) * kPack;
    PackOf<T, kPack> pack;
#pragma unroll
    for (int k = 0; k < kPack; ++k) pack.element[k] = tile[pixel * (width + 1) + channel + k];
    store_pack(to + int64_t(pixel) * p.groups * p.padded + channel, pack, kPack, true);
  }
}

// ---- filters: (group, row, tap, summed channel)

template <class T>
struct FilterCopy {
  T* to;
  const T* from;
  int64_t group, row, channel, h, w;  // strides of `from`
  int rows, channels, packs, width, taps;
  bool rows_first;  // neighbouring threads read neighbouring rows, not taps
  int64_t count;
};

template <class T>
__global__ void __launch_bounds__(kThreads) copy_filter_kernel(FilterCopy<T> p) {
  constexpr int kPack = kPackOf<T>;
  int64_t rest = thread_index();
  if (rest >= p.count) return;
  const auto take = [&](int size) {
    const int64_t quotient = rest / size;
    const int remainder = int(rest - quotient * size);
    rest = quotient;
    return remainder;
  };
  int row = 0;
  if (p.rows_first) row = take(p.rows);
  const int tap = take(p.taps), pack_index = take(p.packs);
  if (!p.rows_first) row = take(p.rows);
  const int64_t group = rest;
  const T* from = p.from + group * p.group + row * p.row + tap / p.width * p.h + tap % p.width * p.w;
  PackOf<T, kPack> pack;
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    const int channel = pack_index * kPack + k;
    pack.element[k] = channel < p.channels ? from[channel * p.channel] : T{};
  }
  store_pack(p.to + (((group * p.rows + row) * p.taps + tap) * p.packs + pack_index) * kPack, pack, kPack, true);
}

}  // namespace gemm
}  // namespace
}  // namespace pynn::cuda
