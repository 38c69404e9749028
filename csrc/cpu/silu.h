// SiLU, z * sigmoid(z), and its gradient on short SIMD vectors.
#pragma once
#include <type_traits>

#include "vec.h"
#include "vec_math.h"

namespace pynn::cpu {

// Every step is on N vectors, in this order: those of one after the other would fill the queues of the machine with
// instructions that wait for each other.
template <class V, int N, class Step>
PYNN_HD void each_of(V (&values)[N], const Step& step) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) values[i] = in_register(V(step(i)));
}

// e^-z; with kSaturate infinite for z below -89.5, otherwise limited to the numbers whose inverse is normal.
template <bool kSaturate, class V, int N>
PYNN_HD void exp_negative(V (&z)[N]) {
  constexpr double kLimit = (sizeof(z[0][0]) == 8 ? 708.0 : 87.25) + (kSaturate ? 3.0 : 0.0);
  for (V& v : z) {
    v = v < -kLimit ? V{} - kLimit : v;
    v = exp(V(-v));
  }
}
#if defined(__AVX512F__)
// With e^-z = 2^(n / 16) 2^f from a table of 16 powers and a cubic in |f| <= 1 / 32: half the instructions of exp.
template <bool kSaturate, int N>
PYNN_HD void exp_negative(VecFloat (&z)[N]) {
  const VecFloat powers = {0x1p0f,        0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f, 0x1.306fep0f,  0x1.3dea64p0f,
                           0x1.4bfdaep0f, 0x1.5ab07ep0f, 0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f, 0x1.9c4918p0f,
                           0x1.ae89fap0f, 0x1.c199bep0f, 0x1.d5818ep0f, 0x1.ea4afap0f};
  const VecFloat magic = broadcast(0x1.8p19f);  // adding it leaves the nearest multiple of 1/16
  const VecFloat limit = broadcast(kSaturate ? 90.25f : 87.25f), log2e = broadcast(-0x1.715476p0f);
  VecFloat shifted[N], n[N], p[N];
  each_of(z, [&](int i) { return _mm512_range_ps(z[i], limit, 2); });  // the smaller, with z's sign
  each_of(shifted, [&](int i) { return fma(z[i], log2e, magic); });
  each_of(n, [&](int i) { return shifted[i] - magic; });
  each_of(z, [&](int i) { return fma(z[i], log2e, -n[i]); });
  each_of(p, [&](int i) { return fma(z[i], broadcast(0x1.c6b08ep-5f), broadcast(0x1.ebfbep-3f)); });
  each_of(p, [&](int i) { return fma(p[i], z[i], broadcast(0x1.62e43p-1f)); });
  each_of(p, [&](int i) { return p[i] * z[i]; });
  each_of(shifted, [&](int i) { return _mm512_permutexvar_ps(_mm512_castps_si512(shifted[i]), powers); });
  each_of(p, [&](int i) { return fma(shifted[i], p[i], shifted[i]); });
  each_of(z, [&](int i) { return _mm512_maskz_scalef_ps(__mmask16(-1), p[i], n[i]); });  // takes the floor of n
}
#endif

template <bool kSilu, class V, int N>
PYNN_HD void activate(V (&z)[N]) {
  if constexpr (!kSilu) return;
  V e[N];
  each_of(e, [&](int i) { return z[i]; });
  exp_negative<true>(e);
  each_of(e, [&](int i) { return e[i] + 1; });
  each_of(z, [&](int i) { return z[i] / e[i]; });
}

// grad * act'(z), with act'(z) = s (1 + z (1 - s)), s = sigmoid(z); 1 - s keeps its digits as e s. z is used up.
template <bool kSilu, class V, int N>
PYNN_HD void activate_grad(V (&grad)[N], V (&z)[N]) {
  if constexpr (!kSilu) return;
  V e[N], s[N];
  each_of(e, [&](int i) { return z[i]; });
  exp_negative<false>(e);
  each_of(s, [&](int i) { return (e[i] + 1) + (z[i] - z[i]); });  // z - z: infinite z gives NaN
  each_of(s, [&](int i) { return 1 / s[i]; });
  each_of(e, [&](int i) { return e[i] * s[i]; });
  each_of(grad, [&](int i) { return grad[i] * s[i]; });
  each_of(e, [&](int i) { return e[i] * z[i]; });
  each_of(grad, [&](int i) { return fma(grad[i], e[i], grad[i]); });
}

}  // namespace pynn::cpu
