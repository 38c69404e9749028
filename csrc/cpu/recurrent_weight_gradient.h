// Sums over the rows of a chunk: the gradients of weights and biases.
//
// A weight's gradient is the product of the transposed gradients of the pre-activations with the rows that the weight
// multiplied; both lie as panels, [panel][row][kPanelWidth]. The first chunk sets it and the others add to it: in the
// gradient itself, or for 16-bit types in sums of the compute type.
#pragma once
#include "recurrent_schedule.h"

namespace pynn::cpu::recurrent {

// to[:] += the sum of `rows` rows of a panel, summed in short runs whose sums are added. There may be hundreds of
// panels: what is lost when a sum is added to those before it is added up in lost[:].
template <class A>
inline void add_rows(const A* from, int64_t rows, A* to, A* lost) {
  constexpr int64_t L = kLanes<A>, kRun = 16;
  Vec<A> total[kPanelVectors] = {};
  for (int64_t begin = 0; begin < rows; begin += kRun) {
    Vec<A> sum[kPanelVectors] = {};
    for (int64_t r = begin; r < std::min(begin + kRun, rows); ++r)
      for (int v = 0; v < kPanelVectors; ++v) sum[v] = sum[v] + load(from + (r * kPanelVectors + v) * L);
    for (int v = 0; v < kPanelVectors; ++v) total[v] = total[v] + sum[v];
  }
  for (int v = 0; v < kPanelVectors; ++v) {
    const Vec<A> before = load(to + v * L), sum = before + total[v], added = sum - before;
    store(to + v * L, sum);
    store(lost + v * L, load(lost + v * L) + ((before - (sum - added)) + (total[v] - added)));
  }
}

// Rows of a chain of fused multiply-adds: short ones keep the error of long sums small, and the sums between them stay
// in the first-level cache.
inline constexpr int64_t kRowChain = 32;

// Where the rows of all panels fit the second-level cache beside others, a tile walks along the rows of the gradient,
// so that the memory sees few streams of stores; otherwise a panel stays in the first-level cache for all tiles.
inline constexpr int64_t kNearBytes = 256 << 10;

// to[(first[v] + lane) * columns + n] (+)= sum over r < rows of gradients[r][v * L + lane] * panels[n][r], for the rows
// of a weight that a panel of gradients belongs to. `panels` are `capacity` rows long.
template <int NV, bool kAdd, class A>
void add_outer(const A* gradients, const PanelRows& places, const A* panels, int64_t capacity, int64_t columns,
               int64_t rows, A* to) {
  constexpr int64_t L = kLanes<A>, width = kPanelWidth<A>;
  const auto each_vector = [&](const auto& body) {
    for (int v = 0; v < NV; ++v)
      each_tile(places.count[v], tile_height<kPanelVectors>(places.count[v], rows),
                [&](int64_t first, int64_t height) { body(v, first, height); });
  };
  const auto tile = [&](int64_t n, int v, int64_t first, int64_t height) {
    const A* const left = gradients + v * L + first;
    const A* const panel = panels + n * capacity;
    A* const target = to + (places.first[v] + first) * columns + n;
    for (int64_t i = 0; i < height; ++i)  // to be here when the sums are ready
      for (int64_t j = 0; j < width; j += L) __builtin_prefetch(target + i * columns + j, 1);
    const auto multiply_chains = [&](bool add, A* sums, int64_t stride) {
      for (int64_t r = 0; r < rows; r += kRowChain, add = true) {
        const auto multiply =
            add ? kTiles<kPanelVectors, true, A>[height - 1] : kTiles<kPanelVectors, false, A>[height - 1];
        multiply(left + r * width, 1, width, 1, std::min(kRowChain, rows - r), 0, panel + r * width, width, sums,
                 stride);
      }
    };
    // Several chains are added to each other before they are added to what is there, which may be a much longer sum.
    if (n + width <= columns && !(kAdd && rows > kRowChain)) return multiply_chains(kAdd, target, columns);
    alignas(64) A part[kTileHeight<kPanelVectors> * width];
    multiply_chains(false, part, width);
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = n; j < std::min(n + width, columns); j += L) {
        const Vec<A> sum = load(part + i * width + j - n);
        A* const place = target + i * columns + j - n;
        store_some(place, columns - j, kAdd ? load_some(place, columns - j) + sum : sum);
      }
  };
  if (rows * columns * int64_t(sizeof(A)) <= kNearBytes) {
    each_vector([&](int v, int64_t first, int64_t height) {
      for (int64_t n = 0; n < columns; n += width) tile(n, v, first, height);
    });
  } else {
    for (int64_t n = 0; n < columns; n += width)
      each_vector([&](int v, int64_t first, int64_t height) { tile(n, v, first, height); });
  }
}

// The same of so few rows that to store the sums is most of the work: one row of the gradient after the other.
inline constexpr int64_t kFewRows = 2;

template <int NV, bool kAdd, class A>
void add_few_outer(const A* gradients, const PanelRows& places, const A* panels, int64_t capacity, int64_t columns,
                   int64_t rows, A* to) {
  static_assert(kFewRows <= kRowChain);
  constexpr int64_t L = kLanes<A>, width = kPanelWidth<A>;
  for (int v = 0; v < NV; ++v)
    for (int64_t i = 0; i < places.count[v]; ++i) {
      A* const target = to + (places.first[v] + i) * columns;
      Vec<A> scale[kFewRows];
      for (int64_t r = 0; r < rows; ++r) scale[r] = broadcast(gradients[r * width + v * L + i]);
      for (int64_t n = 0; n < columns; n += L) {
        const A* const from = panels + n / width * width * capacity + n % width;
        Vec<A> sum{};
        for (int64_t r = 0; r < rows; ++r) sum = fma(scale[r], load(from + r * width), sum);
        store_some(target + n, columns - n, kAdd ? load_some(target + n, columns - n) + sum : sum);
      }
    }
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
    const bool few = rows <= kFewRows;
    const auto sum = first ? few ? &add_few_outer<NV, false, A> : &add_outer<NV, false, A>
                     : few ? &add_few_outer<NV, true, A>
                           : &add_outer<NV, true, A>;
    sum(gradients, places, panels, capacity, columns_, rows, sums_);
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
