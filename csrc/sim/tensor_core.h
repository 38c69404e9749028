// ldmatrix and mma.sync as the wrappers in csrc/cuda/primitives.cuh call them: a warp meets, twins.h computes.
#pragma once
#include <cstdint>
#include <cstring>

#include "runtime.h"
#include "twins.h"

namespace pynn::sim {

// Rows are 16 bytes; lane 8 m + r brings the address of row r of matrix m, and lanes beyond the last matrix bring
// nothing. The rows are read by the lane that receives them, so that a sanitizer sees who needed them.
template <bool transposed, int matrices>
void ldmatrix(uint32_t (&fragment)[matrices], const void* row, Site site) {
  static_assert(matrices == 1 || matrices == 2 || matrices == 4);
  struct Rows {
    const void* mine;
    const char* all[8 * matrices];
  } rows{row, {}};
  if (current->lane < 8 * matrices) {
    check_alignment("ldmatrix", row, 16);
    check_shared("ldmatrix", row, 16);
  }
  meet_whole_warp({"ldmatrix", 0xffffffffu, site, &rows}, [](void* const* lanes, unsigned) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
      for (int i = 0; i < 8 * matrices; ++i)
        static_cast<Rows*>(lanes[lane])->all[i] = static_cast<const char*>(static_cast<Rows*>(lanes[i])->mine);
  });
  for (int m = 0; m < matrices; ++m) {
    uint16_t halves[2];
    for (int high = 0; high < 2; ++high) {
      const twins::Element from = twins::ldmatrix_element(int(current->lane), high, transposed);
      memcpy(&halves[high], rows.all[8 * m + from.row] + 2 * from.column, 2);
    }
    fragment[m] = halves[0] | uint32_t(halves[1]) << 16;
  }
}

using MmaTwin = void (*)(const uint32_t a[32][4], const uint32_t b[32][2], const float c[32][4], float d[32][4]);

// d += a b, all lanes at once.
template <MmaTwin twin>
void mma(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  struct Operands {
    float d[4];
    uint32_t a[4], b[2];
  } mine;
  memcpy(mine.d, d, sizeof d);
  memcpy(mine.a, a, sizeof a);
  memcpy(mine.b, b, sizeof b);
  meet_whole_warp({name, 0xffffffffu, site, &mine}, [](void* const* lanes, unsigned) {
    uint32_t a[32][4], b[32][2];
    float c[32][4], d[32][4];
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      const auto& from = *static_cast<const Operands*>(lanes[lane]);
      memcpy(a[lane], from.a, sizeof from.a);
      memcpy(b[lane], from.b, sizeof from.b);
      memcpy(c[lane], from.d, sizeof from.d);
    }
    twin(a, b, c, d);
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
      memcpy(static_cast<Operands*>(lanes[lane])->d, d[lane], sizeof d[lane]);
  });
  memcpy(d, mine.d, sizeof d);
}

}  // namespace pynn::sim
