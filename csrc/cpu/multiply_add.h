// What a register tile of a matrix product does with an element of its left operand and a vector of its right one.
//
// CPUs with AVX512-BF16 multiply pairs of bfloat16 and add both products to a float in one instruction, twice as many
// as with float. Rows of bfloat16 along the sum are then taken as they are, two elements in the place of one float.
#pragma once
#include "vec_load.h"

namespace pynn::cpu {

struct MultiplyAdd {
  template <class F>
  static PYNN_HD Vec<F> element(const F* from) {
    return broadcast(*from);
  }
  template <class V>
  static PYNN_HD V add(V element, V row, V sum) {
    return fma(element, row, sum);
  }
};

#if defined(__AVX512F__)
inline bool has_pair_products() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}
// In assembly, since the files of an instruction set are not compiled for this extension of it.
struct MultiplyAddPairs {
  static PYNN_HD VecFloat element(const float* from) {
    int32_t bits;
    memcpy(&bits, from, sizeof(bits));
    return (VecFloat)(bits - VecInt{});
  }
  static PYNN_HD VecFloat add(VecFloat element, VecFloat row, VecFloat sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(element), "v"(row));
    return sum;
  }
};
// The same extension rounds two vectors to bfloat16, but takes denormal numbers for 0.
PYNN_HD void store_pairs(BFloat16* to, VecFloat low, VecFloat high) {
  constexpr int kDenormal = 0x20;
  const __mmask16 left = _mm512_fpclass_ps_mask(low, kDenormal) | _mm512_fpclass_ps_mask(high, kDenormal);
  if (__builtin_expect(left == 0, 1)) {
    VecFloat rounded;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(rounded) : "v"(low), "v"(high));
    memcpy(to, &rounded, sizeof(rounded));
  } else {
    store_compute(to, low);
    store_compute(to + kLanes<float>, high);
  }
}
#else
constexpr bool has_pair_products() { return false; }
using MultiplyAddPairs = MultiplyAdd;
PYNN_HD void store_pairs(BFloat16* to, VecFloat low, VecFloat high) {
  store_compute(to, low);
  store_compute(to + kLanes<float>, high);
}
#endif

}  // namespace pynn::cpu
