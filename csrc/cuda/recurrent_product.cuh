// The product of a step: sums over k of left[row][k] * right[column][k], for 16 rows or 64 and the columns of 16 units.
//
// Both operands lie along k, in rows that begin on 16 bytes. The columns of all gates of a unit are in the same block
// of threads, as blocks of eight units: units 0-7 of gate 0, of gate 1, ..., then units 8-15. 16-bit types use the
// tensor cores, the others fused multiply-adds.
//
// The sum is cut into kParts, which the warps share: 32 bytes of k after the other go to part 0, 1, ... Every kernel
// adds in this order, within a part and then the parts in pairs, so the bits of a state depend neither on the kernel
// nor on the batch.
#pragma once
#include <algorithm>

#include "pack.cuh"

namespace pynn::cuda {
namespace {
namespace recurrent {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kTileUnits = 16, kStripRows = 16;

// gates: columns of a unit.
template <class T, int gates>
struct Tile {
  static constexpr int kColumns = kTileUnits * gates;
  static constexpr int kWarpBlocks = gates == 1 ? 2 : gates;  // of eight columns, of a warp
  static constexpr int kAcross = 2 * gates / kWarpBlocks;     // warps that share the columns
  static constexpr int kParts = kWarps / kAcross;
  static constexpr int kStagePacks = 2 * kParts, kStageBytes = 16 * kStagePacks, kDepth = kStageBytes / int(sizeof(T));
  static constexpr int kSumsStride = kColumns + 8;  // so that eight rows lie in different banks
};

// Row and column, among 16 and 8, of element i of a lane's four sums.
template <class T>
__device__ __forceinline__ int sum_row(int lane, int i) {
  return sizeof(T) == 2 ? lane / 4 + i / 2 * 8 : lane / 8 + i * 4;
}
template <class T>
__device__ __forceinline__ int sum_column(int lane, int i) {
  return sizeof(T) == 2 ? lane % 4 * 2 + i % 2 : lane % 8;
}

// Adds the products of packs `pack` and `pack` + 1. left(row, pack) and right(row, pack) tell where a pack lies in
// shared memory.
template <class T, int strips, int blocks, class Left, class Right>
__device__ __forceinline__ void multiply(accumulate_t<T> (&sum)[strips][blocks][4], const Left& left,
                                         const Right& right, int pack) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    uint32_t a[strips][4], b[blocks][2];
#pragma unroll
    for (int m = 0; m < strips; ++m) ldmatrix(a[m], left(kStripRows * m + lane % 16, pack + lane / 16));
#pragma unroll
    for (int j = 0; j < blocks; j += 2) {
      if (j + 1 < blocks) {
        uint32_t pair[4];
        ldmatrix(pair, right(8 * j + lane % 8 + lane / 16 * 8, pack + lane / 8 % 2));
        b[j][0] = pair[0], b[j][1] = pair[1];
        b[j + (j + 1 < blocks)][0] = pair[2], b[j + (j + 1 < blocks)][1] = pair[3];
      } else {
        ldmatrix(b[j], right(8 * j + lane % 8, pack + lane / 8 % 2));
      }
    }
#pragma unroll
    for (int m = 0; m < strips; ++m)
#pragma unroll
      for (int j = 0; j < blocks; ++j) mma_m16n8k16<T>(sum[m][j], a[m], b[j]);
  } else {
    constexpr int kPack = 16 / sizeof(T);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      T b[blocks][kPack];
#pragma unroll
      for (int j = 0; j < blocks; ++j)
        memcpy(b[j], __builtin_assume_aligned(right(8 * j + lane % 8, pack + p), 16), 16);
#pragma unroll
      for (int m = 0; m < strips; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          T a[kPack];
          memcpy(a, __builtin_assume_aligned(left(kStripRows * m + lane / 8 + 4 * i, pack + p), 16), 16);
#pragma unroll
          for (int k = 0; k < kPack; ++k)
#pragma unroll
            for (int j = 0; j < blocks; ++j) sum[m][j][i] = fma(a[k], b[j][k], sum[m][j][i]);
        }
    }
  }
}

