// Forward pass and input gradient as an implicit GEMM. A block computes kRows pixels times kColumns output channels of
// one group and one stride phase. The sum runs over filter taps (outer) and channels (inner) as one sequence of 16-byte
// packs, so that few channels leave no part of a block of the sum idle; every thread copies one pack of each of its
// rows per block of the sum and keeps that pack's tap, from which the rows' addresses follow whenever the tap changes.
#pragma once
#include "conv2d_gemm_output.cuh"
#include "conv2d_prologue_value.cuh"

namespace pynn::cuda {
namespace {
namespace gemm {

// What one thread copies for each block of the sum.
template <class Tile>
struct CorrelationLoader {
  using T = typename Tile::Element;
  static constexpr int kPack = 16 / sizeof(T), kStep = Tile::kThreads / kRowPacks;
  static constexpr int kLeft = Tile::kRows / kStep, kRight = Tile::kColumns / kStep;
  static_assert(kStep % 8 == 0);  // rows of one thread are permuted alike

  const Correlation<T>& p;
  const Phase &h, &w;
  const T* image[kLeft];  // of the row's sample; null beyond the last row
  int first_h[kLeft], first_w[kLeft];
  const T* left[kLeft];  // at the current tap; null outside of the image
  const T* filter;       // of this thread's first column
  int columns;           // from that one on
  int tap, row = threadIdx.x / kRowPacks, pack = threadIdx.x % kRowPacks;
  int i, j, c;  // tap and channel of this thread's pack

  __device__ __forceinline__ CorrelationLoader(const Correlation<T>& p, const Phase& h, const Phase& w, uint32_t rows,
                                               uint32_t first_row, int first_column, int group, int first_block)
      : p(p), h(h), w(w) {
#pragma unroll
    for (int r = 0; r < kLeft; ++r) {
      const uint32_t at = first_row + row + r * kStep;
      image[r] = nullptr, first_h[r] = first_w[r] = 0;
      if (at < rows) {
        const Pixel pixel = pixel_of(p, h, w, at);
        image[r] = p.image.data + pixel.n * p.image.n + int64_t(group) * p.image.group;
        first_h[r] = pixel.h * p.h.stride + h.origin, first_w[r] = pixel.w * p.w.stride + w.origin;
      }
    }
    const int column = first_column + row;
    columns = p.columns - column;
    filter = p.filter.data + group * p.filter.group + column * p.filter.row;
    const int element = first_block * Tile::kDepth + pack * kPack, taps = element / p.image.channels;
    c = element - taps * p.image.channels;
    i = w.taps ? taps / w.taps : h.taps, j = w.taps ? taps - i * w.taps : 0;
    locate();
  }

  // The addresses of the current tap.
  __device__ __forceinline__ void locate() {
    const bool exists = i < h.taps;
#pragma unroll
    for (int r = 0; r < kLeft; ++r) {
      int at_h = first_h[r] + i * p.h.step, at_w = first_w[r] + j * p.w.step;
      if (p.padding_mode != PaddingMode::zeros) {
        at_h = int(source_of(at_h, p.h.size, p.padding_mode)), at_w = int(source_of(at_w, p.w.size, p.padding_mode));
      }
      const bool inside = unsigned(at_h) < unsigned(p.h.size) && unsigned(at_w) < unsigned(p.w.size);
      left[r] = image[r] && exists && inside ? image[r] + at_h * p.image.h + at_w * p.image.w : nullptr;
    }
    tap = exists ? (h.first_tap + i * p.h.tap_step) * p.filter.tap_h + (w.first_tap + j * p.w.tap_step) * p.filter.tap_w
                 : -1;
  }

  // Starts the copies of the next block of the sum to a stage.
  __device__ __forceinline__ void copy(unsigned char* stage) {
    const int at = offset_of(row, pack);
#pragma unroll
    for (int r = 0; r < kLeft; ++r)
      cp_async<16>(stage + at + r * kStep * kRowBytes, left[r] ? left[r] + c : p.image.data, left[r] ? 16 : 0);
    stage += Tile::kRows * kRowBytes;
#pragma unroll
    for (int r = 0; r < kRight; ++r) {
      const bool exists = r * kStep < columns && tap >= 0;
      const T* from = filter + r * kStep * p.filter.row + tap + c;
      cp_async<16>(stage + at + r * kStep * kRowBytes, exists ? from : p.filter.data, exists ? 16 : 0);
    }
    c += Tile::kDepth;
    if (c < p.image.channels) return;
    do {
      c -= p.image.channels;
      if (++j == w.taps) j = 0, ++i;
    } while (c >= p.image.channels);
    locate();
  }
};

// What the kernel can do: the activations that follow normalisations, with scale and shift that lie alike.
template <class T>
bool suits_kernel(const Conv2dPrologue<T>& p, int64_t coefficients) {
  const bool alike = !p.scale.values || !p.shift.values || p.scale.stride == p.shift.stride;
  return alike && is_aligned({p.scale.values, p.shift.values}) && coefficients < kMostRows &&
         (p.activation == Activation::none || p.activation == Activation::relu || p.activation == Activation::silu);
}

// The same with the prologue of the image: when a pack has arrived in shared memory, the thread that copied it applies
// the prologue in place, before any other thread reads it. Packs outside of the image stay zero. Coefficients are read
// 16 bytes at once; those of a block's channels stay in the L1 cache.
template <class Tile>
struct PrologueLoader : CorrelationLoader<Tile> {
  using Base = CorrelationLoader<Tile>;
  using T = typename Tile::Element;
  static constexpr int kAhead = Tile::kStages - 1, kLeft = Base::kLeft;

