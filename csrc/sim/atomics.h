// Atomic operations. Relaxed, as CUDA's are: they order nothing else, so TSan still sees data that needed a fence.
#pragma once
#include <cmath>
#include <concepts>
#include <type_traits>

#include "runtime.h"

namespace pynn::sim {

// *address = update(old) in one step; returns old.
template <class T, class Update>
T atomic_update(T* address, const Update& update) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T old, desired;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do desired = update(old);
  while (!__atomic_compare_exchange(address, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

template <class T, class... Allowed>
concept one_of = (std::same_as<T, Allowed> || ...);
template <class T>
concept AtomicInteger = one_of<T, int, unsigned, unsigned long long>;
template <class T>
concept AtomicNumber = AtomicInteger<T> || one_of<T, float, double>;

}  // namespace pynn::sim

template <pynn::sim::AtomicNumber T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return pynn::sim::atomic_update(address, [value](T old) {
    if constexpr (std::same_as<T, int>)
      return int(unsigned(old) + unsigned(value));  // wraps
    else
      return old + value;
  });
}
template <pynn::sim::AtomicInteger T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return atomicAdd(address, T(0ull - static_cast<unsigned long long>(value)));
}
template <pynn::sim::AtomicInteger T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return pynn::sim::atomic_update(address, [value](T old) { return old > value ? old : value; });
}
template <pynn::sim::AtomicInteger T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return pynn::sim::atomic_update(address, [value](T old) { return old < value ? old : value; });
}
template <pynn::sim::AtomicInteger T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return pynn::sim::atomic_update(address, [value](T old) { return old & value; });
}
template <pynn::sim::AtomicInteger T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return pynn::sim::atomic_update(address, [value](T old) { return old | value; });
}
template <pynn::sim::AtomicNumber T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return pynn::sim::atomic_update(address, [value](T) { return value; });
}
template <pynn::sim::AtomicInteger T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return pynn::sim::atomic_update(address, [=](T old) { return old == compare ? value : old; });
}
// 0, 1, ... limit, 0, 1, ...
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return pynn::sim::atomic_update(address, [limit](unsigned old) { return old >= limit ? 0 : old + 1; });
}

// A fence makes what was written before it visible to whoever sees a later write and fences in turn.
inline void __threadfence() { pynn::sim::fence(); }
inline void __threadfence_block() { pynn::sim::fence(); }
