// Copies in the order the implicit GEMM reads: images with channels last and filters with the summed channels last,
// both padded with zeros to whole packs of 16 bytes.
#pragma once
#include "conv2d_gemm_output.cuh"
#include "pack.cuh"

namespace pynn::cuda {
namespace {
namespace gemm {

// ---- images: (sample, pixel, group, channel)

constexpr int kTilePixels = 64, kTileChannels = 64;

template <class T>
struct ImageCopy {
  T* to;
  const T* from;
  Strides4 strides;
  int channels, padded, groups, width, pixels;  // channels and padded of one group
  int channel_tiles;
};

// A block copies 64 pixels times 64 channels of one group through shared memory: it reads along whichever of the two is
// contiguous, and writes along channels.
template <class T>
__global__ void __launch_bounds__(kThreads) copy_image_kernel(ImageCopy<T> p) {
  constexpr int kPack = kPackOf<T>;
  SHARED_ARRAY(T[kTileChannels + 1], tile, kTilePixels);
  const int group = int(blockIdx.y) / p.channel_tiles;
  const int first_channel = int(blockIdx.y) % p.channel_tiles * kTileChannels,
            first_pixel = int(blockIdx.x) * kTilePixels;
  const T* from = p.from + blockIdx.z * p.strides.n + (group * p.channels + first_channel) * p.strides.c;
  const int channels = min(kTileChannels, p.channels - first_channel),
            pixels = min(kTilePixels, p.pixels - first_pixel);
  const bool along_channels = p.strides.c == 1;
  for (int i = int(threadIdx.x); i < kTilePixels * kTileChannels; i += kThreads) {
    const int pixel = along_channels ? i / kTileChannels : i % kTilePixels;
    const int channel = along_channels ? i % kTileChannels : i / kTilePixels;
    T value{};
    if (pixel < pixels && channel < channels) {
      const int at = first_pixel + pixel, h = at / p.width, w = at - h * p.width;
      value = from[h * p.strides.h + w * p.strides.w + channel * p.strides.c];
    }
    tile[pixel][channel] = value;
  }
  __syncthreads();
  const int padded = min(kTileChannels, p.padded - first_channel);
  T* to = p.to + ((int64_t(blockIdx.z) * p.pixels + first_pixel) * p.groups + group) * p.padded + first_channel;
  for (int i = int(threadIdx.x); i < kTilePixels * kTileChannels / kPack; i += kThreads) {
    const int pixel = i / (kTileChannels / kPack), channel = i % (kTileChannels / kPack) * kPack;
    if (pixel >= pixels || channel >= padded) continue;
    PackOf<T, kPack> pack;
#pragma unroll
    for (int k = 0; k < kPack; ++k) pack.element[k] = tile[pixel][channel + k];
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
