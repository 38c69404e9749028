// Every PTX instruction the kernels use by name, one wrapper each; no other file holds PTX. Under g++ (PYNN_SIM) the
// same wrapper is the instruction's twin from csrc/sim; `make primitives-check` compares the two on a GPU.
#pragma once
#include <cstdint>
#include <type_traits>

#include "dtype.h"
#include "launch.h"

#ifdef PYNN_SIM
#include "../sim/async_copy.h"
#include "../sim/memory.h"
#include "../sim/tensor_core.h"
// The last parameter of a wrapper for which the whole warp must meet: the place in the kernel that calls it.
#define CALL_SITE , CALL_SITE_ALONE
#define CALL_SITE_ALONE sim::Site site = sim::Site::current()
#else
#define CALL_SITE
#define CALL_SITE_ALONE
#endif

namespace pynn::cuda {

#ifndef PYNN_SIM
// The 32-bit address that PTX's .shared instructions take.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

// ---- Copies from global to shared memory that do not pass through registers (sm_80) ----

// Starts a copy of size (4, 8 or 16) bytes, both addresses aligned to size. Only the first `bytes` are read; the rest
// are zeros, so bytes = 0 fills without touching `global`. Done when a cp_async_wait says so, and visible to the other
// threads of the block after a barrier that follows it.
template <int size>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int bytes = size) {
  static_assert(size == 4 || size == 8 || size == 16);
#ifdef PYNN_SIM
  sim::cp_async(shared, global, bytes, size);
#else
  if constexpr (size == 16)  // .cg: past L1, whose lines a tile would only evict
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(size),
                 "r"(bytes)
                 : "memory");
#endif
}

// Closes the group of copies that this thread started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#ifdef PYNN_SIM
  sim::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `groups` of this thread's latest groups are still under way.
