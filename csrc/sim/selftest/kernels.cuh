// Correct kernels that use everything the sim offers: they must give the right result in every order, and run clean
// under every sanitizer.
#pragma once
#include "../../cuda/primitives.cuh"

namespace selftest {

using pynn::BFloat16;
using pynn::Half;
using namespace pynn::cuda;

// y = x + bias[i % channels] in 16-byte vectors, grid-stride, the tail by the first block.
__global__ void pointwise(const float* x, const float* bias, float* y, int64_t count, int channels) {
  const int64_t vectors = count / 4, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += stride) {
    float4 v = load_streaming(reinterpret_cast<const float4*>(x) + i);
    v.x += bias[(4 * i) % channels], v.y += bias[(4 * i + 1) % channels];
    v.z += bias[(4 * i + 2) % channels], v.w += bias[(4 * i + 3) % channels];
    store_streaming(reinterpret_cast<float4*>(y) + i, v);
  }
  if (blockIdx.x == 0)
    for (int64_t i = 4 * vectors + threadIdx.x; i < count; i += blockDim.x) y[i] = x[i] + bias[i % channels];
}

// c = a b with tiles in shared memory, and the sums of c's rows by shuffles and atomics.
template <int tile>
__global__ void matmul(const float* a, const float* b, float* c, float* row_sums, int m, int n, int k) {
  SHARED_ARRAY(float[tile + 1], tile_a, tile);
  SHARED_ARRAY(float[tile + 1], tile_b, tile);
  const int tx = int(threadIdx.x), ty = int(threadIdx.y);
  const int row = int(blockIdx.y) * tile + ty, column = int(blockIdx.x) * tile + tx;
  float sum = 0;
  for (int start = 0; start < k; start += tile) {
    tile_a[ty][tx] = row < m && start + tx < k ? a[int64_t(row) * k + start + tx] : 0.0f;
    tile_b[ty][tx] = start + ty < k && column < n ? b[int64_t(start + ty) * n + column] : 0.0f;
    __syncthreads();
    for (int i = 0; i < tile; ++i) sum += tile_a[ty][i] * tile_b[i][tx];
    __syncthreads();
  }
  if (row < m && column < n) c[int64_t(row) * n + column] = sum;
  float row_sum = row < m && column < n ? sum : 0.0f;
  for (int offset = tile / 2; offset > 0; offset /= 2) row_sum += __shfl_xor_sync(0xffffffffu, row_sum, offset, tile);
  if (tx == 0 && row < m) atomicAdd(row_sums + row, row_sum);
}

// c (m, n) = a (m, k) b (n, k)^T on tensor cores: a block makes 64 x 32 of c with four warps, tiles of k come through
// two buffers of cp.async. T is Half or BFloat16.
template <class T>
__global__ void __launch_bounds__(128) gemm(const T* a, const T* b, float* c, int m, int n, int k) {
  constexpr int kM = 64, kN = 32, kK = 32, kRow = kK + 8;  // rows are padded: ldmatrix then meets no bank twice
  DYNAMIC_SHARED(T, shared);
  T *tile_a = shared, *tile_b = shared + 2 * kM * kRow;
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int first_row = int(blockIdx.y) * kM, first_column = int(blockIdx.x) * kN;
  float sums[4][4] = {};
  const auto load_rows = [&](T* tile, const T* from, int rows, int first, int limit, int start) {
    for (int i = thread; i < rows * kK / 8; i += 128) {
      const int row = i / (kK / 8), column = i % (kK / 8) * 8;
      const bool inside = first + row < limit && start + column < k;
      cp_async<16>(tile + row * kRow + column, inside ? from + int64_t(first + row) * k + start + column : from,
                   inside ? 16 : 0);
    }
  };
  const auto load = [&](int buffer, int start) {
    load_rows(tile_a + buffer * kM * kRow, a, kM, first_row, m, start);
    load_rows(tile_b + buffer * kN * kRow, b, kN, first_column, n, start);
    cp_async_commit();
  };
  const int steps = (k + kK - 1) / kK;
  load(0, 0);
  for (int step = 0; step < steps; ++step) {
    const int buffer = step % 2;
    if (step + 1 < steps) {
      load(1 - buffer, (step + 1) * kK);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    for (int start = 0; start < kK; start += 16) {
      uint32_t fragment_a[4];
      ldmatrix(fragment_a, tile_a + (buffer * kM + warp * 16 + lane % 16) * kRow + start + lane / 16 * 8);
      for (int j = 0; j < 4; j += 2) {
        uint32_t pair[4];
        ldmatrix(pair, tile_b + (buffer * kN + j * 8 + lane / 16 * 8 + lane % 8) * kRow + start + lane / 8 % 2 * 8);
        const uint32_t left[2] = {pair[0], pair[1]}, right[2] = {pair[2], pair[3]};
        mma_m16n8k16<T>(sums[j], fragment_a, left);
        mma_m16n8k16<T>(sums[j + 1], fragment_a, right);
      }
    }
    __syncthreads();
  }
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + warp * 16 + lane / 4 + 8 * (i / 2);
      const int column = first_column + j * 8 + lane % 4 * 2 + i % 2;
      if (row < m && column < n) c[int64_t(row) * n + column] = sums[j][i];
    }
}

