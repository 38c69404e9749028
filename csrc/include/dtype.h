// Storage types of 16-bit floats and their conversions, for host and device, without any framework header.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PYNN_HD __host__ __device__ __forceinline__
#else
#define PYNN_HD inline __attribute__((always_inline))
#endif

// The namespace of this library's launchers: csrc/include/<op>.h declares them there, csrc/ops/<op>.cpp calls launch::.
#if defined(PYNN_CUDA) || defined(PYNN_SIM)
#define PYNN_LAUNCH_NAMESPACE cuda
#else
#define PYNN_LAUNCH_NAMESPACE cpu
#endif
namespace pynn::PYNN_LAUNCH_NAMESPACE {}
namespace launch = pynn::PYNN_LAUNCH_NAMESPACE;

namespace pynn {

template <class To, class From>
PYNN_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type a kernel computes in: fp32 for everything but fp64.
template <class T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename accumulate<T>::type;

PYNN_HD float to_float(float v) { return v; }
PYNN_HD double to_float(double v) { return v; }
PYNN_HD float to_float(BFloat16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }
PYNN_HD float to_float(Half v) {
#ifdef __CUDACC__
  return __half2float(bit_cast<__half>(v.bits));
#else
  return float(bit_cast<_Float16>(v.bits));
#endif
}

// Round to nearest even; NaN stays NaN.
template <class T>
PYNN_HD T from_float(accumulate_t<T> v);
template <>
PYNN_HD float from_float<float>(float v) {
  return v;
}
template <>
PYNN_HD double from_float<double>(double v) {
  return v;
}
template <>
PYNN_HD BFloat16 from_float<BFloat16>(float v) {
#ifdef __CUDA_ARCH__
  return BFloat16{bit_cast<uint16_t>(__float2bfloat16_rn(v))};
#else
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16{uint16_t(v != v ? 0x7fc0u : rounded)};
#endif
}
template <>
PYNN_HD Half from_float<Half>(float v) {
#ifdef __CUDACC__
  return Half{bit_cast<uint16_t>(__float2half_rn(v))};
#else
  return Half{bit_cast<uint16_t>(_Float16(v))};
#endif
}

}  // namespace pynn
