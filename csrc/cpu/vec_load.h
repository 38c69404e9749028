// Vectors of the compute type (fp32, or fp64) read from and written to any storage type, whole or in part.
#pragma once
#include "vec.h"

namespace pynn::cpu {

template <class T>
inline constexpr int kComputeLanes = kLanes<accumulate_t<T>>;
typedef uint32_t VecUint __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecShort __attribute__((vector_size(kVectorBytes / 2)));

template <class T>
PYNN_HD Vec<accumulate_t<T>> load_compute(const T* from) {
  return load(from);
}
template <>
PYNN_HD VecFloat load_compute(const BFloat16* from) {
  VecShort bits;
  memcpy(&bits, from, sizeof(bits));
  return VecFloat(__builtin_convertvector(bits, VecUint) << 16);
}
template <>
PYNN_HD VecFloat load_compute(const Half* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  VecFloat v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}

template <class T>
PYNN_HD void store_compute(T* to, Vec<accumulate_t<T>> v) {
  store(to, v);
}
template <>
PYNN_HD void store_compute(BFloat16* to, VecFloat v) {
#if defined(__AVX512F__)
  const __m512i bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
  const __m512i half_up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_mask_add_epi32(half_up, odd, half_up, one), nan = _mm512_set1_epi32(0x7fc0);
  const __m512i high = _mm512_mask_srli_epi32(nan, _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), rounded, 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
#else
  const VecUint bits = VecUint(v), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecShort result = __builtin_convertvector(v != v ? VecUint{} + 0x7fc0u : rounded, VecShort);
  memcpy(to, &result, sizeof(result));
#endif
}
template <>
PYNN_HD void store_compute(Half* to, VecFloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) to[i] = from_float<Half>(v[i]);
#endif
}

// Results from this size on would not stay in the caches.
inline constexpr int64_t kStreamBytes = 4 << 20;

// The same past the caches, where the machine has that for a vector of this size: for results of kStreamBytes and more,
// whose lines are then not read first. `to` is aligned to the vector; stream_end() makes the writes visible.
template <class T>
PYNN_HD void stream_compute(T* to, Vec<accumulate_t<T>> v) {
  T values[kComputeLanes<T>];
  store_compute(values, v);
  const auto write = [&](auto bits, auto stream) {
    memcpy(&bits, values, sizeof(bits));
    stream(reinterpret_cast<decltype(bits)*>(to), bits);
  };
#if defined(__AVX512F__)
  if constexpr (sizeof(values) == 64)
    return write(__m512i{}, [](__m512i* p, __m512i bits) { _mm512_stream_si512(p, bits); });
#endif
#if defined(__AVX__)
  if constexpr (sizeof(values) == 32)
    return write(__m256i{}, [](__m256i* p, __m256i bits) { _mm256_stream_si256(p, bits); });
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(values) == 16)
    return write(__m128i{}, [](__m128i* p, __m128i bits) { _mm_stream_si128(p, bits); });
#endif
  memcpy(to, values, sizeof(values));
}
PYNN_HD void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first `count` lanes come from memory, the others are `fill`; memory past `count` is not touched.
template <class T>
PYNN_HD Vec<accumulate_t<T>> load_part(const T* from, int64_t count, accumulate_t<T> fill) {
  accumulate_t<T> lanes[kComputeLanes<T>];
  for (int i = 0; i < kComputeLanes<T>; ++i) lanes[i] = i < count ? to_float(from[i]) : fill;
  return load(lanes);
}
template <class T>
PYNN_HD void store_part(T* to, int64_t count, Vec<accumulate_t<T>> v) {
  accumulate_t<T> lanes[kComputeLanes<T>];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) to[i] = from_float<T>(lanes[i]);
}
#if defined(__AVX512F__)
template <>
PYNN_HD VecFloat load_part(const float* from, int64_t count, float fill) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << count) - 1), from);
}
template <>
PYNN_HD void store_part(float* to, int64_t count, VecFloat v) {
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), v);
}
#endif
#if defined(__AVX512BW__) && defined(__AVX512VL__)
template <>
PYNN_HD VecFloat load_part(const BFloat16* from, int64_t count, float fill) {
  const __mmask16 mask = __mmask16((1u << count) - 1);
  const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16);
  return _mm512_mask_mov_ps(_mm512_set1_ps(fill), mask, _mm512_castsi512_ps(bits));
}
template <>
PYNN_HD VecFloat load_part(const Half* from, int64_t count, float fill) {
  const __mmask16 mask = __mmask16((1u << count) - 1);
  return _mm512_mask_cvtph_ps(_mm512_set1_ps(fill), mask, _mm256_maskz_loadu_epi16(mask, from));
}
template <class T>
PYNN_HD void store_part_of_16_bits(T* to, int64_t count, VecFloat v) {
  T values[16];
  store_compute(values, v);
  __m256i bits;
  memcpy(&bits, values, sizeof(bits));
  _mm256_mask_storeu_epi16(to, __mmask16((1u << count) - 1), bits);
}
template <>
PYNN_HD void store_part(BFloat16* to, int64_t count, VecFloat v) {
  store_part_of_16_bits(to, count, v);
}
template <>
PYNN_HD void store_part(Half* to, int64_t count, VecFloat v) {
  store_part_of_16_bits(to, count, v);
}
#endif

// The sum of the lanes, in double and in one fixed order.
PYNN_HD double add_lanes(VecDouble v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd(v);
#else
  for (int half = kLanes<double> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
#endif
}
// Lane i plus lane i + half, in double.
PYNN_HD VecDouble fold(VecFloat v) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm512_castps512_ps256(v)) + _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
#else
  typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2)));
  HalfVector halves[2];
  memcpy(halves, &v, sizeof(v));
  return __builtin_convertvector(halves[0], VecDouble) + __builtin_convertvector(halves[1], VecDouble);
#endif
}
PYNN_HD VecDouble fold(VecDouble v) { return v; }
PYNN_HD double add_lanes(VecFloat v) { return add_lanes(fold(v)); }

}  // namespace pynn::cpu
