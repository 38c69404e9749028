// Kernels with one bug each. tests/test_sim.py asserts that each bug is found, by the tool named in its comment.
#pragma once
#include "../../cuda/primitives.cuh"

namespace planted {

using namespace pynn::cuda;

// ASan: reads one element too many.
__global__ void out_of_bounds_global(const float* x, float* y, int count) {
  const int i = int(threadIdx.x);
  if (i <= count) y[i % count] = x[i];
}

// ASan: reads past the end of a shared array.
__global__ void out_of_bounds_shared(float* y) {
  SHARED_ARRAY(float, tile, 32);
  tile[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x + 1];
}

// ASan: the launch has shared memory for 31 floats only.
__global__ void out_of_bounds_dynamic(float* y) {
  DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = tile[31 - threadIdx.x];
}

// TSan, and a wrong result in some order: no barrier between writing and reading.
__global__ void missing_barrier(float* y) {
  SHARED_ARRAY(float, tile, 64);
  tile[threadIdx.x] = float(threadIdx.x);
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

// TSan, and a wrong result in some order: the next step overwrites what others still read.
__global__ void missing_second_barrier(float* y, int steps) {
  SHARED_ARRAY(float, tile, 64);
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    tile[threadIdx.x] = float(step);
    __syncthreads();
    sum += tile[63 - threadIdx.x];
  }
  y[threadIdx.x] = sum;
}

// TSan, and a wrong result in some order: shuffles do not order memory, __syncwarp does.
__global__ void missing_syncwarp(float* y) {
  SHARED_ARRAY(float, tile, 32);
  tile[threadIdx.x] = float(threadIdx.x);
  y[threadIdx.x] = tile[31 - threadIdx.x];
}

__global__ void missing_second_syncwarp(float* y, int steps) {
  SHARED_ARRAY(float, tile, 32);
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    tile[threadIdx.x] = float(step);
    __syncwarp();
    sum += tile[31 - threadIdx.x];
  }
  y[threadIdx.x] = sum;
}

// TSan, and a wrong result in some order: a barrier does not reach from one block to the next.
__global__ void barrier_between_blocks(float* y) {
  if (blockIdx.x == 0) y[threadIdx.x] = 1.0f;
  __syncthreads();
  if (blockIdx.x == 1) y[threadIdx.x] += 1.0f;
}

// TSan: two blocks add to the same element. Every schedule here gives the right sum.
__global__ void unordered_add(float* sum) {
  if (threadIdx.x == 0) *sum += 1.0f;
}

// TSan: the last block reads what others wrote without a fence.
__global__ void missing_fence(float* partial, unsigned* finished, float* sum) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = 1.0f;
  if (atomicAdd(finished, 1u) != gridDim.x - 1) return;
  float total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
  *sum = total;
}

// A NaN: waits for all groups but the latest two, and reads the latest but one.
__global__ void wrong_wait(const float* x, float* y) {
  SHARED_ARRAY(float, tile, 2 * 32);
  const int i = int(threadIdx.x);
  for (int group = 0; group < 2; ++group) {
    cp_async<4>(tile + 32 * group + i, x + 32 * group + i);
    cp_async_commit();
  }
  cp_async_wait<2>();
  y[i] = tile[i];
  cp_async_wait<0>();
}

