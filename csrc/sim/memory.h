// The memory accesses of csrc/cuda/primitives.cuh: 16-byte vectors with the hardware's alignment rule, flags that
// blocks wait for, and stores to the shared memory of the other blocks of a cluster.
#pragma once
#include "runtime.h"

namespace pynn::sim {

template <class Vector>
Vector load_16_bytes(const Vector* address) {
  check_alignment("16-byte load", address, 16);
  return *address;
}

template <class Vector>
void store_16_bytes(Vector* address, const Vector& value) {
  check_alignment("16-byte store", address, 16);
  *address = value;
}

// Other threads run first: the flag may be the condition of a loop that waits for them.
inline unsigned load_acquire(const unsigned* flag) {
  wait_as(State::polling);
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}

// Written at once, so that whoever reads without waiting for the barrier, or still reads what was there, is in a race.
template <class Vector>
void store_async(Vector* shared, unsigned rank, const Vector& value, const void* barrier) {
  *static_cast<Vector*>(in_cluster("store_async", shared, rank, sizeof(Vector))) = value;
  count_bytes(rank, barrier, sizeof(Vector));
}

}  // namespace pynn::sim
