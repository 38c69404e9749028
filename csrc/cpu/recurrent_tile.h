// The matrix products of recurrent layers: register tiles, packed panels of weights, and sums in one order.
//
// A panel is a few vectors wide: up to 24 accumulators stand in registers, rows x vectors. Every element is a sum over
// k in chains of at most kChain fused multiply-adds, each chain started at 0 and added to what was there before. The
// chains depend on the depth of the product alone, so neither the height of a tile nor the number of rows, nor the
// path by which weights come touches a bit of the result. Products with weights whose rows lie along the sum, those of
// the forward pass, are in recurrent_rows.h.
#pragma once
#include <algorithm>
#include <array>
#include <utility>

#include "divide.h"
#include "multiply_add.h"
#include "vec_load.h"

namespace pynn::cpu::recurrent {

inline constexpr int64_t kChain = 64;
inline constexpr int kPanelVectors = 4;
template <class A>
inline constexpr int64_t kPanelWidth = kPanelVectors * kLanes<A>;
template <int NV>
inline constexpr int kTileHeight = (kVectorRegisters == 32 ? 24 : 9) / NV;

// The left operand of a product: element (r, k) is base[r * stride + k / run * run_stride + k % run].
template <class A>
struct LeftRows {
  const A* base;
  int64_t stride, run, run_stride;
};

// c[i * c_stride + :] (+)= sum over runs r, k < length of a[r * run_stride + i * a_row + k * a_step] * b[k * b_step +
// :] for MR rows of NV vectors; b goes on from run to run.
template <int MR, int NV, bool kAdd, class Op, class A>
[[gnu::noinline]] void multiply_tile(const A* a, int64_t a_row, int64_t a_step, int64_t runs, int64_t length,
                                     int64_t run_stride, const A* b, int64_t b_step, A* c, int64_t c_stride) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[MR][NV] = {};
  for (; runs > 0; --runs, a += run_stride) {
    const A *from = a, *const end = a + length * a_step;
    for (; from != end; from += a_step, b += b_step) {
      Vec<A> column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) column[v] = load(b + v * L);
      __builtin_prefetch(b + 16 * NV * L);
      __builtin_prefetch(b + 17 * NV * L - L);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const Vec<A> value = Op::element(from + i * a_row);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[i][v] = Op::add(value, column[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      A* to = c + i * c_stride + v * L;
      store(to, kAdd ? load(to) + sum[i][v] : sum[i][v]);
    }
  }
}

template <int NV, bool kAdd, class Op, class A, int... I>
inline constexpr auto make_tiles(std::integer_sequence<int, I...>) {
  return std::array{&multiply_tile<I + 1, NV, kAdd, Op, A>...};
}
// The tiles of 1, 2, ... rows.
template <int NV, bool kAdd, class A, class Op = MultiplyAdd>
inline constexpr auto kTiles = make_tiles<NV, kAdd, Op, A>(std::make_integer_sequence<int, kTileHeight<NV>>{});

// Tiles of fewer sums leave registers to the next tile, which then begins before they end: the higher ones are for few
// rows with a long panel, which comes from far.
inline constexpr int64_t kManyRows = 48, kLongPanel = 256;
template <int NV>
inline int64_t tile_height(int64_t rows, int64_t depth) {
  constexpr int kLow = kVectorRegisters == 32 ? 16 / NV : kTileHeight<NV>;
  return rows < kManyRows && depth > kLongPanel ? kTileHeight<NV> : kLow;
}

// Calls body(first, height) for tiles of about the same height.
template <class Body>
inline void each_tile(int64_t rows, int64_t highest, const Body& body) {
  const int64_t tiles = ceil_div(rows, highest);
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int64_t height = rows / tiles + (t < rows % tiles);
    body(first, height);
    first += height;
  }
}

