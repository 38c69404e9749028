// The tiles of the implicit GEMM: how a block of threads multiplies what lies in shared memory.
//
// A stage holds, for each row of the left operand and for each column of the right one, 64 bytes of the sum (`kDepth`
// products). Its 16-byte packs are permuted within 128 bytes so that 8 rows of one pack lie in different banks
// (`offset_of`), which is how ldmatrix and the 16-byte loads of the fp32 tile read them.
//
// The weight gradient sums over pixels, between which the elements of both operands do not touch: there a stage holds
// kDepth rows of elements instead (kAcross, `offset_across`).
//
// A tile keeps its sums in registers, acc and, with kTotals, a total to which acc is added whenever a chunk of the sum
// is over: short chunks keep the rounding errors of fp32 sums small, and a chunk may be another block's work (split
// sums) without a change of the result. Finished sums leave in strips of 16 rows through shared memory.
#pragma once
#include "primitives.cuh"

namespace pynn::cuda {
namespace {
namespace gemm {

constexpr int kRowBytes = 64, kRowPacks = kRowBytes / 16, kStripRows = 16;

// Where pack `pack` of row `row` of a stage's operand lies, in bytes. The permutation only flips bits: eight rows
// further is 8 * kRowBytes further, and pack ^ x is at offset ^ (16 * x), so a thread needs one offset for all that it
// reads.
__device__ __forceinline__ int offset_of(int row, int pack) {
  return row * kRowBytes + ((pack ^ (row >> 1)) & (kRowPacks - 1)) * 16;
}

// The same for operands that lie as kDepth rows of `width` columns: pack `pack` of the columns at step k of the sum.
// 16-bit columns are read by ldmatrix, transposed, eight steps at a time; TF32 ones word by word, four steps and eight
// columns at a time.
template <class T, int width>
__device__ __forceinline__ int offset_across(int k, int pack) {
  return k * width * int(sizeof(T)) + (pack ^ (sizeof(T) == 2 ? k & 7 : k % 4 * 2)) * 16;
}

// The tensor core instruction for 32 bytes of the sum.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2)
    mma_m16n8k16<T>(d, a, b);
  else
    mma_m16n8k8_tf32(d, a, b);
}

// fp32 operands of the tensor cores are rounded, not cut, to TF32.
template <class T, int count>
__device__ __forceinline__ void round_operand(uint32_t (&fragment)[count]) {
  if constexpr (sizeof(T) == 4)
#pragma unroll
    for (int i = 0; i < count; ++i) fragment[i] = to_tf32(bit_cast<float>(fragment[i]));
}

// When a chunk is over: after `length` steps. A step is a block of the sum for tensor cores, four products otherwise.
struct ChunkCounter {
  int length, left;
  explicit __device__ ChunkCounter(int length) : length(length), left(length) {}
  __device__ __forceinline__ bool step() {
    if (--left > 0) return false;
    left = length;
    return true;
  }
};

// Tensor cores; T is BFloat16, Half, or float for TF32. Each warp computes a part of kWarpRows x kWarpColumns.
template <class T, int rows, int columns, int warp_rows, int warp_columns, int blocks, int stages, bool totals,
          bool across = false>
struct MmaTile {
  using Element = T;
  static constexpr int kRows = rows, kColumns = columns, kDepth = kRowBytes / sizeof(T), kStages = stages;
  static constexpr int kBlocksPerProcessor = blocks;
  static constexpr int kWarpRows = warp_rows, kWarpColumns = warp_columns;
  static constexpr int kThreads = 32 * (kRows / kWarpRows) * (kColumns / kWarpColumns);
  static constexpr int kStrips = kWarpRows / 16, kParts = kWarpColumns / 8;
  static constexpr bool kTotals = totals;

  float acc[kStrips][kParts][4] = {}, total[kTotals ? kStrips : 1][kTotals ? kParts : 1][4] = {};
  int lane = threadIdx.x % 32;
  int row = threadIdx.x / 32 / (kColumns / kWarpColumns) * kWarpRows;        // first of this warp
  int column = threadIdx.x / 32 % (kColumns / kWarpColumns) * kWarpColumns;  // first of this warp
  int left_at, right_at;  // where this lane's part of the operands begins
  ChunkCounter chunk;

