// Register tiles over planes (conv2d_planes.h): lanes are pixels, or output channels. Both add up the same products in
// the same order: pieces of the sum on their own, then the pieces.
#pragma once
#include <utility>

#include "vec.h"

namespace pynn::cpu {

inline constexpr int kPlaneOutputs = 4;
// Vectors of positions in flight, by the number of outputs less one: sums of a piece and of all pieces, weights and one
// input share the registers.
inline constexpr int kPlaneVectors[kPlaneOutputs] = {kVectorRegisters == 32 ? 12 : 6, kVectorRegisters == 32 ? 6 : 4,
                                                     kVectorRegisters == 32 ? 4 : 3, kVectorRegisters == 32 ? 3 : 2};

// sums[o * stride + p] (+)= sum over k in [ends[0], ends[pieces]) of x[offsets[k] + p] * w[k * O + o], for O outputs
// and V vectors, each piece between two ends summed on its own.
template <int O, int V, class A>
[[gnu::noinline]] void plane_tile(const A* x, const int64_t* offsets, const A* w, const int64_t* ends, int64_t pieces,
                                  A* sums, int64_t stride, bool more) {
  constexpr int L = kLanes<A>;
  Vec<A> total[O][V] = {};
  for (int64_t piece = 0; piece < pieces; ++piece) {
    Vec<A> sum[O][V] = {};
    for (int64_t k = ends[piece]; k < ends[piece + 1]; ++k) {
      const A *from = x + offsets[k], *weights = w + k * O;
      Vec<A> weight[O];
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o) weight[o] = broadcast(weights[o]);
#pragma GCC unroll 12
      for (int v = 0; v < V; ++v) {
        const Vec<A> value = O > 1 ? in_register(load(from + v * L)) : load(from + v * L);
#pragma GCC unroll 4
        for (int o = 0; o < O; ++o) sum[o][v] = fma(value, weight[o], sum[o][v]);
      }
    }
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 12
      for (int v = 0; v < V; ++v) {
        A* to = sums + o * stride + v * L;
        total[o][v] = piece ? total[o][v] + sum[o][v] : more ? load(to) + sum[o][v] : sum[o][v];
      }
  }
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 12
    for (int v = 0; v < V; ++v) store(sums + o * stride + v * L, total[o][v]);
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

inline constexpr int kPixelVectors = 2, kPixelColumns = kVectorRegisters == 32 ? 6 : 3;

// Lanes are output channels: to[p * stride + o] = bias[o] + the sums above, for P positions and V vectors of outputs;
// w is [product][output]. Without a bias nothing is added.
template <int P, int V, class A>
[[gnu::noinline]] void pixel_tile(const A* x, const int64_t* offsets, const A* w, const int64_t* ends, int64_t pieces,
                                  const A* bias, A* to, int64_t stride) {
  constexpr int L = kLanes<A>;
  Vec<A> total[P][V] = {};
  for (int64_t piece = 0; piece < pieces; ++piece) {
    Vec<A> sum[P][V] = {};
    for (int64_t k = ends[piece]; k < ends[piece + 1]; ++k) {
      const A* from = x + offsets[k];
      Vec<A> weight[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) weight[v] = load(w + (k * V + v) * L);
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p) {
        const Vec<A> value = broadcast(from[p]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[p][v] = fma(value, weight[v], sum[p][v]);
      }
    }
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[p][v] = piece ? total[p][v] + sum[p][v] : sum[p][v];
  }
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(to + p * stride + v * L, bias ? total[p][v] + load(bias + v * L) : total[p][v]);
}

template <int V, class A, int... P>
inline auto pixel_tile_of(std::integer_sequence<int, P...>, int64_t positions) {
  static constexpr decltype(&pixel_tile<1, V, A>) kTiles[] = {&pixel_tile<P + 1, V, A>...};
  return kTiles[positions - 1];
}
template <class A>
inline auto pixel_tile_of(int64_t positions, int64_t vectors) {
  constexpr std::make_integer_sequence<int, kPixelColumns> columns;
  return vectors == 1 ? pixel_tile_of<1, A>(columns, positions) : pixel_tile_of<kPixelVectors, A>(columns, positions);
}

}  // namespace pynn::cpu
