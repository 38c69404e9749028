// The arithmetic of the diffusion ops, for host and device: coefficients of one row, and what one element does with
// them. Every step is a single IEEE operation in a fixed order, so CPU and GPU agree bit for bit.
#pragma once
#include "diffusion.h"
#include "philox.h"

namespace pynn {

PYNN_HD int64_t row_of(const int64_t* t, const DiffusionShape& shape, int64_t b) {
  return t[shape.t_count == 1 ? 0 : b];
}

// sqrt(signal_t / signal_s) and sqrt(1 - signal_t / signal_s): the jump from level s to level t in float64. The
// difference is taken where it cancels least.
struct JumpScale {
  double signal, noise;

  PYNN_HD JumpScale(const double* table, const int64_t* t, const int64_t* s, const DiffusionShape& shape, int64_t b) {
    const double* to = table + (row_of(t, shape, b) + 1) * kForwardColumns;
    const double* from = table + (s ? row_of(s, shape, b) + 1 : 0) * kForwardColumns;
    const double ratio = to[kSignalPower] / from[kSignalPower];
    const double added =
        to[kNoisePower] < from[kSignalPower] ? (to[kNoisePower] - from[kNoisePower]) / from[kSignalPower] : 1.0 - ratio;
    signal = sqrt(ratio);
    noise = sqrt(added);
  }
};

// The coefficients of one row of reverse_step, in the compute type.
template <class C>
struct ReverseRow {
  C x_to_x0, output_to_x0, x0_to_mean, x_to_mean, x_direct, output_direct, sigma, log_min, log_range, low, high;

  ReverseRow() = default;
  PYNN_HD ReverseRow(const double* table, int64_t row, const ReverseClip& clip) {
    const double* r = table + row * kReverseColumns;
    x_to_x0 = C(r[kXToX0]), output_to_x0 = C(r[kOutputToX0]);
    x0_to_mean = C(r[kX0ToMean]), x_to_mean = C(r[kXToMean]);
    // Where nothing is clipped, mean is linear in x and output: two rounded products instead of four.
    x_direct = C(r[kX0ToMean] * r[kXToX0] + r[kXToMean]), output_direct = C(r[kX0ToMean] * r[kOutputToX0]);
    sigma = C(r[kSigma]), log_min = C(r[kLogVarianceMin]), log_range = C(r[kLogVarianceMax] - r[kLogVarianceMin]);
    low = clip.enabled ? C(clip.low) : -C(INFINITY), high = clip.enabled ? C(clip.high) : C(INFINITY);
  }

  // Every result is NaN.
  PYNN_HD static ReverseRow invalid() {
    const C nan = C(NAN);
    ReverseRow row;
    row.x_to_x0 = row.output_to_x0 = row.x0_to_mean = row.x_to_mean = row.x_direct = row.output_direct = nan;
    row.sigma = row.log_min = row.log_range = row.low = row.high = nan;
    return row;
  }

  PYNN_HD C x0(C x, C output) const { return x_to_x0 * x + output_to_x0 * output; }
  PYNN_HD C clipped(C x0) const { return x0 < low ? low : (x0 > high ? high : x0); }
  PYNN_HD bool inside(C x0) const { return !(x0 < low || x0 > high); }
  PYNN_HD C mean(C x, C output, C x0, C clipped) const {
    const C direct = x_direct * x + output_direct * output, through_clip = x0_to_mean * clipped + x_to_mean * x;
    return clipped == x0 ? direct : through_clip;
  }
  // d mean / dx and d mean / d output.
  PYNN_HD C x_slope(C x0) const { return inside(x0) ? x_direct : x_to_mean; }
  PYNN_HD C output_slope(C x0) const { return inside(x0) ? output_direct : C(0); }

  PYNN_HD C learned_sigma(C v) const {
    const C half_log = C(0.5) * (log_min + (v + C(1)) * C(0.5) * log_range);
    if constexpr (sizeof(C) == sizeof(float))
      return sigma * exp_ieee(half_log);
    else
      return sigma * exp(half_log);
  }
  PYNN_HD C learned_sigma_slope(C v) const { return learned_sigma(v) * (C(0.25) * log_range); }
};

// The regression target of one row and the weight of its squared error.
template <class C>
struct LossRow {
  C from_x0, from_noise;
  double weight;

  LossRow() = default;
  PYNN_HD LossRow(const double* table, int64_t row) {
    const double* r = table + row * kLossColumns;
    from_x0 = C(r[kX0ToTarget]), from_noise = C(r[kNoiseToTarget]), weight = r[kWeight];
  }
  // Every result is NaN.
  PYNN_HD static LossRow invalid() {
    LossRow row;
    row.from_x0 = row.from_noise = C(NAN), row.weight = NAN;
    return row;
  }
  PYNN_HD C error(C output, C x0, C z) const { return output - (from_x0 * x0 + from_noise * z); }
};

}  // namespace pynn