// Weights of a warp's eight units in its registers, as the tensor cores take them: the first `kept` pairs of packs of a
// sum over 16-bit elements. Nothing where kept is 0.
template <int gates, int kept>
struct KeptWeights {
  uint32_t fragment[std::max(kept, 1)][gates][2];

  // row(gate): where the weights of the lane's unit, lane / 4, begin, or nullptr for zeros.
  template <class Row>
  __device__ __forceinline__ void load(const Row& row) {
#pragma unroll
    for (int g = 0; g < gates; ++g) {
      const auto* const from = row(g);
#pragma unroll
      for (int k = 0; k < kept; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          fragment[k][g][i] = 0;
          if (from) memcpy(&fragment[k][g][i], from + 16 * k + 8 * i + threadIdx.x % 4 * 2, 4);
        }
    }
  }

  // Adds the products of packs 2 k and 2 k + 1.
  template <class T, class Left>
  __device__ __forceinline__ void multiply(accumulate_t<T> (&sum)[gates][4], const Left& left, int k) const {
    const int lane = threadIdx.x % 32;
    uint32_t a[4];
    ldmatrix(a, left(lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int g = 0; g < gates; ++g) mma_m16n8k16<T>(sum[g], a, fragment[k][g]);
  }
};

template <int parts, class A>
__device__ __forceinline__ A add_parts(A (&part)[parts]) {
#pragma unroll
  for (int distance = 1; distance < parts; distance *= 2)
#pragma unroll
    for (int p = 0; p < parts; p += 2 * distance) part[p] += part[p + distance];
  return part[0];
}

// The operands. Rows of left are padded with zeros to whole stages.
template <class T>
struct Operands {
  const T *left, *right;
  int64_t left_stride, right_stride, gate_stride;  // in elements: from row to row, from gate to gate
  int64_t rows;
  int units, right_packs, stages;
};

// How operands pass through shared memory: kSub stages at a time, kBuffers of them. resident: right is there already.
template <class T, int gates, int strips, bool resident>
struct Pipeline {
  using A = accumulate_t<T>;
  using Tile = recurrent::Tile<T, gates>;
  static constexpr int kPack = 16 / sizeof(T);
  static constexpr int kRows = kStripRows * strips, kBuffers = 3;
  static constexpr int kSub = resident ? 512 / Tile::kStageBytes : strips == 1 ? 2 : 1;
  static constexpr int kLeftBytes = kRows * Tile::kStageBytes, kRightBytes = Tile::kColumns * Tile::kStageBytes;
  static constexpr int kBufferBytes = kSub * (kLeftBytes + (resident ? 0 : kRightBytes));
  static constexpr size_t kSumsBytes = Tile::kParts * kRows * Tile::kSumsStride * sizeof(A);
  static constexpr size_t kSharedBytes = std::max(size_t(kBuffers * kBufferBytes), kSumsBytes);
  static constexpr int kWidth = kSub * Tile::kStagePacks;  // packs of a row of a buffer

  static __device__ __forceinline__ int offset(int row, int pack) {
    return row * Tile::kStageBytes + (pack ^ (row & 7)) * 16;
  }

  // Copies stages first .. first + count of the right operand to `to`.
  template <int count>
  static __device__ __forceinline__ void copy_right(unsigned char* to, const Operands<T>& o, int first, int unit0) {
    constexpr int kPacks = count * Tile::kStagePacks;
    const int pack = threadIdx.x % kPacks, from_pack = first * Tile::kStagePacks + pack;
#pragma unroll
    for (int column = threadIdx.x / kPacks; column < Tile::kColumns; column += kThreads / kPacks) {
      const int gate = column / 8 % gates, unit = unit0 + column / (8 * gates) * 8 + column % 8;
      const bool valid = unit < o.units && from_pack < o.right_packs;
      const T* from = o.right + (valid ? gate * o.gate_stride + unit * o.right_stride + from_pack * kPack : 0);
      cp_async<16>(to + pack / Tile::kStagePacks * kRightBytes + offset(column, pack % Tile::kStagePacks), from,
                   valid ? 16 : 0);
    }
  }

