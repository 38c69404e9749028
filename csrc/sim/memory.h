// The memory accesses of csrc/cuda/primitives.cuh: 16-byte vectors with the hardware's alignment rule, flags that blocks
// wait for, and the shared memory of the other blocks of a cluster.
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

template <class Vector>
Vector load_cluster(const Vector* shared, unsigned rank) {
  return *static_cast<const Vector*>(in_cluster("load_cluster", shared, rank, sizeof(Vector)));
}

template <class Vector>
void store_cluster(Vector* shared, unsigned rank, const Vector& value) {
  *static_cast<Vector*>(in_cluster("store_cluster", shared, rank, sizeof(Vector))) = value;
}

}  // namespace pynn::sim
