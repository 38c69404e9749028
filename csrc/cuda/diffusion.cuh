// Diffusion steps on a GPU: one pass over memory, noise made in registers. diffusion_packs.cuh is the frame in which
// the elementwise ones run, with the same arithmetic as on the CPU (diffusion_math.h), so the bits are the CPU's.
//
// The loss: a warp sums a segment of one row in a fixed order, a second kernel adds the segments of a row; the result
// does not depend on scheduling or on the device.
//
// A timestep outside the table writes NaN: its value is not known to the host.
#pragma once
#include "diffusion_packs.cuh"
#include "diffusion_tables.cuh"
#include "warp_sum.cuh"

namespace pynn::cuda {
namespace {

template <class T>
struct NormalOp {
  using Element = T;
  static constexpr int kBlocks = kResidentBlocks<T>;
  using Values = typename NoiseSource<T>::Values;
  struct Inputs {};
  struct Row {};
  struct Outputs {
    Pack<T> y;
  };
  T* y;
  NoiseSource<T> noise;

  __device__ Inputs load(int64_t, const Flat&) const { return {}; }
  __device__ Values values(int64_t index, const Flat& flat, const Rows& rows) const {
    return noise.values(index, flat, rows);
  }
  __device__ Row row(int64_t) const { return {}; }
  __device__ void element(Outputs& out, const Inputs&, const Values& values, const Row&, int k) const {
    out.y.element[k] = from_float<T>(values.z[k]);
  }
  __device__ void store(const Outputs& out, int64_t index, const Flat& flat) const {
    store_pack(y, index, out.y, flat);
  }
};

template <class T>
struct ForwardJumpOp {
  using Element = T;
  static constexpr int kBlocks = kResidentBlocks<T>;
  using C = accumulate_t<T>;
  using Values = typename NoiseSource<T>::Values;
  using Row = JumpRow<C>;
  struct Inputs {
    Pack<T> x;
  };
  struct Outputs {
    Pack<T> y, noise;
  };
  T *y, *noise_out;
  const T* x;
  JumpTables tables;
  NoiseSource<T> noise;

  __device__ Inputs load(int64_t index, const Flat& flat) const { return {load_pack(x, index, flat)}; }
  __device__ Values values(int64_t index, const Flat& flat, const Rows& rows) const {
    return noise.values(index, flat, rows);
  }
  __device__ Row row(int64_t b) const { return tables.row<C>(b); }
  __device__ void element(Outputs& out, const Inputs& in, const Values& values, const Row& row, int k) const {
    out.y.element[k] = from_float<T>(row.signal * to_float(in.x.element[k]) + row.noise * values.z[k]);
    out.noise.element[k] = from_float<T>(values.z[k]);
  }
  __device__ void store(const Outputs& out, int64_t index, const Flat& flat) const {
    store_pack(y, index, out.y, flat);
    if (noise_out) store_pack(noise_out, index, out.noise, flat);
  }
};

template <class T>
struct ForwardJumpBackwardOp {
  using Element = T;
  static constexpr int kBlocks = kResidentBlocks<T>;
  using C = accumulate_t<T>;
  using Values = NoNoise;
  using Row = C;
  struct Inputs {
    Pack<T> dy;
  };
  struct Outputs {
    Pack<T> dx;
  };
  T* dx;
  const T* dy;
  JumpTables tables;
  bool of_noise;

  __device__ Inputs load(int64_t index, const Flat& flat) const { return {load_pack(dy, index, flat)}; }
  __device__ Values values(int64_t, const Flat&, const Rows&) const { return {}; }
  __device__ Row row(int64_t b) const {
    const JumpRow<C> both = tables.row<C>(b);
    return of_noise ? both.noise : both.signal;
  }
  __device__ void element(Outputs& out, const Inputs& in, const Values&, Row factor, int k) const {
    out.dx.element[k] = from_float<T>(factor * to_float(in.dy.element[k]));
  }
  __device__ void store(const Outputs& out, int64_t index, const Flat& flat) const {
    store_pack(dx, index, out.dx, flat);
  }
};

template <class T, bool kLearned>
struct ReverseStepOp {
  using Element = T;
  static constexpr int kBlocks = kResidentBlocks<T> - (kLearned && sizeof(T) < 8);
  using C = accumulate_t<T>;
  using Values = typename NoiseSource<T>::Values;
  using Row = ReverseRow<C>;
  struct Inputs {
    Pack<T> x, output, variance;
  };
  struct Outputs {
    Pack<T> y, x0;
  };
  T *y, *x0_out;
  const T *x, *output, *variance;
  ReverseTables tables;
  NoiseSource<T> noise;