  explicit __device__ MmaTile(int chunk) : chunk(chunk) {
    if constexpr (!across) {
      left_at = offset_of(row + lane % 16, lane / 16);
      right_at = offset_of(column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    } else if constexpr (sizeof(T) == 2) {
      left_at = offset_across<T, kRows>(lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2);
      right_at = offset_across<T, kColumns>(lane % 16, column / 8 + lane / 16);
    } else {
      left_at = offset_across<T, kRows>(lane % 4, row / 4 + lane / 16) + lane / 4 % 4 * 4;
      right_at = offset_across<T, kColumns>(lane % 4, column / 4 + lane / 16) + lane / 4 % 4 * 4;
    }
  }

  // The word of an operand of `width` columns that is `k` steps and `further` columns (a multiple of 8) after `at`.
  template <int width>
  static __device__ __forceinline__ uint32_t word(const unsigned char* operand, int at, int k, int further) {
    return *reinterpret_cast<const uint32_t*>(operand + ((at ^ (further * 4)) + k * width * 4));
  }

  __device__ __forceinline__ void multiply(const unsigned char* left, const unsigned char* right) {
#pragma unroll
    for (int k = 0; k < kRowPacks; k += 2) {
      uint32_t a[kStrips][4], b[kParts][2];
#pragma unroll
      for (int i = 0; i < kStrips; ++i) {
        if constexpr (!across)
          ldmatrix(a[i], left + ((left_at ^ (16 * k)) + 16 * i * kRowBytes));
        else if constexpr (sizeof(T) == 2)
          ldmatrix_trans(a[i], left + ((left_at ^ (32 * i)) + 8 * k * kRows * 2));
        else
#pragma unroll
          for (int e = 0; e < 4; ++e) a[i][e] = word<kRows>(left, left_at, 4 * k + e / 2 * 4, 16 * i + e % 2 * 8);
        round_operand<T>(a[i]);
      }
#pragma unroll
      for (int j = 0; j < kParts; j += 2) {
        uint32_t pair[4];
        if constexpr (!across)
          ldmatrix(pair, right + ((right_at ^ (16 * k)) + 8 * j * kRowBytes));
        else if constexpr (sizeof(T) == 2)
          ldmatrix_trans(pair, right + ((right_at ^ (16 * j)) + 8 * k * kColumns * 2));
        else
#pragma unroll
          for (int e = 0; e < 4; ++e) pair[e] = word<kColumns>(right, right_at, 4 * k + e % 2 * 4, 8 * j + e / 2 * 8);
        round_operand<T>(pair);
        b[j][0] = pair[0], b[j][1] = pair[1], b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
      }
#pragma unroll
      for (int i = 0; i < kStrips; ++i)
#pragma unroll
        for (int j = 0; j < kParts; ++j) mma<T>(acc[i][j], a[i], b[j]);
    }
    if constexpr (kTotals) {
      if (chunk.step()) end_chunk();
    }
  }

  __device__ __forceinline__ void end_chunk() {
    if constexpr (kTotals) {
#pragma unroll
      for (int i = 0; i < kStrips; ++i)
#pragma unroll
        for (int j = 0; j < kParts; ++j)
#pragma unroll
          for (int k = 0; k < 4; ++k) total[i][j][k] += acc[i][j][k], acc[i][j][k] = 0;
    }
  }

  // Writes the tile's rows from row + 16 * index on, 16 of them, to `strip` with rows of `stride` floats.
  __device__ __forceinline__ void store(int index, float* strip, int stride) const {
#pragma unroll
    for (int i = 0; i < kStrips; ++i)
      if (i == index)
#pragma unroll
        for (int j = 0; j < kParts; ++j)
#pragma unroll
          for (int k = 0; k < 4; k += 2) {
            const float* from = kTotals ? total[kTotals ? i : 0][kTotals ? j : 0] : acc[i][j];
            float* to = strip + (lane / 4 + 4 * k) * stride + 8 * j + lane % 4 * 2;
            to[0] = from[k], to[1] = from[k + 1];
          }
  }
};

// True fp32: a thread computes height x 8 sums. Its rows are 4 and its columns 8 apart, or, across, come in runs of
// four.
template <int height, int blocks, int stages, bool across = false>
struct FmaTile {
  using Element = float;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kDepth = kRowBytes / sizeof(float), kStages = stages;
  static constexpr int kWarpRows = 4 * height, kWarpColumns = 64, kBlocksPerProcessor = blocks;
  static constexpr int kRows = kWarps * kWarpRows, kColumns = kWarpColumns, kStrips = height / 4;
  static constexpr bool kTotals = true;

  float acc[height][8] = {}, total[height][8] = {};
  int lane = threadIdx.x % 32;
  int row = threadIdx.x / 32 * kWarpRows, column = 0;
  ChunkCounter chunk;

  explicit __device__ FmaTile(int chunk) : chunk(chunk) {}

