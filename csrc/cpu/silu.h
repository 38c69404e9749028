// SiLU, z * sigmoid(z), and its gradient on short SIMD vectors.
#pragma once
#include <type_traits>

#include "vec.h"
#include "vec_math.h"

namespace pynn::cpu {

// e^-z; with kSaturate infinite for z below -89.5, otherwise limited to the numbers whose inverse is normal.
template <bool kSaturate, class V>
PYNN_HD V exp_negative(V z) {
  constexpr double kLimit = (sizeof(z[0]) == 8 ? 708.0 : 87.25) + (kSaturate ? 3.0 : 0.0);
  z = z < -kLimit ? V{} - kLimit : z;
  return exp(V(-z));
}
#if defined(__AVX512F__)
// With e^-z = 2^(n / 16) 2^f from a table of 16 powers and a cubic in |f| <= 1 / 32: half the instructions of exp.
template <bool kSaturate>
PYNN_HD VecFloat exp_negative(VecFloat z) {
  const VecFloat powers = {0x1p0f,        0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f, 0x1.306fep0f,  0x1.3dea64p0f,
                           0x1.4bfdaep0f, 0x1.5ab07ep0f, 0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f, 0x1.9c4918p0f,
                           0x1.ae89fap0f, 0x1.c199bep0f, 0x1.d5818ep0f, 0x1.ea4afap0f};
  const float magic = 0x1.8p19f;  // adding it leaves the nearest multiple of 1/16
  const VecFloat x = _mm512_range_ps(z, broadcast(kSaturate ? 90.25f : 87.25f), 2);  // the smaller, with z's sign
  const VecFloat shifted = fma(x, broadcast(-0x1.715476p0f), broadcast(magic)), n = shifted - magic;
  const VecFloat f = fma(x, broadcast(-0x1.715476p0f), -n);
  const VecFloat p = fma(fma(f, broadcast(0x1.c6b08ep-5f), broadcast(0x1.ebfbep-3f)), f, broadcast(0x1.62e43p-1f)) * f;
  const VecFloat power = _mm512_permutexvar_ps(_mm512_castps_si512(shifted), powers);
  return _mm512_maskz_scalef_ps(__mmask16(-1), fma(power, p, power), n);  // takes the floor of n
}
#endif

template <bool kSilu, class V>
PYNN_HD V activate(V z) {
  if constexpr (!kSilu) return z;
  return z / (exp_negative<true>(z) + 1);
}

// grad * act'(z), with act'(z) = s (1 + z (1 - s)), s = sigmoid(z); 1 - s keeps its digits as e s.
template <bool kSilu, class V>
PYNN_HD V activate_grad(V grad, V z) {
  if constexpr (!kSilu) return grad;
  const V e = exp_negative<false>(z), s = 1 / ((e + 1) + (z - z)), t = grad * s;  // z - z: infinite z gives NaN
  return fma(t, z * (e * s), t);
}

}  // namespace pynn::cpu