  __device__ Inputs load(int64_t index, const Flat& flat) const {
    return {load_pack(x, index, flat), load_pack(output, index, flat),
            kLearned ? load_pack(variance, index, flat) : Pack<T>{}};
  }
  __device__ Values values(int64_t index, const Flat& flat, const Rows& rows) const {
    return noise.values(index, flat, rows);
  }
  __device__ Row row(int64_t b) const { return tables.row<C>(b); }
  __device__ void element(Outputs& out, const Inputs& in, const Values& values, const Row& row, int k) const {
    const C x = to_float(in.x.element[k]), o = to_float(in.output.element[k]);
    const C x0 = row.x0(x, o), clipped = row.clipped(x0);
    const C sigma = kLearned ? row.learned_sigma(to_float(in.variance.element[k])) : row.sigma;
    const C z = row.sigma == C(0) ? C(0) : values.z[k];
    out.y.element[k] = from_float<T>(row.mean(x, o, x0, clipped) + sigma * z);
    out.x0.element[k] = from_float<T>(clipped);
  }
  __device__ void store(const Outputs& out, int64_t index, const Flat& flat) const {
    store_pack(y, index, out.y, flat);
    if (x0_out) store_pack(x0_out, index, out.x0, flat);
  }
};

template <class T, bool kLearned>
struct ReverseStepBackwardOp {
  using Element = T;
  // float32 spills on sm_120 with one block more.
  static constexpr int kBlocks = kResidentBlocks<T> - (sizeof(T) == 4 || (kLearned && sizeof(T) < 8));
  using C = accumulate_t<T>;
  using Values = typename NoiseSource<T>::Values;
  using Row = ReverseRow<C>;
  struct Inputs {
    Pack<T> dy, x, output, variance;
  };
  struct Outputs {
    Pack<T> dx, doutput, dvariance;
  };
  T *dx, *doutput, *dvariance;
  const T *dy, *x, *output, *variance;
  ReverseTables tables;
  NoiseSource<T> noise;

  __device__ Inputs load(int64_t index, const Flat& flat) const {
    return {load_pack(dy, index, flat), load_pack(x, index, flat), load_pack(output, index, flat),
            kLearned ? load_pack(variance, index, flat) : Pack<T>{}};
  }
  __device__ Values values(int64_t index, const Flat& flat, const Rows& rows) const {
    return kLearned ? noise.values(index, flat, rows) : Values{};
  }
  __device__ Row row(int64_t b) const { return tables.row<C>(b); }
  __device__ void element(Outputs& out, const Inputs& in, const Values& values, const Row& row, int k) const {
    const C x0 = row.x0(to_float(in.x.element[k]), to_float(in.output.element[k])), g = to_float(in.dy.element[k]);
    out.dx.element[k] = from_float<T>(row.x_slope(x0) * g);
    out.doutput.element[k] = from_float<T>(row.output_slope(x0) * g);
    if constexpr (kLearned) {
      const C z = row.sigma == C(0) ? C(0) : values.z[k];
      out.dvariance.element[k] = from_float<T>(g * z * row.learned_sigma_slope(to_float(in.variance.element[k])));
    }
  }
  __device__ void store(const Outputs& out, int64_t index, const Flat& flat) const {
    store_pack(dx, index, out.dx, flat);
    store_pack(doutput, index, out.doutput, flat);
    if (kLearned) store_pack(dvariance, index, out.dvariance, flat);
  }
};

template <class T>
struct LossBackwardOp {
  using Element = T;
  static constexpr int kBlocks = kResidentBlocks<T>;
  using C = accumulate_t<T>;
  using Values = typename NoiseSource<T>::Values;
  struct Row {
    LossRow<C> target;
    C scale;
  };
  struct Inputs {
    Pack<T> output, x0;
  };
  struct Outputs {
    Pack<T> doutput, dx0;
  };
  T *doutput, *dx0;
  const C* dloss;
  const T *output, *x0;
  LossTables tables;
  NoiseSource<T> noise;

