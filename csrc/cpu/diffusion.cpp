// Diffusion steps on the CPU: one pass over memory, noise regenerated in L1.
//
// A row (sample) is cut into blocks of kBlock elements; threads take runs of blocks. A block owns its slice of every
// tensor and a buffer with its noise. Sums use a fixed number of partial sums, so nothing depends on the thread count
// or on the instruction set.
#include "diffusion.h"

#include <algorithm>
#include <cmath>

#include "diffusion_math.h"
#include "normal.h"
#include "parallel.h"

namespace pynn::cpu {
namespace {

constexpr int64_t kBlock = 1024;     // elements
constexpr int64_t kGrain = 1 << 15;  // elements per thread at least
constexpr int kPartialSums = 16;

int64_t blocks_per_row(const DiffusionShape& shape) { return (shape.inner + kBlock - 1) / kBlock; }

// The noise of one block, in the compute type. A block is a slice of one row or, where rows are short, a few whole
// rows: with a single key their noise is consecutive and is generated in one go.
template <class C>
class NoiseBlock {
 public:
  NoiseBlock(const DiffusionShape& shape) : shape_(shape) {}

  void start(int64_t first_row, int64_t first, int64_t count) {
    first_row_ = first_row, first_ = first, count_ = count, ready_ = nullptr;
  }

  // Noise of elements [begin, begin + count) of row b, which lie in this block.
  template <class T>
  const C* fill(DiffusionNoise<T> noise, int64_t b, int64_t begin, int64_t count) {
    if (noise.given) {
      const T* from = noise.given + b * shape_.inner + begin;
      for (int64_t j = 0; j < count; ++j) value_[j] = to_float(from[j]);
      return value_;
    }
    if (shape_.key_count > 1) return generate(noise.key + 2 * b, begin, count);
    if (!ready_) ready_ = generate(noise.key, first_row_ * shape_.inner + first_, count_);
    return ready_ + (b - first_row_) * shape_.inner + begin - first_;
  }

 private:
  const C* generate(const int64_t* key, int64_t index, int64_t count) {
    const uint64_t seed = uint64_t(key[0]), counter = uint64_t(key[1]) + uint64_t(index >> 2);
    const int64_t skip = index & 3, needed = skip + count;
    int64_t j = 0;
    for (; j + kNormals / 2 < needed; j += kNormals) normals(seed, counter + uint64_t(j >> 2), raw_ + j);
    for (; j < needed; j += 4) normal4(seed, counter + uint64_t(j >> 2), raw_ + j);
    if constexpr (sizeof(C) == sizeof(float)) {
      return raw_ + skip;
    } else {
      for (j = 0; j < count; ++j) value_[j] = C(raw_[skip + j]);
      return value_;
    }
  }

  const DiffusionShape& shape_;
  int64_t first_row_ = 0, first_ = 0, count_ = 0;
  const C* ready_ = nullptr;
  alignas(64) float raw_[kBlock + 4 + kNormals];
  alignas(64) C value_[kBlock];
};

template <class C>
alignas(64) const C kZeros[kBlock] = {};

// Calls body(row, begin, count, noise_block) for every row slice, on all threads.
template <class C, class Body>
void for_each_block(const DiffusionShape& shape, const Body& body) {
  const int64_t per_row = blocks_per_row(shape);
  const int64_t rows = per_row > 1 ? 1 : kBlock / shape.inner;  // in one block
  const int64_t blocks = (shape.batch + rows - 1) / rows * per_row;
  parallel_for(blocks, kGrain / kBlock, [&](int64_t first, int64_t last) {
    NoiseBlock<C> noise(shape);
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / per_row * rows, row_end = std::min(shape.batch, row + rows);
      const int64_t begin = i % per_row * kBlock, count = std::min(kBlock, shape.inner - begin);
      noise.start(row, begin, (row_end - row) * count);
      for (int64_t b = row; b < row_end; ++b) body(b, begin, count, noise);
    }
  });
}

}  // namespace

template <class T>
void Diffusion<T>::normal(T* y, const int64_t* key, DiffusionShape shape, void*) {
  using C = accumulate_t<T>;
  for_each_block<C>(shape, [&](int64_t b, int64_t begin, int64_t count, NoiseBlock<C>& noise) {
    const C* z = noise.fill(DiffusionNoise<T>{nullptr, key}, b, begin, count);
    T* to = y + b * shape.inner + begin;
    for (int64_t j = 0; j < count; ++j) to[j] = from_float<T>(z[j]);
  });
}

template <class T>
void Diffusion<T>::forward_jump_fwd(T* y, T* noise_out, const T* x, const int64_t* t, const int64_t* s,
                                    const double* table, Noise noise, DiffusionShape shape, void*) {
  using C = accumulate_t<T>;
  for_each_block<C>(shape, [&](int64_t b, int64_t begin, int64_t count, NoiseBlock<C>& block) {
    const JumpScale scale(table, t, s, shape, b);
    const C signal = C(scale.signal), sigma = C(scale.noise);
    const C* __restrict z = block.fill(noise, b, begin, count);
    const int64_t at = b * shape.inner + begin;
    const T* __restrict from = x + at;
    T* __restrict to = y + at;
    for (int64_t j = 0; j < count; ++j) to[j] = from_float<T>(signal * to_float(from[j]) + sigma * z[j]);
    if (noise_out)
      for (int64_t j = 0; j < count; ++j) noise_out[at + j] = from_float<T>(z[j]);
  });
}

template <class T>
void Diffusion<T>::forward_jump_bwd(T* dx, const T* dy, const int64_t* t, const int64_t* s, const double* table,
                                    bool of_noise, DiffusionShape shape, void*) {
  using C = accumulate_t<T>;
  for_each_block<C>(shape, [&](int64_t b, int64_t begin, int64_t count, NoiseBlock<C>&) {
    const JumpScale scale(table, t, s, shape, b);
    const C factor = C(of_noise ? scale.noise : scale.signal);
    const T* __restrict from = dy + b * shape.inner + begin;
    T* __restrict to = dx + b * shape.inner + begin;
    for (int64_t j = 0; j < count; ++j) to[j] = from_float<T>(factor * to_float(from[j]));
  });
}

template <class T>
void Diffusion<T>::reverse_step_fwd(T* y, T* x0_out, const T* x, const T* output, const T* variance, const int64_t* t,
                                    const double* table, ReverseClip clip, Noise noise, DiffusionShape shape, void*) {
  using C = accumulate_t<T>;
  for_each_block<C>(shape, [&](int64_t b, int64_t begin, int64_t count, NoiseBlock<C>& block) {
    const ReverseRow<C> row(table, row_of(t, shape, b), clip);
    const C* __restrict z = row.sigma == C(0) ? kZeros<C> : block.fill(noise, b, begin, count);
    const int64_t at = b * shape.inner + begin;
    const T* __restrict px = x + at;
    const T* __restrict po = output + at;
    T* __restrict py = y + at;
    alignas(64) C sigma[kBlock];
    if (variance)
      for (int64_t j = 0; j < count; ++j) sigma[j] = row.learned_sigma(to_float(variance[at + j]));
    const auto step = [&](int64_t j, C sigma_j) {
      const C xj = to_float(px[j]), oj = to_float(po[j]);
      const C x0 = row.x0(xj, oj), clipped = row.clipped(x0);
      py[j] = from_float<T>(row.mean(xj, oj, x0, clipped) + sigma_j * z[j]);
      return clipped;
    };
    if (x0_out)
      for (int64_t j = 0; j < count; ++j) x0_out[at + j] = from_float<T>(step(j, variance ? sigma[j] : row.sigma));
    else if (variance)
      for (int64_t j = 0; j < count; ++j) step(j, sigma[j]);
    else
      for (int64_t j = 0; j < count; ++j) step(j, row.sigma);
  });
}

