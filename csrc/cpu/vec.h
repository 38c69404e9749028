// Short SIMD vectors through the compiler's vector types: one source for SSE2, AVX2 and AVX-512.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "dtype.h"

namespace pynn::cpu {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__x86_64__)
inline constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#else
inline constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#endif

typedef float VecFloat __attribute__((vector_size(kVectorBytes)));
typedef double VecDouble __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecInt __attribute__((vector_size(kVectorBytes)));

template <class T>
struct vector_of;
template <>
struct vector_of<float> {
  using type = VecFloat;
};
template <>
struct vector_of<double> {
  using type = VecDouble;
};
template <class T>
using Vec = typename vector_of<T>::type;
template <class T>
inline constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
PYNN_HD Vec<T> load(const T* from) {
  Vec<T> v;
  memcpy(&v, from, sizeof(v));
  return v;
}
template <class T>
PYNN_HD void store(T* to, Vec<T> v) {
  memcpy(to, &v, sizeof(v));
}
// Makes the compiler load a value once where it would rather repeat the load in each instruction that uses it.
template <class V>
PYNN_HD V in_register(V v) {
#ifdef __x86_64__
  asm("" : "+v"(v));
#endif
  return v;
}
template <class T>
PYNN_HD Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

// a * b + c, rounded once where the machine has the instruction.
PYNN_HD VecFloat fma(VecFloat a, VecFloat b, VecFloat c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
PYNN_HD VecDouble fma(VecDouble a, VecDouble b, VecDouble c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// Shorter vectors, for few channels.
template <class T, int N>
struct lanes_of {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Lanes = typename lanes_of<T, N>::type;
template <class V, class T>
PYNN_HD V load_lanes(const T* from) {
  V v;
  memcpy(&v, from, sizeof(v));
  return v;
}
template <class V, class T>
PYNN_HD void store_lanes(T* to, V v) {
  memcpy(to, &v, sizeof(v));
}
#if defined(__AVX512F__)
PYNN_HD Lanes<float, 8> fma(Lanes<float, 8> a, Lanes<float, 8> b, Lanes<float, 8> c) {
  return _mm256_fmadd_ps(a, b, c);
}
PYNN_HD Lanes<double, 4> fma(Lanes<double, 4> a, Lanes<double, 4> b, Lanes<double, 4> c) {
  return _mm256_fmadd_pd(a, b, c);
}
#endif
#if defined(__FMA__)
PYNN_HD Lanes<float, 4> fma(Lanes<float, 4> a, Lanes<float, 4> b, Lanes<float, 4> c) { return _mm_fmadd_ps(a, b, c); }
#endif

}  // namespace pynn::cpu