  __device__ Inputs load(int64_t index, const Flat& flat) const {
    return {load_pack(output, index, flat), load_pack(x0, index, flat)};
  }
  __device__ Values values(int64_t index, const Flat& flat, const Rows& rows) const {
    return noise.values(index, flat, rows);
  }
  __device__ Row row(int64_t b) const {
    const LossRow<C> target = tables.row<C>(b);
    return {target, C(2 * target.weight / double(tables.shape.inner) * double(dloss[b]))};
  }
  __device__ void element(Outputs& out, const Inputs& in, const Values& values, const Row& row, int k) const {
    const C d = row.scale * row.target.error(to_float(in.output.element[k]), to_float(in.x0.element[k]), values.z[k]);
    out.doutput.element[k] = from_float<T>(d);
    out.dx0.element[k] = from_float<T>(-row.target.from_x0 * d);
  }
  __device__ void store(const Outputs& out, int64_t index, const Flat& flat) const {
    store_pack(doutput, index, out.doutput, flat);
    if (dx0) store_pack(dx0, index, out.dx0, flat);
  }
};

constexpr int kWarps = kThreads / 32;
constexpr int64_t kSegment = 2048;  // elements of a row that one warp sums

inline __host__ __device__ int64_t segments_of(int64_t inner) { return (inner + kSegment - 1) / kSegment; }

// Squared errors of one segment per warp: into partial, or as the loss itself where a row is one segment.
template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>)
    loss_segments_kernel(accumulate_t<T>* loss, double* partial, const T* output, const T* x0, LossTables tables,
                         NoiseSource<T> noise, Flat flat) {
  using C = accumulate_t<T>;
  const DiffusionShape& shape = tables.shape;
  const int64_t segments = segments_of(shape.inner);
  const int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (item >= shape.batch * segments) return;  // the whole warp
  const int64_t b = item / segments, offset = item % segments * kSegment;
  const int64_t begin = b * shape.inner + offset;
  const int64_t end = begin + (shape.inner - offset < kSegment ? shape.inner - offset : kSegment);
  const int64_t aligned_begin = begin / kPack<T> * kPack<T>;
  const Rows rows(aligned_begin, shape.inner);
  const LossRow<C> row = tables.row<C>(b);

  double sum = 0;
  for (int64_t index = aligned_begin + lane * kPack<T>; index < end; index += 32 * kPack<T>) {
    const Pack<T> o = load_pack(output, index, flat), x = load_pack(x0, index, flat);
    const typename NoiseSource<T>::Values values = noise.values(index, flat, rows);
    C squares = 0;
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      const C d = row.error(to_float(o.element[k]), to_float(x.element[k]), values.z[k]);
      if (index + k >= begin && index + k < end) squares += d * d;
    }
    sum += double(squares);
  }
  sum = sum_lanes(sum);
  if (lane == 0) {
    if (segments > 1)
      partial[item] = sum;
    else
      loss[b] = C(sum * row.weight / double(shape.inner));
  }
}

// Adds the segments of a row, a warp per row.
template <class C>
__global__ void __launch_bounds__(kThreads) loss_rows_kernel(C* loss, const double* partial, LossTables tables) {
  const DiffusionShape& shape = tables.shape;
  const int64_t segments = segments_of(shape.inner);
  const int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (b >= shape.batch) return;  // the whole warp
  double sum = 0;
  for (int64_t i = lane; i < segments; i += 32) sum += partial[b * segments + i];
  sum = sum_lanes(sum);
  if (lane == 0) loss[b] = C(sum * tables.row<C>(b).weight / double(shape.inner));
}

}  // namespace

template <class T>
void Diffusion<T>::normal(T* y, const int64_t* key, DiffusionShape shape, void* stream) {
  const NormalOp<T> op{y, {{nullptr, key}, shape}};
  launch_elementwise(op, shape, true, {y}, stream);
}

