// Transposes of squares of vectors in registers.
#pragma once
#include <array>

#include "vec.h"

namespace pynn::cpu {

template <class A>
struct ShuffleIndex;
template <>
struct ShuffleIndex<float> {
  using type = VecInt;
};
template <>
struct ShuffleIndex<double> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};

// Transposes a square whose elements are runs of kRun lanes, swapping ever larger off-diagonal blocks.
template <class A, int kRun = 1>
PYNN_HD void transpose(Vec<A> (&rows)[kLanes<A> / kRun]) {
  constexpr int L = kLanes<A>, kSide = L / kRun;
  using Index = typename ShuffleIndex<A>::type;
#pragma GCC unroll 4
  for (int step = 1; step < kSide; step *= 2) {
    Index low, high;
    for (int p = 0; p < L; ++p) {
      const bool second = p / kRun & step;
      low[p] = second ? L + p - step * kRun : p;
      high[p] = second ? L + p : p + step * kRun;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) {
      if (i & step) continue;
      const Vec<A> a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + step] = __builtin_shuffle(a, b, high);
    }
  }
}

// The sums of the lanes of as many vectors as each has lanes, every one in the same order; the rows are used up.
template <int kStep = 1>
PYNN_HD VecDouble add_rows(VecDouble* rows) {
  constexpr int L = kLanes<double>;
  if constexpr (kStep == L) {
    return rows[0];
  } else {
    using Index = typename ShuffleIndex<double>::type;
    static constexpr auto kIndices = [] {
      std::array<std::array<int64_t, L>, 2> of{};
      for (int p = 0; p < L; ++p) of[0][p] = p & kStep ? L + p - kStep : p, of[1][p] = of[0][p] + kStep;
      return of;
    }();
    const Index low = load_lanes<Index>(kIndices[0].data()), high = load_lanes<Index>(kIndices[1].data());
#pragma GCC unroll 4
    for (int i = 0; i < L / 2 / kStep; ++i) {
      const VecDouble a = rows[2 * i], b = rows[2 * i + 1];
      rows[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
    return add_rows<2 * kStep>(rows);
  }
}

// Every second lane of a and then of b, from the lane `first`, 0 or 1.
template <int first, class A>
PYNN_HD Vec<A> every_second(Vec<A> a, Vec<A> b) {
  typename ShuffleIndex<A>::type index;
  for (int p = 0; p < kLanes<A>; ++p) index[p] = 2 * p + first;
  return __builtin_shuffle(a, b, index);
}

}  // namespace pynn::cpu