// With many rows a panel of the right operand takes so long that the processor does not expect the next one: this
// brings it to the second-level cache, some lines with every tile.
template <class A>
class NextPanel {
 public:
  NextPanel(const A* from, int64_t rows) : from_(rows < kManyRows ? nullptr : from) {}
  // So many tiles take a part of the right operand of this many vectors.
  void begin(int64_t vectors, int64_t tiles) {
    lines_ = from_ ? ceil_div(vectors * int64_t(sizeof(Vec<A>)), 64 * tiles) : 0;
  }
  PYNN_HD void lines() {
    for (int64_t i = 0; i < lines_; ++i, from_ += 64 / sizeof(A)) __builtin_prefetch(from_, 0, 2);
  }

 private:
  const A* from_;
  int64_t lines_ = 0;
};

// One panel: c[r * c_stride + :] += sum over k < depth of a(r, k) * b[k * NV * L + :] for `rows` rows, where
// block(k, count) gives the rows k to k + count of b. Chains are whole runs of a, which have at most kChain elements.
template <int NV, class A, class Block>
void multiply_blocks(const LeftRows<A>& a, int64_t depth, const Block& block, int64_t rows, A* c, int64_t c_stride,
                     NextPanel<A> next) {
  const int64_t chain = kChain / a.run * a.run, width = NV * kLanes<A>, highest = tile_height<NV>(rows, depth);
  for (int64_t k = 0; k < depth; k += chain) {
    const int64_t count = std::min(chain, depth - k);
    const A* const from = a.base + k / a.run * a.run_stride;
    const A* const b = block(k, count);
    next.begin(count * NV, ceil_div(rows, highest));
    each_tile(rows, highest, [&](int64_t first, int64_t height) {
      next.lines();
      const A* const left = from + first * a.stride;
      A* const to = c + first * c_stride;
      kTiles<NV, true, A>[height - 1](left, a.stride, 1, count / a.run, a.run, a.run_stride, b, width, to, c_stride);
    });
  }
}
// With panels one after the other.
template <int NV, class A>
void multiply(const LeftRows<A>& a, int64_t depth, const A* b, int64_t rows, A* c, int64_t c_stride) {
  const auto block = [&](int64_t k, int64_t) { return b + k * NV * kLanes<A>; };
  multiply_blocks<NV>(a, depth, block, rows, c, c_stride, NextPanel<A>(b + depth * NV * kLanes<A>, rows));
}

template <class T>
PYNN_HD Vec<accumulate_t<T>> load_some(const T* from, int64_t count) {
  if (count >= kComputeLanes<T>) [[likely]]
    return load_compute(from);
  return load_part(from, count, accumulate_t<T>(0));
}
template <class T>
PYNN_HD void store_some(T* to, int64_t count, Vec<accumulate_t<T>> v) {
  if (count >= kComputeLanes<T>) [[likely]]
    store_compute(to, v);
  else
    store_part(to, count, v);
}
// The first `count` lanes, and 0 in the others: NaN there would meet weights of 0.
template <class A>
PYNN_HD void store_or_zero(A* to, int64_t count, Vec<A> v) {
  if (count < kLanes<A>) store(to, Vec<A>{});
  store_some(to, count, v);
}

// Which rows of a weight matrix are the columns of a panel: vector v holds rows first[v] to first[v] + count[v].
struct PanelRows {
  int64_t first[kPanelVectors], count[kPanelVectors];
};

// Memory that is read once comes fastest in the order of its addresses, which is not the order in which tiles take it.
// This brings `size` elements of the rows of a panel to the second-level cache in their order, some cache lines at a
// time, while the panel before is at work.
class Ahead {
  static constexpr int64_t kLine = 64;

 public:
  Ahead() = default;
  template <class T>
  Ahead(const T* w, int64_t stride, int64_t size, const PanelRows& rows)
      : w_(reinterpret_cast<const char*>(w)),
        stride_(stride * int64_t(sizeof(T))),
        bytes_(size * int64_t(sizeof(T))),
        rows_(rows),
        vector_(-1) {
    next_vector();
  }