template <class T>
void Diffusion<T>::forward_jump_fwd(T* y, T* noise_out, const T* x, const int64_t* t, const int64_t* s,
                                    const double* table, Noise noise, DiffusionShape shape, void* stream) {
  const ForwardJumpOp<T> op{y, noise_out, x, {t, s, table, shape}, {noise, shape}};
  launch_elementwise(op, shape, shape.t_count == 1, {y, noise_out, x, noise.given}, stream);
}

template <class T>
void Diffusion<T>::forward_jump_bwd(T* dx, const T* dy, const int64_t* t, const int64_t* s, const double* table,
                                    bool of_noise, DiffusionShape shape, void* stream) {
  const ForwardJumpBackwardOp<T> op{dx, dy, {t, s, table, shape}, of_noise};
  launch_elementwise(op, shape, shape.t_count == 1, {dx, dy}, stream);
}

template <class T>
void Diffusion<T>::reverse_step_fwd(T* y, T* x0_out, const T* x, const T* output, const T* variance, const int64_t* t,
                                    const double* table, ReverseClip clip, Noise noise, DiffusionShape shape,
                                    void* stream) {
  const auto run = [&](auto op) {
    launch_elementwise(op, shape, shape.t_count == 1, {y, x0_out, x, output, variance, noise.given}, stream);
  };
  if (variance)
    run(ReverseStepOp<T, true>{y, x0_out, x, output, variance, {t, table, clip, shape}, {noise, shape}});
  else
    run(ReverseStepOp<T, false>{y, x0_out, x, output, variance, {t, table, clip, shape}, {noise, shape}});
}

template <class T>
void Diffusion<T>::reverse_step_bwd(T* dx, T* doutput, T* dvariance, const T* dy, const T* x, const T* output,
                                    const T* variance, const int64_t* t, const double* table, ReverseClip clip,
                                    Noise noise, DiffusionShape shape, void* stream) {
  const auto run = [&](auto op) {
    launch_elementwise(op, shape, shape.t_count == 1, {dx, doutput, dvariance, dy, x, output, variance, noise.given},
                       stream);
  };
  if (variance)
    run(ReverseStepBackwardOp<T, true>{
        dx, doutput, dvariance, dy, x, output, variance, {t, table, clip, shape}, {noise, shape}});
  else
    run(ReverseStepBackwardOp<T, false>{
        dx, doutput, dvariance, dy, x, output, variance, {t, table, clip, shape}, {noise, shape}});
}

int64_t loss_partial_sums(const DiffusionShape& shape) { return shape.batch * segments_of(shape.inner); }

template <class T>
void Diffusion<T>::loss_fwd(accumulate_t<T>* loss, double* partial, const T* output, const T* x0, const int64_t* t,
                            const double* table, Noise noise, DiffusionShape shape, void* stream) {
  const Flat flat{shape.batch * shape.inner, shape.inner, is_aligned({output, x0, noise.given})};
  const int64_t segments = loss_partial_sums(shape);
  const LossTables tables{t, table, shape};
  LAUNCH(loss_segments_kernel<T>, unsigned((segments + kWarps - 1) / kWarps), kThreads, 0, stream, loss, partial,
         output, x0, tables, {noise, shape}, flat);
  if (segments > shape.batch)
    LAUNCH(loss_rows_kernel<accumulate_t<T>>, unsigned((shape.batch + kWarps - 1) / kWarps), kThreads, 0, stream, loss,
           partial, tables);
}

template <class T>
void Diffusion<T>::loss_bwd(T* doutput, T* dx0, const accumulate_t<T>* dloss, const T* output, const T* x0,
                            const int64_t* t, const double* table, Noise noise, DiffusionShape shape, void* stream) {
  const LossBackwardOp<T> op{doutput, dx0, dloss, output, x0, {t, table, shape}, {noise, shape}};
  launch_elementwise(op, shape, false, {doutput, dx0, output, x0, noise.given}, stream);
}

template struct Diffusion<double>;
template struct Diffusion<float>;
template struct Diffusion<Half>;
template struct Diffusion<BFloat16>;

}  // namespace pynn::cuda
