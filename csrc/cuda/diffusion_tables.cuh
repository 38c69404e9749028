// The coefficients of a row of the batch: its timestep looked up in the table of the schedule. A timestep outside the
// table gives NaN.
#pragma once
#include "diffusion_math.h"

namespace pynn::cuda {
namespace {

__device__ inline bool valid(int64_t t, int64_t low, const DiffusionShape& shape) {
  return t >= low && t < shape.timesteps;
}

// The scales of the jump s -> t in the compute type.
template <class C>
struct JumpRow {
  C signal, noise;
};
struct JumpTables {
  const int64_t *t, *s;
  const double* table;
  DiffusionShape shape;

  template <class C>
  __device__ JumpRow<C> row(int64_t b) const {
    const int64_t to = row_of(t, shape, b), from = s ? row_of(s, shape, b) : -1;
    if (!valid(to, 0, shape) || !valid(from, -1, shape) || from >= to) return {C(NAN), C(NAN)};
    const JumpScale scale(table, t, s, shape, b);
    return {C(scale.signal), C(scale.noise)};
  }
};

struct ReverseTables {
  const int64_t* t;
  const double* table;
  ReverseClip clip;
  DiffusionShape shape;

  template <class C>
  __device__ ReverseRow<C> row(int64_t b) const {
    const int64_t step = row_of(t, shape, b);
    return valid(step, 0, shape) ? ReverseRow<C>(table, step, clip) : ReverseRow<C>::invalid();
  }
};

struct LossTables {
  const int64_t* t;
  const double* table;
  DiffusionShape shape;

  template <class C>
  __device__ LossRow<C> row(int64_t b) const {
    const int64_t step = row_of(t, shape, b);
    return valid(step, 0, shape) ? LossRow<C>(table, step) : LossRow<C>::invalid();
  }
};

}  // namespace
}  // namespace pynn::cuda