  static __device__ __forceinline__ void copy_left(unsigned char* to, const Operands<T>& o, int first, int64_t row0) {
    const int pack = threadIdx.x % kWidth, from_pack = first * Tile::kStagePacks + pack;
#pragma unroll
    for (int row = threadIdx.x / kWidth; row < kRows; row += kThreads / kWidth) {
      const bool valid = row0 + row < o.rows && from_pack < o.stages * Tile::kStagePacks;
      const T* from = o.left + (valid ? (row0 + row) * o.left_stride + from_pack * kPack : 0);
      cp_async<16>(to + pack / Tile::kStagePacks * kLeftBytes + offset(row, pack % Tile::kStagePacks), from,
                   valid ? 16 : 0);
    }
  }

  // The sums of rows from row0 and units from unit0 on, to `shared`, where sum() finds them. right: where it is
  // resident. The block's threads are together before, and have to meet before `shared` is used again.
  static __device__ __forceinline__ void run(const Operands<T>& o, int64_t row0, int unit0, unsigned char* shared,
                                             const unsigned char* resident_right) {
    const auto copy = [&](int chunk, int buffer) {
      unsigned char* const to = shared + buffer * kBufferBytes;
      copy_left(to, o, chunk * kSub, row0);
      if constexpr (!resident) copy_right<kSub>(to + kSub * kLeftBytes, o, chunk * kSub, unit0);
    };
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp / Tile::kAcross,
              block = warp % Tile::kAcross * Tile::kWarpBlocks;
    const int chunks = (o.stages + kSub - 1) / kSub;
    A sum[strips][Tile::kWarpBlocks][4] = {};
#pragma unroll
    for (int c = 0; c < kBuffers - 1; ++c) {
      if (c < chunks) copy(c, c);
      cp_async_commit();
    }
    int read = 0, write = kBuffers - 1;
    for (int c = 0; c < chunks; ++c) {
      cp_async_wait<kBuffers - 2>();
      __syncthreads();
      if (c + kBuffers - 1 < chunks) copy(c + kBuffers - 1, write);
      cp_async_commit();
#pragma unroll
      for (int s = 0; s < kSub; ++s) {
        if (kSub > 1 && c * kSub + s >= o.stages) break;
        const unsigned char* left = shared + read * kBufferBytes + s * kLeftBytes;
        const unsigned char* right = resident ? resident_right + (c * kSub + s) * kRightBytes
                                              : shared + read * kBufferBytes + kSub * kLeftBytes + s * kRightBytes;
        multiply<T, strips, Tile::kWarpBlocks>(
            sum, [&](int row, int pack) { return left + offset(row, pack); },
            [&](int row, int pack) { return right + offset(8 * block + row, pack); }, 2 * part);
      }
      read = read + 1 == kBuffers ? 0 : read + 1;
      write = write + 1 == kBuffers ? 0 : write + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
    A* const sums = reinterpret_cast<A*>(shared) + part * (kRows * Tile::kSumsStride) + 8 * block;
#pragma unroll
    for (int m = 0; m < strips; ++m)
#pragma unroll
      for (int j = 0; j < Tile::kWarpBlocks; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[(kStripRows * m + sum_row<T>(lane, i)) * Tile::kSumsStride + 8 * j + sum_column<T>(lane, i)] =
              sum[m][j][i];
    __syncthreads();
  }

  // A sum that run() left in `shared`.
  static __device__ __forceinline__ A sum(const unsigned char* shared, int row, int unit, int gate) {
    A part[Tile::kParts];
    const A* from =
        reinterpret_cast<const A*>(shared) + row * Tile::kSumsStride + (unit / 8 * gates + gate) * 8 + unit % 8;
#pragma unroll
    for (int p = 0; p < Tile::kParts; ++p) part[p] = from[p * (kRows * Tile::kSumsStride)];
    return add_parts(part);
  }
};

}  // namespace recurrent
}  // namespace
}  // namespace pynn::cuda