  __device__ __forceinline__ void multiply(const unsigned char* left, const unsigned char* right) {
    if constexpr (across) {
#pragma unroll 1
      for (int step = 0; step < kDepth; step += 4) {
#pragma unroll
        for (int k = step; k < step + 4; ++k) {
          float a[height], b[8];
#pragma unroll
          for (int i = 0; i < height; i += 4)
            memcpy(a + i, left + offset_across<float, kRows>(k, row / 4 + i + lane / 8), 16);
#pragma unroll
          for (int j = 0; j < 8; j += 4) memcpy(b + j, right + offset_across<float, kColumns>(k, 2 * j + lane % 8), 16);
#pragma unroll
          for (int i = 0; i < height; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) acc[i][j] = __fmaf_rn(a[i], b[j], acc[i][j]);
        }
        if (chunk.step()) end_chunk();
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < kRowPacks; ++k) {
        float4 a[height];
        // Rows 8 apart are permuted alike.
        const int even = offset_of(row + lane / 8, k), odd = offset_of(row + lane / 8 + 4, k);
#pragma unroll
        for (int i = 0; i < height; ++i)
          a[i] = *reinterpret_cast<const float4*>(left + ((i % 2 ? odd : even) + i / 2 * 8 * kRowBytes));
        const int right_at = offset_of(lane % 8, k);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float4 b = *reinterpret_cast<const float4*>(right + (right_at + 8 * j * kRowBytes));
#pragma unroll
          for (int i = 0; i < height; ++i) acc[i][j] = __fmaf_rn(a[i].x, b.x, acc[i][j]);
#pragma unroll
          for (int i = 0; i < height; ++i) acc[i][j] = __fmaf_rn(a[i].y, b.y, acc[i][j]);
#pragma unroll
          for (int i = 0; i < height; ++i) acc[i][j] = __fmaf_rn(a[i].z, b.z, acc[i][j]);
#pragma unroll
          for (int i = 0; i < height; ++i) acc[i][j] = __fmaf_rn(a[i].w, b.w, acc[i][j]);
        }
        if (chunk.step()) end_chunk();
      }
    }
  }

  __device__ __forceinline__ void end_chunk() {
#pragma unroll
    for (int i = 0; i < height; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) total[i][j] += acc[i][j], acc[i][j] = 0;
  }

  __device__ __forceinline__ void store(int index, float* strip, int stride) const {
#pragma unroll
    for (int i = 0; i < height; ++i)
      if (i / 4 == index)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int r = across ? lane / 8 * 4 + i % 4 : lane / 8 + i % 4 * 4;
          const int c = across ? j / 4 * 32 + lane % 8 * 4 + j % 4 : lane % 8 + 8 * j;
          strip[r * stride + c] = total[i][j];
        }
  }
};

// The stages of a block of threads, and the strips of finished sums that take their place.
template <class Tile>
constexpr int kStageBytes = (Tile::kRows + Tile::kColumns) * kRowBytes;
template <class Tile>
constexpr size_t kStripBytes = Tile::kThreads / 32 * kStripRows * (Tile::kWarpColumns + 8) * sizeof(float);
template <class Tile>
constexpr size_t kSharedBytes = std::max(size_t(Tile::kStages * kStageBytes<Tile>), kStripBytes<Tile>);

// Adds `blocks` blocks of the sum to the tile while the loader copies those that follow. Afterwards `shared` is free.
// A loader may have transform(stage), which changes what its thread has copied there once that has arrived, and then
// skip(), called instead of copy() where there is nothing left to copy.
template <class Tile, class Loader>
__device__ __forceinline__ void run_pipeline(Tile& tile, Loader& loader, int blocks, unsigned char* shared,
                                             int left_bytes) {
  constexpr int kAhead = Tile::kStages - 1;
  constexpr bool kTransforms = requires { loader.transform(shared); };
  const auto copy = [&](bool exists, int stage) {
    if (exists)
      loader.copy(shared + stage * kStageBytes<Tile>);
    else if constexpr (kTransforms)
      loader.skip();
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < kAhead; ++s) copy(s < blocks, s);
  int read = 0, write = kAhead;
  for (int b = 0; b < blocks; ++b) {
    cp_async_wait<kAhead - 1>();
    if constexpr (kTransforms) loader.transform(shared + read * kStageBytes<Tile>);
    __syncthreads();
    copy(b + kAhead < blocks, write);
    const unsigned char* stage = shared + read * kStageBytes<Tile>;
    tile.multiply(stage, stage + left_bytes);
    read = read + 1 == Tile::kStages ? 0 : read + 1;
    write = write + 1 == Tile::kStages ? 0 : write + 1;
  }
  tile.end_chunk();
  cp_async_wait<0>();
  __syncthreads();
}

}  // namespace gemm
}  // namespace
}  // namespace pynn::cuda
