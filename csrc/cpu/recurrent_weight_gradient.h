// Sums over the rows of a chunk: the gradients of weights and biases.
//
// A weight's gradient is the product of the transposed gradients of the pre-activations with the rows that the weight
// multiplied; both lie as panels, [panel][row][kPanelWidth]. The first chunk sets it and the others add to it: in the
// gradient itself, or for 16-bit types in sums of the compute type.
#pragma once
#include "recurrent_schedule.h"

namespace pynn::cpu::recurrent {

// to[:] += the sum of `rows` rows of a panel.
template <class A>
inline void add_rows(const A* from, int64_t rows, A* to) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[kPanelVectors] = {};
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < kPanelVectors; ++v) sum[v] = sum[v] + load(from + (r * kPanelVectors + v) * L);
  for (int v = 0; v < kPanelVectors; ++v) store(to + v * L, load(to + v * L) + sum[v]);
}

// to[(first[v] + lane) * columns + n] (+)= sum over r < rows of gradients[r][v * L + lane] * panels[n][r], for the rows
// of a weight that a panel of gradients belongs to. `panels` are `capacity` rows long.
template <int NV, bool kAdd, class A>
void add_outer(const A* gradients, const PanelRows& places, const A* panels, int64_t capacity, int64_t columns,
               int64_t rows, A* to) {
  constexpr int64_t L = kLanes<A>, width = kPanelWidth<A>;
  for (int64_t n = 0; n < columns; n += width, panels += capacity * width)
    for (int v = 0; v < NV; ++v)
      each_tile<kPanelVectors>(places.count[v], [&](int64_t first, int64_t height) {
        const A* const left = gradients + v * L + first;
        A* const target = to + (places.first[v] + first) * columns + n;
        if (n + width <= columns) {
          kTiles<kPanelVectors, kAdd, A>[height - 1](left, 1, width, 1, rows, 0, panels, width, target, columns);
          return;
        }
        alignas(64) A part[kTileHeight<kPanelVectors> * width];
        kTiles<kPanelVectors, false, A>[height - 1](left, 1, width, 1, rows, 0, panels, width, part, width);
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = n; j < columns; j += L) {
            const Vec<A> sum = load(part + i * width + j - n);
            A* const place = target + i * columns + j - n;
            store_some(place, columns - j, kAdd ? load_some(place, columns - j) + sum : sum);
          }
      });
}

// Where the gradient of a weight is summed: in the gradient itself, or apart where that is of a shorter type.
template <class T>
class WeightGradient {
  using A = accumulate_t<T>;
  static constexpr bool kInPlace = std::is_same_v<T, A>;

 public:
  WeightGradient() = default;
  WeightGradient(T* gradient, int64_t rows, int64_t columns, bool wanted, Arena& arena)
      : size_(rows * columns), columns_(columns), gradient_(gradient) {
    A* const apart = arena.take<A>(kInPlace || !wanted ? 0 : size_);
    if constexpr (kInPlace)
      sums_ = gradient;
    else
      sums_ = apart;
  }
  bool wanted() const { return gradient_ != nullptr; }

  template <int NV>
  void add(const A* gradients, const PanelRows& places, const A* panels, int64_t capacity, int64_t rows,
           bool first) const {
    if (first)
      add_outer<NV, false>(gradients, places, panels, capacity, columns_, rows, sums_);
    else
      add_outer<NV, true>(gradients, places, panels, capacity, columns_, rows, sums_);
  }
  // After the last chunk; `none` where there was no chunk at all.
  void finish(bool none) const {
    if (!gradient_) return;
    if (none) return void(std::fill_n(gradient_, size_, T{}));
    if constexpr (!kInPlace) {
      constexpr int64_t L = kLanes<A>;
      parallel_for(size_, 1 << 15, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += L) store_some(gradient_ + i, end - i, load_some(sums_ + i, end - i));
      });
    }
  }

 private:
  int64_t size_, columns_;
  T* gradient_;
  A* sums_;
};

}  // namespace pynn::cpu::recurrent
