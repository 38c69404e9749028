// The scalar arithmetic of group_norm, the same on every device: from sums to statistics, from statistics to what an
// element is multiplied by. In double; kernels round the coefficients once.
//
// The normalised value is (x - center) * scale + shift. center is the rounded mean when the mean is large (then the
// difference is exact) and 0 otherwise; shift carries what center leaves of the mean.
#pragma once
#include <cmath>

#include "dtype.h"

namespace pynn::group_norm {

struct Sums {
  double first = 0, second = 0;
};

struct GroupStats {
  double delta;  // mean - center
  double rstd;
  double center;  // exact in the compute type
};

// Whether a mean is so large that the rounding of x * scale and of mean * scale would show in their difference.
PYNN_HD bool is_far(double mean, double rstd) { return fabs(mean) * rstd > 0.5; }

template <class A>
PYNN_HD double center_of(double mean, double rstd) {
  return is_far(mean, rstd) ? double(A(mean)) : 0.0;
}
// moments: the sums of x - center and of its square.
PYNN_HD GroupStats finish(double center, const Sums& moments, double count, double eps) {
  const double delta = moments.first / count;
  const double variance = (moments.second - moments.first * delta) / count;
  return {delta, 1 / sqrt((variance < 0 ? 0 : variance) + eps), center};
}
// The same statistics around the center that the apply pass uses.
template <class A>
PYNN_HD GroupStats recenter(const GroupStats& s) {
  const double mean = s.center + s.delta, center = center_of<A>(mean, s.rstd);
  return {mean - center, s.rstd, center};
}

// What a channel multiplies and adds: y = act((x - center) * scale + shift) forward, and backward
// dx = forward scale * dz + (x - center) * scale + shift.
struct Affine {
  double scale, shift;
};
template <class A>
PYNN_HD Affine affine(const GroupStats& s, const A* weight, const A* bias, int64_t c) {
  const double scale = s.rstd * (weight ? weight[c] : A(1));
  return {scale, (bias ? bias[c] : A(0)) - s.delta * scale};
}
// A group's dx coefficients from its sums of weight * dz (first) and weight * dz * (x - mean) * rstd (second).
PYNN_HD Affine backward_affine(const GroupStats& s, const Sums& weighted, double count) {
  const double slope = -s.rstd * s.rstd * weighted.second / count;
  return {slope, -s.rstd * weighted.first / count - slope * s.delta};
}

}  // namespace pynn::group_norm
