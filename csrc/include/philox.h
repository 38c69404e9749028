// One counter-based random generator for every device: Philox4x32-10 (Salmon et al., SC 2011) and normals from it.
//
// Element i of a draw with key (seed, offset) is word i % 4 of philox4x32(seed, offset + i / 4): the integer stream of
// torch.func._random. The normal transform uses IEEE + - * sqrt, explicit fused multiply-adds and integer steps only,
// so the bits are the same on every machine as long as the compiler fuses nothing else (-ffp-contract=off,
// --fmad=false).
//
// The transform is written once over F, float or a SIMD vector of floats; Lanes<F> names what differs between the two.
#pragma once
#include <cmath>
#include <cstdint>

#include "dtype.h"

namespace pynn {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Counter = (low, high, 0, 0) of the 64-bit counter, key = (low, high) of the seed.
PYNN_HD void philox4x32(uint64_t seed, uint64_t counter, uint32_t out[4]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * c0, p1 = uint64_t(kPhiloxM1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

template <class F>
struct Lanes;
template <>
struct Lanes<float> {
  using Int = int32_t;
  using Uint = uint32_t;
  static PYNN_HD float convert(int32_t v) { return float(v); }
  static PYNN_HD float convert_unsigned(uint32_t v) { return float(v); }
#ifdef __CUDA_ARCH__
  static PYNN_HD float square_root(float v) { return __fsqrt_rn(v); }
  static PYNN_HD float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#else
  static PYNN_HD float square_root(float v) { return std::sqrt(v); }
  static PYNN_HD float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
#endif
};
template <class F>
using Int = typename Lanes<F>::Int;
template <class F>
using Uint = typename Lanes<F>::Uint;

// One step of a polynomial: y * x + c, rounded once.
template <class F>
PYNN_HD F horner(F y, F x, float c) {
  return Lanes<F>::multiply_add(y, x, F{} + c);
}

// Uniform in (0, 1]: the word rounded to float, times 2^-32, plus 2^-33.
template <class F>
PYNN_HD F uniform(Uint<F> word) {
  return horner<F>(Lanes<F>::convert_unsigned(word), F{} + 2.3283064365386963e-10f, 1.1641532182693481e-10f);
}

// Natural logarithm of a positive normal float: minimax polynomial on [sqrt(1/2), sqrt(2)) (Cephes logf), about 1 ulp.
template <class F>
PYNN_HD F log_ieee(F x) {
  const Int<F> bits = bit_cast<Int<F>>(x);
  const Int<F> exponent = (bits - 0x3f3504f3) >> 23;
  const F f = bit_cast<F>(bits - (exponent << 23)) - 1.0f;
  F y = horner<F>(f, F{} + 7.0376836292e-2f, -1.1514610310e-1f);
  y = horner<F>(y, f, 1.1676998740e-1f);
  y = horner<F>(y, f, -1.2420140846e-1f);
  y = horner<F>(y, f, 1.4249322787e-1f);
  y = horner<F>(y, f, -1.6668057665e-1f);
  y = horner<F>(y, f, 2.0000714765e-1f);
  y = horner<F>(y, f, -2.4999993993e-1f);
  y = horner<F>(y, f, 3.3333331174e-1f);
  y = horner<F>(y, f, -0.5f);
  y = Lanes<F>::multiply_add(f * f, y, f);
  return Lanes<F>::multiply_add(Lanes<F>::convert(exponent), F{} + 0.693147180559945f, y);
}

// e^x for finite x, from the same kind of steps (Cephes expf), about 1 ulp; saturates outside [-87, 88].
PYNN_HD float exp_ieee(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // nearest integer
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  return y * bit_cast<float>((int32_t(n) + 127) << 23);
}

// Sine and cosine of 2 pi turn / 2^32: the quadrant is split off exactly in integers, then Cephes polynomials.
template <class F>
PYNN_HD void sincos_turn(Uint<F> turn, F& sine, F& cosine) {
  const Uint<F> quadrant = (turn + 0x20000000u) >> 30;
  const F t = Lanes<F>::convert(bit_cast<Int<F>>(turn - (quadrant << 30))) * 1.4629180792671596e-9f;
  const F z = t * t;
  F s = horner<F>(z, F{} + -1.9515295891e-4f, 8.3321608736e-3f);
  s = horner<F>(s, z, -1.6666654611e-1f);
  s = Lanes<F>::multiply_add(s * z, t, t);
  F c = horner<F>(z, F{} + 2.443315711809948e-5f, -1.388731625493765e-3f);
  c = horner<F>(c, z, 4.166664568298827e-2f);
  c = horner<F>(c, z, -0.5f);
  c = horner<F>(c, z, 1.0f);
  const auto swap = (quadrant & 1u) != 0u;
  const F a = swap ? c : s, b = swap ? s : c;
  sine = bit_cast<F>(bit_cast<Uint<F>>(a) ^ ((quadrant & 2u) << 30));
  cosine = bit_cast<F>(bit_cast<Uint<F>>(b) ^ (((quadrant + 1u) & 2u) << 30));
}

// Two words -> two standard normals (Box and Muller 1958).  |z| <= 6.77.
template <class F>
PYNN_HD void box_muller(Uint<F> word0, Uint<F> word1, F& z0, F& z1) {
  const F radius = Lanes<F>::square_root(log_ieee<F>(uniform<F>(word0)) * -2.0f);
  F sine, cosine;
  sincos_turn<F>(word1, sine, cosine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

// Normals 4 * k .. 4 * k + 3 of a draw, k = counter - offset.
PYNN_HD void normal4(uint64_t seed, uint64_t counter, float z[4]) {
  uint32_t word[4];
  philox4x32(seed, counter, word);
  box_muller<float>(word[0], word[1], z[0], z[1]);
  box_muller<float>(word[2], word[3], z[2], z[3]);
}

}  // namespace pynn