  template <int64_t kLines>
  PYNN_HD void lines() {
    if (!row_) return;
    for (int64_t i = 0; i < kLines; ++i) __builtin_prefetch(row_ + at_ + i * kLine, 0, 2);
    if ((at_ += kLines * kLine) < bytes_) return;
    at_ = 0;
    row_ += stride_;
    if (--left_ == 0) next_vector();
  }

 private:
  void next_vector() {
    for (row_ = nullptr; !row_ && ++vector_ < kPanelVectors;)
      if ((left_ = rows_.count[vector_]) > 0) row_ = w_ + rows_.first[vector_] * stride_;
  }

  const char *w_, *row_ = nullptr;
  int64_t stride_, bytes_, at_ = 0, left_;
  PanelRows rows_;
  int vector_;
};
// Cache lines of a square of whole vectors.
template <class T>
inline constexpr int64_t kSquareLines =
    std::max<int64_t>(1, kComputeLanes<T>* kComputeLanes<T>* int64_t(sizeof(T)) / 64);

// A panel of w, (depth, columns), itself: to[:] = w[k][first ...] for `count` columns, 0 after them.
template <class T>
PYNN_HD void pack_row(const T* from, int64_t count, accumulate_t<T>* to) {
  constexpr int L = kComputeLanes<T>;
  for (int v = 0; v < kPanelVectors; ++v)
    store(to + v * L, count > v * L ? load_some(from + v * L, count - v * L) : Vec<accumulate_t<T>>{});
}

// multiply_tile of one chain with a panel of w itself, whose rows it packs on their way for the tiles after it: k
// counts the rows of w of the panel's first, second, ... vector.
template <int MR, class A>
[[gnu::noinline]] void multiply_tile_and_pack(const A* a, int64_t a_row, const A* w, int64_t columns,
                                              const PanelRows& rows, int vectors, A* packed, A* c, int64_t c_stride,
                                              Ahead& ahead) {
  constexpr int L = kLanes<A>, NV = kPanelVectors;
  Vec<A> sum[MR][NV] = {};
  for (int part = 0; part < vectors; ++part) {
    const A* from = w + rows.first[part] * columns;
    for (int64_t k = 0; k < L; ++k, ++a, from += columns, packed += NV * L) {
      ahead.lines<NV * L * int64_t(sizeof(A)) / 64>();
      Vec<A> column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) column[v] = load(from + v * L);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(packed + v * L, column[v]);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const Vec<A> value = broadcast(a[i * a_row]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[i][v] = fma(value, column[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(c + i * c_stride + v * L, load(c + i * c_stride + v * L) + sum[i][v]);
}
template <class A, int... I>
inline constexpr auto make_packing_tiles(std::integer_sequence<int, I...>) {
  return std::array{&multiply_tile_and_pack<I + 1, A>...};
}
template <class A>
inline constexpr auto kPackingTiles =
    make_packing_tiles<A>(std::make_integer_sequence<int, kTileHeight<kPanelVectors>>{});

// to[j] += scale[0] * w[j], then scale[1] * w[stride + j], ... for N rows of `count` elements.
template <int N, class T, class A = accumulate_t<T>>
void add_scaled_rows(const T* w, int64_t stride, const A* scale, int64_t count, A* to, Ahead& ahead) {
  Vec<A> factor[N];
  for (int i = 0; i < N; ++i) factor[i] = broadcast(scale[i]);
  for (int64_t j = 0; j < count; j += kLanes<A>) {
    ahead.lines<N>();
    Vec<A> sum = load(to + j);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) sum = fma(factor[i], load_some(w + i * stride + j, count - j), sum);
    store(to + j, sum);
  }
}

// Converts `count` values, and fills with 0 up to a whole number of vectors.
template <class T>
PYNN_HD void convert(const T* from, int64_t count, accumulate_t<T>* to) {
  constexpr int L = kComputeLanes<T>;
  for (int64_t i = 0; i < count; i += L) store(to + i, load_some(from + i, count - i));
}

}  // namespace pynn::cpu::recurrent
