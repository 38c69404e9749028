// Register tiles over planes (conv2d_planes.h): lanes are pixels, or output channels. Both add up the same products in
// the same order: pieces of the sum on their own, then the pieces.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "vec.h"

namespace pynn::cpu {

inline constexpr int kPlaneOutputs = 4;
// Vectors of positions in flight, by the number of outputs less one: sums of a piece and of all pieces, weights and one
// input share the registers.
inline constexpr int kPlaneVectors[kPlaneOutputs] = {kVectorRegisters == 32 ? 12 : 6, kVectorRegisters == 32 ? 6 : 4,
                                                     kVectorRegisters == 32 ? 4 : 3, kVectorRegisters == 32 ? 3 : 2};

// total[o][v] (+)= sum over k in [ends[0], ends[pieces]) of x[offsets[k] + at(v)] * w[k * O + o], each piece between
// two ends summed on its own.
template <int O, int V, class A, class At>
[[gnu::always_inline]] inline void add_plane_products(const A* x, const At& at, const int64_t* offsets, const A* w,
                                                      const int64_t* ends, int64_t pieces, bool more,
                                                      Vec<A> (&total)[O][V]) {
  for (int64_t piece = 0; piece < pieces; ++piece, more = true) {
    Vec<A> sum[O][V] = {};
    for (int64_t k = ends[piece]; k < ends[piece + 1]; ++k) {
      const A *from = x + offsets[k], *weights = w + k * O;
      Vec<A> weight[O];
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o) weight[o] = in_register(broadcast(weights[o]));
#pragma GCC unroll 12
      for (int v = 0; v < V; ++v) {
        const Vec<A> value = O > 1 ? in_register(load(from + at(v))) : load(from + at(v));
#pragma GCC unroll 4
        for (int o = 0; o < O; ++o) sum[o][v] = fma(value, weight[o], sum[o][v]);
      }
    }
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 12
      for (int v = 0; v < V; ++v) total[o][v] = more ? total[o][v] + sum[o][v] : sum[o][v];
  }
}

// sums[o * stride + p] (+)= the sums above for O outputs and V vectors of positions. The last vector begins at `last`,
// where it may overlap the one before it; a bias, one of each output, is added at the end.
template <int O, int V, class A>
[[gnu::noinline]] void plane_tile(const A* x, const int64_t* offsets, const A* w, const int64_t* ends, int64_t pieces,
                                  const A* bias, A* sums, int64_t stride, int64_t last, bool more) {
  const auto at = [last](int v) { return v + 1 == V ? last : v * int64_t(kLanes<A>); };
  Vec<A> total[O][V] = {};
  if (more)
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 12
      for (int v = 0; v < V; ++v) total[o][v] = load(sums + o * stride + at(v));
  add_plane_products<O, V>(x, at, offsets, w, ends, pieces, more, total);
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 12
    for (int v = 0; v < V; ++v) store(sums + o * stride + at(v), bias ? total[o][v] + broadcast(bias[o]) : total[o][v]);
}

// Vectors that stand anywhere: vector v of positions is at x + from[v], its results at to[v] of each plane of y.
inline constexpr int kRowVectors[kPlaneOutputs] = {6, kPlaneVectors[1], kPlaneVectors[2], kPlaneVectors[3]};
template <int O, int V, class A, class E>
[[gnu::noinline]] void row_tile(const A* x, const int64_t* from, const int64_t* offsets, const A* w,
                                const int64_t* ends, int64_t pieces, const A* bias, E* y, const int64_t* to,
                                int64_t plane) {
  const A* starts[V];
#pragma GCC unroll 12
  for (int v = 0; v < V; ++v) starts[v] = x + from[v];
  Vec<A> total[O][V] = {};
  add_plane_products<O, V>(x, [&](int v) { return starts[v] - x; }, offsets, w, ends, pieces, false, total);
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 12
    for (int v = 0; v < V; ++v)
      store_compute(y + o * plane + to[v], bias ? total[o][v] + broadcast(bias[o]) : total[o][v]);
}

template <int O, class A, int... V>
inline auto plane_tile_of(std::integer_sequence<int, V...>, int64_t vectors) {
  static constexpr decltype(&plane_tile<O, 1, A>) kTiles[] = {&plane_tile<O, V + 1, A>...};
  return kTiles[vectors - 1];
}
template <class A>
inline auto plane_tile_of(int64_t outputs, int64_t vectors) {
  switch (outputs) {
    case 1:
      return plane_tile_of<1, A>(std::make_integer_sequence<int, kPlaneVectors[0]>(), vectors);
    case 2:
      return plane_tile_of<2, A>(std::make_integer_sequence<int, kPlaneVectors[1]>(), vectors);
    case 3:
      return plane_tile_of<3, A>(std::make_integer_sequence<int, kPlaneVectors[2]>(), vectors);
    default:
      return plane_tile_of<4, A>(std::make_integer_sequence<int, kPlaneVectors[3]>(), vectors);
  }
}