// A NaN: reads shared memory that nobody wrote.
__global__ void uninitialised_shared(float* y) {
  SHARED_ARRAY(float, tile, 32);
  if (threadIdx.x != 5) tile[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

// A NaN: reads a lane outside of the mask.
__global__ void shuffle_outside_mask(float* y) {
  float value = 1.0f;
  if (threadIdx.x < 16) value = __shfl_sync(0x0000ffffu, value, int(threadIdx.x) + 1);
  y[threadIdx.x] = value;
}

// The runtime, with the place: one half of the block at one barrier, one at another.
__global__ void divergent_barrier(float* y) {
  if (threadIdx.x < 16) {
    __syncthreads();
    y[threadIdx.x] = 1.0f;
  } else {
    __syncthreads();
    y[threadIdx.x] = 1.0f;
  }
}

__global__ void barrier_after_exit(float* y) {
  if (threadIdx.x >= 16) return;
  __syncthreads();
  y[threadIdx.x] = 1.0f;
}

__global__ void exit_before_barrier(float* y) {
  if (threadIdx.x == 31) return;
  __syncthreads();
  y[threadIdx.x] = 1.0f;
}

__global__ void lane_not_in_mask(float* y) { y[threadIdx.x] = __shfl_sync(0x7fffffffu, 1.0f, 0); }

__global__ void divergent_warp(float* y) {
  if (threadIdx.x < 16)
    y[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
  else
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void lane_exited(float* y) {
  if (threadIdx.x == 3) return;
  y[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
}

// A barrier that half a warp reaches while the other half waits for it in a shuffle.
__global__ void deadlock(float* y) {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    y[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
}

// Waits for a flag that nobody sets.
__global__ void endless_poll(const unsigned* flag) {
  while (load_acquire(flag) == 0) continue;
}

__global__ void pending_copy(const float* x, float* y) {
  SHARED_ARRAY(float, tile, 32);
  cp_async<4>(tile + threadIdx.x, x + threadIdx.x);
  cp_async_commit();
  y[threadIdx.x] = 0.0f;
}

__global__ void misaligned_copy(const float* x, float* y) {
  SHARED_ARRAY(float, tile, 32);
  if (threadIdx.x == 0) cp_async<16>(tile, x + 1);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = 0.0f;
}

__global__ void copy_to_global(const float* x, float* y) {
  cp_async<4>(y + threadIdx.x, x + threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void misaligned_ldmatrix(float* y) {
  SHARED_ARRAY(uint16_t, rows, 8 * 8 + 8);
  for (int i = int(threadIdx.x); i < 72; i += 32) rows[i] = 0;
  __syncwarp();
  uint32_t fragment[1];
  ldmatrix(fragment, rows + threadIdx.x % 8 * 8 + 1);
  y[threadIdx.x] = float(fragment[0]);
}

__global__ void ldmatrix_outside(float* y) {
  SHARED_ARRAY(uint16_t, rows, 8 * 8);
  for (int i = int(threadIdx.x); i < 64; i += 32) rows[i] = 0;
  __syncwarp();
  uint32_t fragment[1];
  ldmatrix(fragment, rows + (threadIdx.x % 8 + 1) * 8);
  y[threadIdx.x] = float(fragment[0]);
}

__global__ void partial_warp_mma(float* y) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  mma_m16n8k8_tf32(d, a, b);
  y[threadIdx.x] = d[0];
}

__global__ void misaligned_vector(const float* x, float* y) {
  const float4 v = load_streaming(reinterpret_cast<const float4*>(x + 1));
  y[threadIdx.x] = v.x;
}

__global__ void too_much_static_shared(float* y) {
  SHARED_ARRAY(float, tile, 48 * 256 + 1);
  tile[threadIdx.x] = 1.0f;
  y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void nothing(float* y) { y[0] = 0.0f; }

// ---- Clusters of two blocks of a warp each ----

// What is needed to send words to the other block.
struct Exchange {
  float* words;  // (2, 32)
  uint64_t* arrived;
  unsigned other;
};
#define EXCHANGE(name)                                                   \
  SHARED_ARRAY(float, name##_words, 64);                                 \
  SHARED_ARRAY(uint64_t, name##_arrived, 2);                             \
  const Exchange name{name##_words, name##_arrived, 1 - cluster_rank()}; \
  if (threadIdx.x == 0)                                                  \
    for (int i = 0; i < 2; ++i) mbarrier_init(name.arrived + i, 32);
#define CLUSTER_BARRIER() \
  do {                    \
    cluster_arrive();     \
    cluster_wait();       \
  } while (false)

// TSan, and a wrong result in some order: reads before the other block's words have come.
__global__ void missing_mbarrier_wait(float* y) {
  EXCHANGE(x);
  CLUSTER_BARRIER();
  store_async(x.words + threadIdx.x, x.other, float(cluster_rank()), x.arrived);
  mbarrier_arrive(x.arrived, 4);
  y[32 * cluster_rank() + threadIdx.x] = x.words[threadIdx.x];
  mbarrier_wait(x.arrived, 0);
}

// TSan, and a wrong result in some order: the other block may still read what this one replaces.
__global__ void store_before_all_have_read(float* y) {
  EXCHANGE(x);
  x.words[threadIdx.x] = float(cluster_rank());
  CLUSTER_BARRIER();
  y[32 * cluster_rank() + threadIdx.x] = x.words[31 - threadIdx.x];
  store_async(x.words + threadIdx.x, x.other, 7.0f, x.arrived);
  mbarrier_arrive(x.arrived, 4);
  mbarrier_wait(x.arrived, 0);
}

// The runtime, all of the following.
__global__ void missing_cluster_barrier(float* y) {
  EXCHANGE(x);
  __syncthreads();
  store_async(x.words + threadIdx.x, x.other, 1.0f, x.arrived);
  mbarrier_arrive(x.arrived, 4);
  mbarrier_wait(x.arrived, 0);
  y[threadIdx.x] = x.words[threadIdx.x];
}

__global__ void store_to_exited_block(float*) {
  EXCHANGE(x);
  CLUSTER_BARRIER();
  if (cluster_rank() == 1) store_async(x.words + threadIdx.x, x.other, 1.0f, x.arrived);
}

__global__ void exit_before_waiting(float*) {
  EXCHANGE(x);
  CLUSTER_BARRIER();
  store_async(x.words + threadIdx.x, x.other, 1.0f, x.arrived);
  CLUSTER_BARRIER();
}

__global__ void rank_out_of_range(float*) {
  EXCHANGE(x);
  CLUSTER_BARRIER();
  store_async(x.words + threadIdx.x, x.other + 2, 1.0f, x.arrived);
}

__global__ void store_outside_shared(float* y) {
  EXCHANGE(x);
  CLUSTER_BARRIER();
  store_async(y, x.other, 1.0f, x.arrived);
}

__global__ void misaligned_store(float*) {
  EXCHANGE(x);
  CLUSTER_BARRIER();
  store_async(reinterpret_cast<float4*>(x.words + 1), x.other, make_float4(1, 2, 3, 4), x.arrived);
}

__global__ void no_mbarrier(float*) {
  SHARED_ARRAY(float, words, 32);
  SHARED_ARRAY(uint64_t, arrived, 1);
  CLUSTER_BARRIER();
  store_async(words + threadIdx.x, 1 - cluster_rank(), 1.0f, arrived);
}

__global__ void too_many_arrivals(float*) {
  EXCHANGE(x);
  CLUSTER_BARRIER();
  mbarrier_arrive(x.arrived, 4);
  mbarrier_arrive(x.arrived, 4);
}

__global__ void too_few_bytes(float*) {
  EXCHANGE(x);
  CLUSTER_BARRIER();
  mbarrier_arrive(x.arrived, 4);
  mbarrier_wait(x.arrived, 0);
}

__global__ void arrive_twice(float*) {
  cluster_arrive();
  cluster_arrive();
}

__global__ void wait_without_arrive(float*) { cluster_wait(); }

__global__ void exit_between_arrive_and_wait(float*) { cluster_arrive(); }

__global__ void exit_before_cluster_barrier(float*) {
  if (cluster_rank() == 1) return;
  CLUSTER_BARRIER();
}

__global__ void divergent_cluster_barrier(float*) {
  if (threadIdx.x < 16) {
    CLUSTER_BARRIER();
  } else {
    CLUSTER_BARRIER();
  }
}

__global__ void without_cluster(float* y) { y[0] = float(cluster_rank()); }

// UBSan.
__global__ void signed_overflow(float* y, int large) { y[threadIdx.x] = float(large + int(threadIdx.x)); }

__global__ void misaligned_access(const float* x, float* y) {
  y[threadIdx.x] = reinterpret_cast<const float4*>(x + 1)[0].x;
}

}  // namespace planted