template <class T>
void Diffusion<T>::reverse_step_bwd(T* dx, T* doutput, T* dvariance, const T* dy, const T* x, const T* output,
                                    const T* variance, const int64_t* t, const double* table, ReverseClip clip,
                                    Noise noise, DiffusionShape shape, void*) {
  using C = accumulate_t<T>;
  for_each_block<C>(shape, [&](int64_t b, int64_t begin, int64_t count, NoiseBlock<C>& block) {
    const ReverseRow<C> row(table, row_of(t, shape, b), clip);
    const int64_t at = b * shape.inner + begin;
    const T* __restrict g = dy + at;
    const T* __restrict px = x + at;
    const T* __restrict po = output + at;
    for (int64_t j = 0; j < count; ++j) {
      const C x0 = row.x0(to_float(px[j]), to_float(po[j])), gj = to_float(g[j]);
      dx[at + j] = from_float<T>(row.x_slope(x0) * gj);
      doutput[at + j] = from_float<T>(row.output_slope(x0) * gj);
    }
    if (!dvariance) return;
    const C* z = row.sigma == C(0) ? kZeros<C> : block.fill(noise, b, begin, count);
    for (int64_t j = 0; j < count; ++j)
      dvariance[at + j] = from_float<T>(to_float(g[j]) * z[j] * row.learned_sigma_slope(to_float(variance[at + j])));
  });
}

int64_t loss_partial_sums(const DiffusionShape& shape) { return shape.batch * blocks_per_row(shape); }

template <class T>
void Diffusion<T>::loss_fwd(accumulate_t<T>* loss, double* partial, const T* output, const T* x0, const int64_t* t,
                            const double* table, Noise noise, DiffusionShape shape, void*) {
  using C = accumulate_t<T>;
  const int64_t per_row = blocks_per_row(shape);
  for_each_block<C>(shape, [&](int64_t b, int64_t begin, int64_t count, NoiseBlock<C>& block) {
    const LossRow<C> row(table, row_of(t, shape, b));
    const C* __restrict z = block.fill(noise, b, begin, count);
    const int64_t at = b * shape.inner + begin;
    C sum[kPartialSums] = {};
    const auto squared = [&](int64_t j) {
      const C d = row.error(to_float(output[at + j]), to_float(x0[at + j]), z[j]);
      return d * d;
    };
    int64_t j = 0;
    for (; j + kPartialSums <= count; j += kPartialSums)
      for (int k = 0; k < kPartialSums; ++k) sum[k] += squared(j + k);
    for (int k = 0; j < count; ++j, ++k) sum[k] += squared(j);
    double total = 0;
    for (C part : sum) total += double(part);
    partial[b * per_row + begin / kBlock] = total;
  });
  for (int64_t b = 0; b < shape.batch; ++b) {
    double total = 0;
    for (int64_t i = 0; i < per_row; ++i) total += partial[b * per_row + i];
    loss[b] = accumulate_t<T>(total * LossRow<C>(table, row_of(t, shape, b)).weight / double(shape.inner));
  }
}

template <class T>
void Diffusion<T>::loss_bwd(T* doutput, T* dx0, const accumulate_t<T>* dloss, const T* output, const T* x0,
                            const int64_t* t, const double* table, Noise noise, DiffusionShape shape, void*) {
  using C = accumulate_t<T>;
  for_each_block<C>(shape, [&](int64_t b, int64_t begin, int64_t count, NoiseBlock<C>& block) {
    const LossRow<C> row(table, row_of(t, shape, b));
    const C scale = C(2 * row.weight / double(shape.inner) * double(dloss[b]));
    const C* __restrict z = block.fill(noise, b, begin, count);
    const int64_t at = b * shape.inner + begin;
    const T* __restrict po = output + at;
    const T* __restrict p0 = x0 + at;
    for (int64_t j = 0; j < count; ++j) {
      const C d = scale * row.error(to_float(po[j]), to_float(p0[j]), z[j]);
      doutput[at + j] = from_float<T>(d);
      if (dx0) dx0[at + j] = from_float<T>(-row.from_x0 * d);
    }
  });
}

template struct Diffusion<double>;
template struct Diffusion<float>;
template struct Diffusion<Half>;
template struct Diffusion<BFloat16>;

}  // namespace pynn::cpu
