// CUDA's small vector types with their sizes and alignments, so that no CUDA toolkit is needed.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#define PYNN_SIM_VECTOR_TYPES(T, name)                                               \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }               \
  inline constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

PYNN_SIM_VECTOR_TYPES(signed char, char)
PYNN_SIM_VECTOR_TYPES(unsigned char, uchar)
PYNN_SIM_VECTOR_TYPES(short, short)
PYNN_SIM_VECTOR_TYPES(unsigned short, ushort)
PYNN_SIM_VECTOR_TYPES(int, int)
PYNN_SIM_VECTOR_TYPES(unsigned, uint)
PYNN_SIM_VECTOR_TYPES(float, float)
#undef PYNN_SIM_VECTOR_TYPES

struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline constexpr double2 make_double2(double x, double y) { return {x, y}; }
inline constexpr longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
inline constexpr ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }
