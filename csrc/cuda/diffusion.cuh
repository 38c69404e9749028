// Diffusion steps on a GPU: one pass over memory, noise made in registers.
//
// A thread owns the four elements of one Philox counter at a time (a quad) and strides over the grid; blockIdx.y
// strides over rows. With one key for the whole draw a row may start inside a quad: its first and last quads are
// partial. The loss gives each row to one block and sums in a fixed order, so results never depend on scheduling. A
// timestep outside the table writes NaN: its value is not known to the host.
#pragma once
#include "diffusion_math.h"
#include "launch.h"

namespace pynn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16, kMaxRows = 65535;

// The quads of one row: quad q covers elements 4 q - skip .. 4 q - skip + 3.
struct RowQuads {
  int64_t skip, count;
  uint64_t seed, counter;

  __device__ RowQuads(const int64_t* key, const DiffusionShape& shape, int64_t b) {
    const bool own_key = shape.key_count > 1;
    const int64_t start = own_key || !key ? 0 : b * shape.inner;
    skip = start & 3;
    count = (skip + shape.inner + 3) >> 2;
    seed = key ? uint64_t(key[own_key ? 2 * b : 0]) : 0;
    counter = key ? uint64_t(key[own_key ? 2 * b + 1 : 1]) + uint64_t(start >> 2) : 0;
  }
};

// Calls body(element, z) for every element of row b that this thread owns.
template <class T, class Body>
__device__ void for_each_element(const DiffusionNoise<T>& noise, const DiffusionShape& shape, int64_t b, int64_t first,
                                 int64_t stride, const Body& body) {
  using C = accumulate_t<T>;
  const RowQuads quads(noise.key, shape, b);
  for (int64_t q = first; q < quads.count; q += stride) {
    float z[4] = {0, 0, 0, 0};
    if (noise.key) normal4(quads.seed, quads.counter + uint64_t(q), z);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t j = 4 * q + k - quads.skip;
      if (j < 0 || j >= shape.inner) continue;
      body(j, noise.given ? C(to_float(noise.given[b * shape.inner + j])) : C(z[k]));
    }
  }
}

__device__ inline bool valid(int64_t t, int64_t low, const DiffusionShape& shape) {
  return t >= low && t < shape.timesteps;
}

#define FOR_EACH_ROW(b, shape) for (int64_t b = blockIdx.y; b < (shape).batch; b += gridDim.y)
__device__ inline int64_t first_quad() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
__device__ inline int64_t quad_stride() { return int64_t(gridDim.x) * kThreads; }

template <class T>
__global__ void normal_kernel(T* y, const int64_t* key, DiffusionShape shape) {
  FOR_EACH_ROW(b, shape) {
    for_each_element(DiffusionNoise<T>{nullptr, key}, shape, b, first_quad(), quad_stride(),
                     [&](int64_t j, accumulate_t<T> z) { y[b * shape.inner + j] = from_float<T>(z); });
  }
}

template <class T>
__global__ void forward_jump_kernel(T* y, T* noise_out, const T* x, const int64_t* t, const int64_t* s,
                                    const double* table, DiffusionNoise<T> noise, DiffusionShape shape) {
  using C = accumulate_t<T>;
  FOR_EACH_ROW(b, shape) {
    const bool ok = valid(row_of(t, shape, b), 0, shape) &&
                    (!s || (valid(row_of(s, shape, b), -1, shape) && row_of(s, shape, b) < row_of(t, shape, b)));
    C signal = C(NAN), sigma = C(NAN);
    if (ok) {
      const JumpScale scale(table, t, s, shape, b);
      signal = C(scale.signal), sigma = C(scale.noise);
    }
    for_each_element(noise, shape, b, first_quad(), quad_stride(), [&](int64_t j, C z) {
      const int64_t at = b * shape.inner + j;
      y[at] = from_float<T>(signal * to_float(x[at]) + sigma * z);
      if (noise_out) noise_out[at] = from_float<T>(z);
    });
  }
}

