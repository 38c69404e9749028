// The arithmetic of the PTX instructions in csrc/cuda/primitives.cuh, as pure functions over the operands of a whole
// warp. The sim computes with them, and selftest/primitives_check.cu compares them with the hardware.
//
// Layouts are those of the PTX manual, "Matrix Fragments for mma.m16n8k16" and "...m16n8k8": lane = 4 * group + member.
// Names: d (16 x 8) = a (16 x k) * b (k x 8) + c (16 x 8).
#pragma once
#include <cmath>
#include <cstdint>

#include "dtype.h"

namespace pynn::twins {

constexpr int kLanes = 32;

// Row and column of the accumulator element that a lane keeps in its register i, 0 <= i < 4.
constexpr int accumulator_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
constexpr int accumulator_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// d = a b + c for k columns of a. Products of 16-bit floats and of tf32 are exact; the sum is taken in float64 and
// rounded once. The hardware adds in an order and with a rounding of its own: it agrees within the bound of an fp32
// sum.
template <int k>
void multiply(const float (&a)[16][k], const float (&b)[k][8], const float c[kLanes][4], float d[kLanes][4]) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = accumulator_row(lane, i), column = accumulator_column(lane, i);
      double sum = double(c[lane][i]);
      for (int j = 0; j < k; ++j) sum += double(a[row][j]) * double(b[j][column]);
      d[lane][i] = float(sum);
    }
}

template <class T>
float half_of(uint32_t pair, int high) {
  return to_float(T{uint16_t(high ? pair >> 16 : pair)});
}

// mma.sync.aligned.m16n8k16.row.col.f32.{f16,bf16}.{f16,bf16}.f32; T is Half or BFloat16, two to a register.
template <class T>
void mma_m16n8k16(const uint32_t a[kLanes][4], const uint32_t b[kLanes][2], const float c[kLanes][4],
                  float d[kLanes][4]) {
  float wide_a[16][16], wide_b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i)
      for (int high = 0; high < 2; ++high)
        wide_a[group + 8 * (i % 2)][2 * member + high + 8 * (i / 2)] = half_of<T>(a[lane][i], high);
    for (int i = 0; i < 2; ++i)
      for (int high = 0; high < 2; ++high) wide_b[2 * member + high + 8 * i][group] = half_of<T>(b[lane][i], high);
  }
  multiply<16>(wide_a, wide_b, c, d);
}

// What a tf32 tensor core reads of an fp32 register: the low 13 bits are ignored.
inline float read_tf32(uint32_t bits) { return bit_cast<float>(bits & 0xffffe000u); }

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
inline void mma_m16n8k8_tf32(const uint32_t a[kLanes][4], const uint32_t b[kLanes][2], const float c[kLanes][4],
                             float d[kLanes][4]) {
  float wide_a[16][8], wide_b[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) wide_a[group + 8 * (i % 2)][member + 4 * (i / 2)] = read_tf32(a[lane][i]);
    for (int i = 0; i < 2; ++i) wide_b[member + 4 * i][group] = read_tf32(b[lane][i]);
  }
  multiply<8>(wide_a, wide_b, c, d);
}

// cvt.rna.tf32.f32: to 10 bits of mantissa, nearest, ties away from zero.
inline uint32_t to_tf32(float value) {
  if (value != value) return 0x7fffffffu;
  return (bit_cast<uint32_t>(value) + 0x1000u) & 0xffffe000u;
}

// cvt.rn.satfinite.{f16x2,bf16x2}.f32
template <class T>
uint32_t round_pair(float low, float high) {
  const auto rounded = [](float value) -> uint32_t {
    constexpr uint16_t kLargest = std::is_same_v<T, Half> ? 0x7bff : 0x7f7f;
    if (value != value) return 0x7fff;
    const uint16_t bits = from_float<T>(value).bits;
    return (bits & 0x7fffu) > kLargest ? (bits & 0x8000u) | kLargest : bits;
  };
  return rounded(low) | rounded(high) << 16;
}

// ex2.approx.ftz.f32: 2^x with subnormal operands and results taken as zero. The hardware's error is 2^-22, relative.
inline float ex2_approx(float value) {
  if (std::fabs(value) < 1.17549435e-38f) return 1.0f;
  const float result = std::exp2(value);
  return result < 1.17549435e-38f ? 0.0f : result;
}

// ldmatrix: where in an 8 x 8 matrix of 16-bit elements the half `high` of a lane's register comes from.
struct Element {
  int row, column;
};
constexpr Element ldmatrix_element(int lane, int high, bool transposed) {
  const int outer = lane / 4, inner = lane % 4 * 2 + high;
  return transposed ? Element{inner, outer} : Element{outer, inner};
}

}  // namespace pynn::twins