// One warp: c (16, 8) = a (16, k) b (k, 8) on tf32 tensor cores, k a multiple of 8.
__global__ void gemm_tf32(const float* a, const float* b, float* c, int k) {
  const int lane = int(threadIdx.x), group = lane / 4, member = lane % 4;
  float sums[4] = {};
  for (int start = 0; start < k; start += 8) {
    const float *row = a + group * k + start + member, *column = b + (start + member) * 8 + group;
    const uint32_t fragment_a[4] = {to_tf32(row[0]), to_tf32(row[8 * k]), to_tf32(row[4]), to_tf32(row[8 * k + 4])};
    const uint32_t fragment_b[2] = {to_tf32(column[0]), to_tf32(column[4 * 8])};
    mma_m16n8k8_tf32(sums, fragment_a, fragment_b);
  }
  for (int i = 0; i < 4; ++i) c[(group + 8 * (i / 2)) * 8 + member * 2 + i % 2] = sums[i];
}

// Every matrix of ldmatrix, plain and transposed: what a lane got, 14 registers per lane. Copies of 4 and 8 bytes.
__global__ void matrices(const uint16_t* rows, uint32_t* registers) {
  SHARED_ARRAY(uint16_t, shared, 4 * 64);  // four matrices of 8 x 8
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 64; i += 32) {
    cp_async<8>(shared + 4 * i, rows + 4 * i, i < 32 ? 8 : 4);
    if (i >= 32) cp_async<4>(shared + 4 * i + 2, rows + 4 * i + 2);  // the half that was filled with zeros
    cp_async_commit();
    cp_async_wait<0>();
  }
  __syncwarp();
  const uint16_t* row = shared + lane * 8;
  uint32_t one[1], two[2], four[4], *out = registers + lane * 14;
  ldmatrix(one, row);
  ldmatrix(two, row);
  ldmatrix(four, row);
  out[0] = one[0];
  for (int i = 0; i < 2; ++i) out[1 + i] = two[i];
  for (int i = 0; i < 4; ++i) out[3 + i] = four[i];
  ldmatrix_trans(one, row);
  ldmatrix_trans(two, row);
  ldmatrix_trans(four, row);
  out[7] = one[0];
  for (int i = 0; i < 2; ++i) out[8 + i] = two[i];
  for (int i = 0; i < 4; ++i) out[10 + i] = four[i];
}

// Collectives: 12 values per thread, each of them also computed by the host.
__global__ void collectives(int* out) {
  const unsigned all = 0xffffffffu;
  const int thread = int(threadIdx.x), lane = thread % 32;
  int* mine = out + thread * 12;
  mine[0] = __shfl_sync(all, thread, 3);
  mine[1] = __shfl_sync(all, thread, lane + 1, 8);
  mine[2] = __shfl_up_sync(all, thread, 2, 16);
  mine[3] = __shfl_down_sync(all, thread, 5);
  mine[4] = __shfl_xor_sync(all, thread, 9);
  mine[5] = int(__ballot_sync(all, lane % 3 == 0));
  mine[6] = __any_sync(all, thread == 40) + 2 * __all_sync(all, thread < 32);
  mine[7] = __syncthreads_count(thread % 5 == 0);
  mine[8] = __syncthreads_or(thread == 7) + 2 * __syncthreads_or(thread == 1000);
  mine[9] = __syncthreads_and(thread < 1000) + 2 * __syncthreads_and(thread != 7);
  // Two halves of a warp in operations of their own.
  mine[10] = lane < 16 ? __shfl_sync(0x0000ffffu, thread, 1) : __shfl_sync(0xffff0000u, thread, 17);
  double wide = thread;
  for (int offset = 16; offset > 0; offset /= 2) wide += __shfl_down_sync(all, wide, offset);
  mine[11] = int(__shfl_sync(all, wide, 0));
}