template <int O, class A, class E, int... V>
inline auto row_tile_of(std::integer_sequence<int, V...>, int64_t vectors) {
  static constexpr decltype(&row_tile<O, 1, A, E>) kTiles[] = {&row_tile<O, V + 1, A, E>...};
  return kTiles[vectors - 1];
}
template <class A, class E>
inline auto row_tile_of(int64_t outputs, int64_t vectors) {
  switch (outputs) {
    case 1:
      return row_tile_of<1, A, E>(std::make_integer_sequence<int, kRowVectors[0]>(), vectors);
    case 2:
      return row_tile_of<2, A, E>(std::make_integer_sequence<int, kRowVectors[1]>(), vectors);
    case 3:
      return row_tile_of<3, A, E>(std::make_integer_sequence<int, kRowVectors[2]>(), vectors);
    default:
      return row_tile_of<4, A, E>(std::make_integer_sequence<int, kRowVectors[3]>(), vectors);
  }
}

// Positions of a tile of two vectors of outputs, and of one vector.
inline constexpr int kPixelVectors = 2,
                     kPixelColumns[kPixelVectors] = {kVectorRegisters == 32 ? 8 : 6, kVectorRegisters == 32 ? 6 : 3};

// Lanes are output channels: to[p * stride + o] = bias[o] + the sums above, for P positions, `step` apart in x, and N
// vectors of outputs, of type V; w is [product][output]. Without a bias nothing is added.
template <int P, int N, class V, class A>
[[gnu::noinline]] void pixel_tile(const A* x, int64_t step, const int64_t* offsets, const A* w, const int64_t* ends,
                                  int64_t pieces, const A* bias, A* to, int64_t stride) {
  constexpr int L = sizeof(V) / sizeof(A);
  V total[P][N] = {};
  for (int64_t piece = 0; piece < pieces; ++piece) {
    V sum[P][N] = {};
    for (int64_t k = ends[piece]; k < ends[piece + 1]; ++k) {
      const A* from = x + offsets[k];
      V weight[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) weight[n] = in_register(load_lanes<V>(w + (k * N + n) * L));
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p) {
        const V value = from[p * step] - V{};
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[p][n] = fma(value, weight[n], sum[p][n]);
      }
    }
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) total[p][n] = piece ? total[p][n] + sum[p][n] : sum[p][n];
  }
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      store_lanes(to + p * stride + n * L, bias ? total[p][n] + load_lanes<V>(bias + n * L) : total[p][n]);
}

// Output channels [first, first + channels) as `vectors` vectors of `lanes` lanes each.
struct PixelPanel {
  int64_t first, channels, lanes, vectors;
  int64_t width() const { return lanes * vectors; }
};

// Pairs of vectors, then single ones, then shorter ones of at least `least` lanes; only the last panel may have lanes
// without a channel.
template <class A>
std::vector<PixelPanel> pixel_panels(int64_t outputs, int64_t least) {
  std::vector<PixelPanel> panels;
  for (int64_t o = 0; o < outputs; o += panels.back().channels) {
    int64_t lanes = kLanes<A>;
    while (lanes > least && lanes > outputs - o) lanes /= 2;
    const int64_t vectors = outputs - o >= 2 * kLanes<A> ? 2 : 1;
    panels.push_back({o, std::min(lanes * vectors, outputs - o), lanes, vectors});
  }
  return panels;
}

template <int N, class V, class A, int... P>
inline auto pixel_tile_of(std::integer_sequence<int, P...>, int64_t positions) {
  static constexpr decltype(&pixel_tile<1, N, V, A>) kTiles[] = {&pixel_tile<P + 1, N, V, A>...};
  return kTiles[positions - 1];
}
template <class A>
inline auto pixel_tile_of(int64_t positions, const PixelPanel& panel) {
  constexpr int L = kLanes<A>;
  constexpr std::make_integer_sequence<int, kPixelColumns[0]> one;
  if (panel.vectors == 2)
    return pixel_tile_of<2, Vec<A>, A>(std::make_integer_sequence<int, kPixelColumns[1]>(), positions);
  if constexpr (L >= 8) {
    if (panel.lanes == L / 2) return pixel_tile_of<1, Lanes<A, L / 2>, A>(one, positions);
  }
  if constexpr (L >= 16) {
    if (panel.lanes == L / 4) return pixel_tile_of<1, Lanes<A, L / 4>, A>(one, positions);
  }
  return pixel_tile_of<1, Vec<A>, A>(one, positions);
}

}  // namespace pynn::cpu