  const Conv2dPrologue<T>& prologue;
  int first[kLeft];     // where the coefficients of the row's sample and group begin
  int channel;          // of the oldest block's pack, in the group
  unsigned inside = 0;  // which rows are in the image, for each block that has been asked for, oldest first

  __device__ __forceinline__ PrologueLoader(const Correlation<T>& p, const Phase& h, const Phase& w, uint32_t rows,
                                            uint32_t first_row, int first_column, int group, int first_block,
                                            const Conv2dPrologue<T>& prologue)
      : Base(p, h, w, rows, first_row, first_column, group, first_block), prologue(prologue), channel(this->c) {
    const int stride = int(max(prologue.scale.stride, prologue.shift.stride));
#pragma unroll
    for (int r = 0; r < kLeft; ++r) {
      first[r] = group * p.image.channels;
      if (this->image[r]) first[r] += stride * pixel_of(p, h, w, first_row + this->row + r * Base::kStep).n;
    }
  }

  __device__ __forceinline__ void push(unsigned rows) { inside = inside >> kLeft | rows << (kLeft * (kAhead - 1)); }
  __device__ __forceinline__ void skip() { push(0); }
  __device__ __forceinline__ void copy(unsigned char* stage) {
    unsigned rows = 0;
#pragma unroll
    for (int r = 0; r < kLeft; ++r) rows |= unsigned(this->left[r] != nullptr) << r;
    push(rows);
    Base::copy(stage);
  }

  static __device__ __forceinline__ void read(float (&to)[4], const PerChannel<float>& from, int at, float none) {
    if (from.values)
      load_vector(to, from.values + at);
    else
      to[0] = to[1] = to[2] = to[3] = none;
  }

  __device__ __forceinline__ void transform(unsigned char* stage) {
    unsigned char* const pack = stage + offset_of(this->row, this->pack);
#pragma unroll
    for (int r = 0; r < kLeft; ++r) {
      if (!(inside >> r & 1)) continue;
      T* const values = reinterpret_cast<T*>(pack + r * Base::kStep * kRowBytes);
#pragma unroll 1
      for (int k = 0; k < Base::kPack; k += 4) {  // four at a time: registers are scarce
        float scale[4], shift[4];
        read(scale, prologue.scale, first[r] + channel + k, 1);
        read(shift, prologue.shift, first[r] + channel + k, 0);
        T four[4];
        load_vector(four, values + k);
        const auto apply = [&]<Activation kind>() {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            four[i] = from_float<T>(activated<T, kind>(fmaf(to_float(four[i]), scale[i], shift[i])));
        };
        if (prologue.activation == Activation::silu)
          apply.template operator()<Activation::silu>();
        else if (prologue.activation == Activation::relu)
          apply.template operator()<Activation::relu>();
        else
          apply.template operator()<Activation::none>();
        store_vector(values + k, four);
      }
    }
    channel += Tile::kDepth;
    while (channel >= this->p.image.channels) channel -= this->p.image.channels;
  }
};

// Makes a Loader of the arguments of a CorrelationLoader, and `more`.
template <class Loader, class Tile, class... More>
__device__ __forceinline__ void correlate_tile(const Correlation<typename Tile::Element>& p,
                                               const Target<typename Tile::Element>& to, const More&... more) {
  DYNAMIC_SHARED(unsigned char, shared);
  const int phase = blockIdx.y / p.groups, group = blockIdx.y % p.groups;
  const Phase &h = p.h.phase[phase / p.w.phases], &w = p.w.phase[phase % p.w.phases];
  const uint32_t rows = p.batch * h.count.divisor * w.count.divisor;
  const uint32_t row_tile = blockIdx.x / p.column_tiles, first_row = row_tile * Tile::kRows;
  const int first_column = int(blockIdx.x - row_tile * p.column_tiles) * Tile::kColumns;
  if (first_row >= rows) return;

  Tile tile(p.chunk);
  const int sum = h.taps * w.taps * p.image.channels, all_blocks = (sum + Tile::kDepth - 1) / Tile::kDepth;
  const int first_block = int(blockIdx.z) * p.split, blocks = min(p.split, all_blocks - first_block);
  Loader loader(p, h, w, rows, first_row, first_column, group, first_block, more...);
  run_pipeline(tile, loader, blocks, shared, Tile::kRows * kRowBytes);
  store_tile(tile, to, shared, int64_t(rows) - first_row, group * p.columns + first_column, p.columns - first_column,
             [&](int r) {
               const Pixel pixel = pixel_of(p, h, w, first_row + r);
               return Pixel{pixel.n, h.first + pixel.h * p.h.out_stride, w.first + pixel.w * p.w.out_stride};
             });
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerProcessor)
    correlate_kernel(const __grid_constant__ Correlation<typename Tile::Element> p,
                     const __grid_constant__ Target<typename Tile::Element> to) {
  correlate_tile<CorrelationLoader<Tile>, Tile>(p, to);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerProcessor)
    prologue_correlate_kernel(const __grid_constant__ Correlation<typename Tile::Element> p,
                              const __grid_constant__ Target<typename Tile::Element> to,
                              const __grid_constant__ Conv2dPrologue<typename Tile::Element> prologue) {
  correlate_tile<PrologueLoader<Tile>, Tile>(p, to, prologue);
}

}  // namespace gemm
}  // namespace
}  // namespace pynn::cuda