template <int groups>
__device__ __forceinline__ void cp_async_wait() {
#ifdef PYNN_SIM
  sim::cp_async_wait(groups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

// ---- Tensor cores (sm_80): fragments are laid out as csrc/sim/twins.h spells out ----

// Loads 1, 2 or 4 matrices of 8 x 8 16-bit elements from shared memory, one register each. Lane 8 m + r gives the
// address of row r of matrix m: 16 bytes, aligned to 16.
template <int matrices>
__device__ __forceinline__ void ldmatrix(uint32_t (&fragment)[matrices], const void* row CALL_SITE) {
  static_assert(matrices == 1 || matrices == 2 || matrices == 4);
#ifdef PYNN_SIM
  sim::ldmatrix<false>(fragment, row, site);
#else
  if constexpr (matrices == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(shared_address(row))
                 : "memory");
  else if constexpr (matrices == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// The same with each matrix transposed on the way.
template <int matrices>
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&fragment)[matrices], const void* row CALL_SITE) {
  static_assert(matrices == 1 || matrices == 2 || matrices == 4);
#ifdef PYNN_SIM
  sim::ldmatrix<true>(fragment, row, site);
#else
  if constexpr (matrices == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(shared_address(row))
                 : "memory");
  else if constexpr (matrices == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// d += a b: a 16 x 16 (row-major), b 16 x 8 (column-major), both of T = Half or BFloat16; d 16 x 8 in fp32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] CALL_SITE) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
#ifdef PYNN_SIM
  sim::mma<twins::mma_m16n8k16<T>>("mma_m16n8k16", d, a, b, site);
#else
  if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d += a b: a 16 x 8, b 8 x 8, both fp32 bits of which the low 13 are ignored: round with to_tf32 first.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2] CALL_SITE) {
#ifdef PYNN_SIM
  sim::mma<twins::mma_m16n8k8_tf32>("mma_m16n8k8_tf32", d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// fp32 to tf32, to nearest with ties away from zero; the bits of an operand of mma_m16n8k8_tf32.
__device__ __forceinline__ uint32_t to_tf32(float value) {
#ifdef PYNN_SIM
  return twins::to_tf32(value);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

// Two fp32 numbers as 16-bit ones in a register, `low` in its low half, to nearest; what is beyond the largest finite
// number, infinity too, becomes that. NaN stays NaN.
template <class T>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
#ifdef PYNN_SIM
  return twins::round_pair<T>(low, high);
#else
  uint32_t pair;
  if constexpr (std::is_same_v<T, Half>)
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

// ---- Arithmetic ----

// 2^value in one instruction, relative error 2^-22; subnormals count as zero.
__device__ __forceinline__ float ex2_approx(float value) {
#ifdef PYNN_SIM
  return twins::ex2_approx(value);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#endif
}

// ---- 16-byte accesses to data that a kernel touches once ----
//
// Neither takes a line of L1, which the data would only pass through. The load is not the read-only `.nc` one: a kernel
// may work in place. L2 keeps its normal policy, because the next kernel usually reads what this one wrote.

template <class Vector>
__device__ __forceinline__ Vector load_streaming(const Vector* address) {
  static_assert(sizeof(Vector) == 16 && std::is_trivially_copyable_v<Vector>);
#ifdef PYNN_SIM
  return sim::load_16_bytes(address);
#else
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return bit_cast<Vector>(v);
#endif
}

template <class Vector>
__device__ __forceinline__ void store_streaming(Vector* address, const Vector& value) {
  static_assert(sizeof(Vector) == 16 && std::is_trivially_copyable_v<Vector>);
#ifdef PYNN_SIM
  sim::store_16_bytes(address, value);
#else
  const uint4 v = bit_cast<uint4>(value);
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
#endif
}

// ---- Flags between blocks: what was written before a release is seen after an acquire that reads its value ----
//
// Waiting in a loop for another block is legal only in a cooperative launch (LAUNCH_COOPERATIVE), where all blocks run
// at the same time.

__device__ __forceinline__ unsigned load_acquire(const unsigned* flag) {
#ifdef PYNN_SIM
  return sim::load_acquire(flag);
#else
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
#endif
}

__device__ __forceinline__ void store_release(unsigned* flag, unsigned value) {
#ifdef PYNN_SIM
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
#endif
}

__device__ __forceinline__ void red_release_add(unsigned* flag, unsigned value) {
#ifdef PYNN_SIM
  __atomic_fetch_add(flag, value, __ATOMIC_RELEASE);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
#endif
}

// ---- Barriers in shared memory that count arrivals of threads and of bytes (sm_90) ----

// A barrier's phase is complete when so many arrivals and all bytes that were announced by them have come; the next
// phase then begins. To be called by one thread, before a barrier of the cluster.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
#ifdef PYNN_SIM
  sim::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// One arrival, which announces `bytes` of store_async: they may come before it.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier, unsigned bytes) {
#ifdef PYNN_SIM
  sim::mbarrier_arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}

// Waits for the end of the first, third, ... phase with parity 0, of the second, fourth, ... with parity 1. What the
// threads wrote before they arrived, and the bytes that came, are then seen.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity CALL_SITE) {
#ifdef PYNN_SIM
  sim::mbarrier_wait(barrier, parity, site);
#else
  uint32_t complete;
  do {
    asm volatile(
        "{\n"
        "  .reg .pred p;\n"
        "  mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "  selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!complete);
#endif
}

// ---- Clusters of blocks (sm_90), launched by LAUNCH_CLUSTERS: their barrier and each other's shared memory ----
//
// A block reaches another one's shared memory only after a first barrier of the cluster, when it has started for
// certain, and exits only when it has waited for all that others store to its own. Kernels for clusters are empty where
// kClusters is false, for ptxas knows none of this there; resident_clusters() keeps launchers from using them.

#if defined(PYNN_SIM) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
constexpr bool kClusters = true;
#else
constexpr bool kClusters = false;
#endif

// This block's place in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
#ifdef PYNN_SIM
  return sim::cluster_rank();
#else
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

__device__ __forceinline__ unsigned cluster_blocks() {
#ifdef PYNN_SIM
  return sim::cluster_blocks();
#else
  unsigned blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#endif
}

// The barrier in two halves, each called by every thread of the cluster and by whole warps: what a thread wrote before
// it arrives is seen by every thread that has waited. Arriving takes as long as the thread's writes to global memory.
__device__ __forceinline__ void cluster_arrive(CALL_SITE_ALONE) {
#ifdef PYNN_SIM
  sim::cluster_arrive(site);
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait(CALL_SITE_ALONE) {
#ifdef PYNN_SIM
  sim::cluster_wait(site);
#else
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

#ifndef PYNN_SIM
// The address in block `rank` of what lies at `shared` in this block.
__device__ __forceinline__ uint32_t cluster_address(const void* shared, unsigned rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  return address;
}
#endif

// Starts to write 4 or 16 bytes, aligned, to block `rank`, where `shared` lies in this block. They count as bytes of
// that block's barrier, where `barrier` lies in this block, and are seen by those who have waited for it.
template <class Vector>
__device__ __forceinline__ void store_async(Vector* shared, unsigned rank, const Vector& value, uint64_t* barrier) {
  static_assert((sizeof(Vector) == 4 || sizeof(Vector) == 16) && std::is_trivially_copyable_v<Vector>);
#ifdef PYNN_SIM
  sim::store_async(shared, rank, value, barrier);
#else
  const uint32_t to = cluster_address(shared, rank), counter = cluster_address(barrier, rank);
  if constexpr (sizeof(Vector) == 4) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                 "r"(bit_cast<uint32_t>(value)), "r"(counter)
                 : "memory");
  } else {
    const uint4 v = bit_cast<uint4>(value);
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
        "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(counter)
        : "memory");
  }
#endif
}

}  // namespace pynn::cuda

#undef CALL_SITE
#undef CALL_SITE_ALONE