template <class T>
__global__ void forward_jump_bwd_kernel(T* dx, const T* dy, const int64_t* t, const int64_t* s, const double* table,
                                        bool of_noise, DiffusionShape shape) {
  using C = accumulate_t<T>;
  FOR_EACH_ROW(b, shape) {
    C factor = C(NAN);
    if (valid(row_of(t, shape, b), 0, shape) && (!s || valid(row_of(s, shape, b), -1, shape))) {
      const JumpScale scale(table, t, s, shape, b);
      factor = C(of_noise ? scale.noise : scale.signal);
    }
    for (int64_t j = first_quad(); j < shape.inner; j += quad_stride()) {
      const int64_t at = b * shape.inner + j;
      dx[at] = from_float<T>(factor * to_float(dy[at]));
    }
  }
}

template <class T>
__global__ void reverse_step_kernel(T* y, T* x0_out, const T* x, const T* output, const T* variance, const int64_t* t,
                                    const double* table, ReverseClip clip, DiffusionNoise<T> noise,
                                    DiffusionShape shape) {
  using C = accumulate_t<T>;
  FOR_EACH_ROW(b, shape) {
    const bool ok = valid(row_of(t, shape, b), 0, shape);
    const ReverseRow<C> row(table, ok ? row_of(t, shape, b) : 0, clip);
    for_each_element(noise, shape, b, first_quad(), quad_stride(), [&](int64_t j, C z) {
      const int64_t at = b * shape.inner + j;
      const C xj = to_float(x[at]), oj = to_float(output[at]), x0 = row.x0(xj, oj), clipped = row.clipped(x0);
      const C sigma = variance ? row.learned_sigma(to_float(variance[at])) : row.sigma;
      const C noise_term = sigma * (row.sigma == C(0) ? C(0) : z);
      y[at] = from_float<T>(ok ? row.mean(xj, oj, x0, clipped) + noise_term : C(NAN));
      if (x0_out) x0_out[at] = from_float<T>(ok ? clipped : C(NAN));
    });
  }
}

template <class T>
__global__ void reverse_step_bwd_kernel(T* dx, T* doutput, T* dvariance, const T* dy, const T* x, const T* output,
                                        const T* variance, const int64_t* t, const double* table, ReverseClip clip,
                                        DiffusionNoise<T> noise, DiffusionShape shape) {
  using C = accumulate_t<T>;
  FOR_EACH_ROW(b, shape) {
    const bool ok = valid(row_of(t, shape, b), 0, shape);
    const ReverseRow<C> row(table, ok ? row_of(t, shape, b) : 0, clip);
    for_each_element(noise, shape, b, first_quad(), quad_stride(), [&](int64_t j, C z) {
      const int64_t at = b * shape.inner + j;
      const C x0 = row.x0(to_float(x[at]), to_float(output[at])), g = ok ? C(to_float(dy[at])) : C(NAN);
      dx[at] = from_float<T>(row.x_slope(x0) * g);
      doutput[at] = from_float<T>(row.output_slope(x0) * g);
      if (!dvariance) return;
      const C zj = row.sigma == C(0) ? C(0) : z;
      dvariance[at] = from_float<T>(g * zj * row.learned_sigma_slope(to_float(variance[at])));
    });
  }
}

// One block per row: each thread sums its quads, then a tree over the block, in double.
template <class T>
__global__ void loss_kernel(accumulate_t<T>* loss, const T* output, const T* x0, const int64_t* t, const double* table,
                            DiffusionNoise<T> noise, DiffusionShape shape) {
  using C = accumulate_t<T>;
  SHARED_ARRAY(double, partial, kThreads);
  for (int64_t b = blockIdx.x; b < shape.batch; b += gridDim.x) {
    const bool ok = valid(row_of(t, shape, b), 0, shape);
    const LossRow<C> row(table, ok ? row_of(t, shape, b) : 0);
    double sum = 0;
    for_each_element(noise, shape, b, threadIdx.x, kThreads, [&](int64_t j, C z) {
      const int64_t at = b * shape.inner + j;
      const C d = row.error(to_float(output[at]), to_float(x0[at]), z);
      sum += double(d) * double(d);
    });
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (int width = kThreads / 2; width > 0; width /= 2) {
      if (int(threadIdx.x) < width) partial[threadIdx.x] += partial[threadIdx.x + width];
      __syncthreads();
    }
    if (threadIdx.x == 0) loss[b] = accumulate_t<T>(ok ? partial[0] * row.weight / double(shape.inner) : double(NAN));
    __syncthreads();
  }
}

