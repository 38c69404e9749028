// Where the sums of an implicit GEMM go: to the output, with bias, residual and activation, or as they are to scratch
// when other blocks add the rest.
#pragma once
#include "conv2d_epilogue.cuh"
#include "conv2d_gemm_geometry.cuh"
#include "conv2d_gemm_tiles.cuh"
#include "pack.cuh"

namespace pynn::cuda {
namespace {
namespace gemm {

template <class T>
struct Target {
  Output<T> out;
  bool packs;                   // 16-byte stores are possible
  int height, width, channels;  // of the output
  // Not null: sums go here instead, as (blockIdx.z, pixel, channel).
  float* sums;
  int64_t sums_stride;
};

template <class T>
constexpr int kPackOf = 16 / sizeof(T);

// A warp stores 16 rows of sums, kWidth columns of `strip`. pixel_of(r): the pixel of row r. Columns from `channel` on,
// `columns` of them exist; `rows` of the 16 rows do.
template <int kWidth, class T, class PixelOf>
__device__ __forceinline__ void store_strip(const Target<T>& to, const float* strip, int stride, int rows, int channel,
                                            int columns, const PixelOf& pixel_of) {
  const int lane = threadIdx.x % 32;
  columns = min(columns, kWidth);
  if (to.sums) {
    float* first = to.sums + blockIdx.z * to.sums_stride + channel;
    for (int r = 0; r < rows; ++r) {
      const Pixel p = pixel_of(r);
      float* row = first + ((int64_t(p.n) * to.height + p.h) * to.width + p.w) * to.channels;
#pragma unroll
      for (int k = 0; k < kWidth; k += 32)
        if (k + lane < columns) row[k + lane] = strip[r * stride + k + lane];
    }
  } else if (to.packs) {
    constexpr int kPack = kPackOf<T>, kLanes = kWidth / kPack;
    const int k = lane % kLanes * kPack, valid = min(kPack, columns - k);
#pragma unroll 1
    for (int r = lane / kLanes; r < rows && valid > 0; r += 32 / kLanes) {
      float values[kPack];
#pragma unroll
      for (int i = 0; i < kPack; i += 4) memcpy(values + i, strip + r * stride + k + i, 16);
      const Pixel p = pixel_of(r);
      to.out.store_channels(values, {p.n, channel + k, p.h, p.w}, valid, true);
    }
  } else {
    const int r = lane % kStripRows;
    if (r >= rows) return;
    const Pixel p = pixel_of(r);
#pragma unroll 1
    for (int k = lane / kStripRows; k < columns; k += 32 / kStripRows)
      to.out.store(strip[r * stride + k], {p.n, channel + k, p.h, p.w});
  }
}

// Stores a tile's sums; `shared` is free memory for all warps. Rows of the tile from `first_row` on are the pixels
// pixel_of(row), `rows` in all; its columns are channels from first_channel on, `columns` in all.
template <class Tile, class T, class PixelOf>
__device__ __forceinline__ void store_tile(const Tile& tile, const Target<T>& to, unsigned char* shared, int64_t rows,
                                           int first_channel, int columns, const PixelOf& pixel_of) {
  constexpr int kWidth = Tile::kWarpColumns, kStride = kWidth + 8;
  float* strip = reinterpret_cast<float*>(shared) + threadIdx.x / 32 * kStripRows * kStride;
#pragma unroll 1
  for (int i = 0; i < Tile::kStrips; ++i) {
    tile.store(i, strip, kStride);
    __syncwarp();
    const int row = tile.row + 16 * i;
    store_strip<kWidth>(to, strip, kStride, int(min(int64_t(kStripRows), rows - row)), first_channel + tile.column,
                        columns - tile.column, [&](int r) { return pixel_of(row + r); });
    __syncwarp();
  }
}

// Adds the partial sums of `splits` blocks in order and finishes them.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Target<T> to, int splits, Elements elements, int64_t count) {
  const int64_t index = thread_index();
  if (index >= count) return;
  const Element e = elements[index];
  const float* from = to.sums + ((e.n * to.height + e.h) * to.width + e.w) * to.channels + e.c;
  float sum = 0;
  for (int s = 0; s < splits; ++s) sum += from[s * to.sums_stride];
  to.out.store(sum, e);
}

}  // namespace gemm
}  // namespace
}  // namespace pynn::cuda