__global__ void atomics(int* ints, unsigned* words, unsigned long long* longs, float* floats, double* doubles) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(ints, i);
  atomicSub(ints + 1, i);
  atomicMax(ints + 2, i);
  atomicMin(ints + 3, -i);
  atomicAdd(words, 3u);
  atomicOr(words + 1, 1u << (i % 32));
  atomicAnd(words + 2, ~(1u << (i % 32)));
  atomicInc(words + 3, 9u);
  unsigned seen = atomicAdd(words + 4, 0u);  // an increment by compare-and-swap; a plain read would be a race
  for (unsigned expected = seen + 1; seen != expected;) {
    expected = seen;
    seen = atomicCAS(words + 4, expected, expected + 1);
  }
  if (atomicExch(words + 5, 1u) == 0) atomicAdd(words + 6, 1u);
  atomicAdd(longs, 1ull << 33);
  atomicMax(longs + 1, static_cast<unsigned long long>(i) << 32);
  atomicAdd(floats, 0.5f);
  atomicAdd(doubles, 0.25);
}

// Sums x in one launch: the last block to finish adds up what the others wrote.
__global__ void last_block_sum(const float* x, float* partial, unsigned* finished, float* sum) {
  SHARED_ARRAY(unsigned, place, 1);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[2 * blockIdx.x] + x[2 * blockIdx.x + 1];
    __threadfence();
    place[0] = atomicAdd(finished, 1u);
  }
  __syncthreads();
  if (place[0] != gridDim.x - 1 || threadIdx.x != 0) return;
  __threadfence();
  float total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
  *sum = total;
}

// Cooperative: every block waits for all others at each step, then reads its neighbour's value.
__global__ void ring(unsigned* arrived, int* values, int steps) {
  const unsigned block = blockIdx.x, blocks = gridDim.x;
  for (int step = 0; step < steps; ++step) {
    int* from = values + (step % 2) * blocks;
    int* to = values + ((step + 1) % 2) * blocks;
    if (threadIdx.x == 0) {
      to[block] = from[(block + 1) % blocks] + 1;
      red_release_add(arrived, 1u);
      while (load_acquire(arrived) < blocks * unsigned(step + 1)) continue;
    }
    __syncthreads();
  }
}

// Clusters: every thread sends a word to all blocks and the first thread a pack as well, and goes on with those of the
// next block, step by step from one of two buffers to the other. Whoever has all words of a step knows that all blocks
// have read those of the one before it.
__global__ void cluster_ring(int* out, int steps) {
  if constexpr (kClusters) {
    SHARED_ARRAY(int[8][64], words, 2);
    SHARED_ARRAY(int4[8], packs, 2);
    SHARED_ARRAY(uint64_t, arrived, 2);
    const int thread = int(threadIdx.x);
    const unsigned rank = cluster_rank(), blocks = cluster_blocks(), source = (rank + 1) % blocks;
    int word = 100 * int(blockIdx.x) + thread;
    int4 pack = make_int4(int(rank), 1, 2, 3);
    if (thread == 0)
      for (int i = 0; i < 2; ++i) mbarrier_init(arrived + i, 64);
    cluster_arrive();
    cluster_wait();
    for (int step = 0; step < steps; ++step) {
      const int buffer = step % 2;
      for (unsigned to = 0; to < blocks; ++to) {
        store_async(words[buffer][rank] + thread, to, word + 1, arrived + buffer);
        if (thread == 0)
          store_async(packs[buffer] + rank, to, make_int4(pack.x, pack.y + 1, pack.z + 2, pack.w + 3),
                      arrived + buffer);
      }
      mbarrier_arrive(arrived + buffer, blocks * (thread == 0 ? 20 : 4));
      mbarrier_wait(arrived + buffer, unsigned(step) / 2 % 2);
      word = words[buffer][source][thread];
      pack = packs[buffer][source];
    }
    int* const mine = out + 68 * blockIdx.x;
    mine[thread] = word;
    if (thread == 0) mine[64] = pack.x, mine[65] = pack.y, mine[66] = pack.z, mine[67] = pack.w;
  }
}
// What it gives for clusters of `blocks`.
inline int cluster_ring_result(int block, int i, int blocks, int steps) {
  const int rank = (block % blocks + steps) % blocks, from = block / blocks * blocks + rank;
  return i < 64 ? 100 * from + i + steps : i == 64 ? rank : (i - 64) * (steps + 1);
}

}  // namespace selftest