template <class T>
__global__ void loss_bwd_kernel(T* doutput, T* dx0, const accumulate_t<T>* dloss, const T* output, const T* x0,
                                const int64_t* t, const double* table, DiffusionNoise<T> noise, DiffusionShape shape) {
  using C = accumulate_t<T>;
  FOR_EACH_ROW(b, shape) {
    const bool ok = valid(row_of(t, shape, b), 0, shape);
    const LossRow<C> row(table, ok ? row_of(t, shape, b) : 0);
    const C scale = ok ? C(2 * row.weight / double(shape.inner) * double(dloss[b])) : C(NAN);
    for_each_element(noise, shape, b, first_quad(), quad_stride(), [&](int64_t j, C z) {
      const int64_t at = b * shape.inner + j;
      const C d = scale * row.error(to_float(output[at]), to_float(x0[at]), z);
      doutput[at] = from_float<T>(d);
      if (dx0) dx0[at] = from_float<T>(-row.from_x0 * d);
    });
  }
}

// Enough blocks to fill the device: x over a row's quads, y over rows.
inline dim3 grid_for(const DiffusionShape& shape) {
  const int64_t rows = shape.batch < kMaxRows ? shape.batch : kMaxRows;
  const int64_t wanted = (shape.inner / 4 + kThreads) / kThreads;
  const int64_t allowed = kMaxBlocks / rows > 1 ? kMaxBlocks / rows : 1;
  return dim3(unsigned(wanted < allowed ? wanted : allowed), unsigned(rows));
}

}  // namespace

template <class T>
void Diffusion<T>::normal(T* y, const int64_t* key, DiffusionShape shape, void* stream) {
  LAUNCH(normal_kernel<T>, grid_for(shape), kThreads, 0, stream, y, key, shape);
}

template <class T>
void Diffusion<T>::forward_jump_fwd(T* y, T* noise_out, const T* x, const int64_t* t, const int64_t* s,
                                    const double* table, Noise noise, DiffusionShape shape, void* stream) {
  LAUNCH(forward_jump_kernel<T>, grid_for(shape), kThreads, 0, stream, y, noise_out, x, t, s, table, noise, shape);
}

template <class T>
void Diffusion<T>::forward_jump_bwd(T* dx, const T* dy, const int64_t* t, const int64_t* s, const double* table,
                                    bool of_noise, DiffusionShape shape, void* stream) {
  LAUNCH(forward_jump_bwd_kernel<T>, grid_for(shape), kThreads, 0, stream, dx, dy, t, s, table, of_noise, shape);
}

template <class T>
void Diffusion<T>::reverse_step_fwd(T* y, T* x0_out, const T* x, const T* output, const T* variance, const int64_t* t,
                                    const double* table, ReverseClip clip, Noise noise, DiffusionShape shape,
                                    void* stream) {
  LAUNCH(reverse_step_kernel<T>, grid_for(shape), kThreads, 0, stream, y, x0_out, x, output, variance, t, table, clip,
         noise, shape);
}

template <class T>
void Diffusion<T>::reverse_step_bwd(T* dx, T* doutput, T* dvariance, const T* dy, const T* x, const T* output,
                                    const T* variance, const int64_t* t, const double* table, ReverseClip clip,
                                    Noise noise, DiffusionShape shape, void* stream) {
  LAUNCH(reverse_step_bwd_kernel<T>, grid_for(shape), kThreads, 0, stream, dx, doutput, dvariance, dy, x, output,
         variance, t, table, clip, noise, shape);
}

template <class T>
void Diffusion<T>::loss_fwd(accumulate_t<T>* loss, const T* output, const T* x0, const int64_t* t, const double* table,
                            Noise noise, DiffusionShape shape, void* stream) {
  const unsigned blocks = unsigned(shape.batch < kMaxRows ? shape.batch : kMaxRows);
  LAUNCH(loss_kernel<T>, blocks, kThreads, 0, stream, loss, output, x0, t, table, noise, shape);
}

template <class T>
void Diffusion<T>::loss_bwd(T* doutput, T* dx0, const accumulate_t<T>* dloss, const T* output, const T* x0,
                            const int64_t* t, const double* table, Noise noise, DiffusionShape shape, void* stream) {
  LAUNCH(loss_bwd_kernel<T>, grid_for(shape), kThreads, 0, stream, doutput, dx0, dloss, output, x0, t, table, noise,
         shape);
}

template struct Diffusion<double>;
template struct Diffusion<float>;
template struct Diffusion<Half>;
template struct Diffusion<BFloat16>;

}  // namespace pynn::cuda
