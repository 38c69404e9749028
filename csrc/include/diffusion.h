// Launchers of the diffusion ops. Every tensor is contiguous and seen as (batch, inner): one row per sample.
//
// A row b uses the coefficients of its own timestep: table row t[b] (or t[0] when t_count is 1). Coefficients are kept
// in float64 and cast to the compute type once per row. Noise is either given or regenerated from a Philox key: element
// i of the draw of key (seed, offset), where i counts from the start of the batch (one key) or of the row (a key per
// row).
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pynn {

struct DiffusionShape {
  int64_t batch, inner;  // rows, elements per row
  int64_t t_count;       // 1 or batch
  int64_t key_count;     // 1 or batch; 0 when noise is given or not used
  int64_t timesteps;     // rows of the table that t indexes
};

// Columns of the forward table, one row per noise level: row 0 is clean data, row t + 1 is timestep t.
enum ForwardColumn { kSignalPower, kNoisePower, kForwardColumns };  // alphas_cumprod, 1 - alphas_cumprod

// Columns of the reverse table, one row per timestep.
//   x0   = x_to_x0 * x + output_to_x0 * output          (then clipped)
//   mean = x0_to_mean * x0 + x_to_mean * x
//   sigma: fixed, or exp(0.5 * (min + (v + 1) / 2 * (max - min))) from the log-variance bounds; 0 at timestep 0
enum ReverseColumn {
  kXToX0,
  kOutputToX0,
  kX0ToMean,
  kXToMean,
  kSigma,
  kLogVarianceMin,
  kLogVarianceMax,
  kReverseColumns
};

// Columns of the loss table: target = x0_to_target * x0 + noise_to_target * noise, weight of the squared error.
enum LossColumn { kX0ToTarget, kNoiseToTarget, kWeight, kLossColumns };

struct ReverseClip {
  bool enabled;
  double low, high;
};

// The noise of a draw: given, or regenerated from the key(s).
template <class T>
struct DiffusionNoise {
  const T* given;
  const int64_t* key;  // (key_count, 2): seed, offset
};

}  // namespace pynn

namespace pynn::PYNN_LAUNCH_NAMESPACE {

int64_t loss_partial_sums(const DiffusionShape& shape);

template <class T>
struct Diffusion {
  using Noise = DiffusionNoise<T>;

  static void normal(T* y, const int64_t* key, DiffusionShape shape, void* stream);

  // y = a x + b z with a, b of the jump from level s (nullptr: clean data) to level t; noise_out may be nullptr.
  static void forward_jump_fwd(T* y, T* noise_out, const T* x, const int64_t* t, const int64_t* s, const double* table,
                               Noise noise, DiffusionShape shape, void* stream);
  // a dy, the gradient of x, or b dy, the gradient of the noise.
  static void forward_jump_bwd(T* dx, const T* dy, const int64_t* t, const int64_t* s, const double* table,
                               bool of_noise, DiffusionShape shape, void* stream);

  // y = mean + sigma z; x0_out (the clipped prediction) and variance (learned range) may be nullptr.
  static void reverse_step_fwd(T* y, T* x0_out, const T* x, const T* output, const T* variance, const int64_t* t,
                               const double* table, ReverseClip clip, Noise noise, DiffusionShape shape, void* stream);
  static void reverse_step_bwd(T* dx, T* doutput, T* dvariance, const T* dy, const T* x, const T* output,
                               const T* variance, const int64_t* t, const double* table, ReverseClip clip, Noise noise,
                               DiffusionShape shape, void* stream);

  // loss[b] = weight * mean((output - target)^2) over the row. partial: scratch of loss_partial_sums(shape).
  static void loss_fwd(accumulate_t<T>* loss, double* partial, const T* output, const T* x0, const int64_t* t,
                       const double* table, Noise noise, DiffusionShape shape, void* stream);
  static void loss_bwd(T* doutput, T* dx0, const accumulate_t<T>* dloss, const T* output, const T* x0, const int64_t* t,
                       const double* table, Noise noise, DiffusionShape shape, void* stream);
};

}  // namespace pynn::PYNN_LAUNCH_NAMESPACE
