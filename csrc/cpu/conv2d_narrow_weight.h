// Weight and bias gradient of the convolutions in conv2d_narrow.h: dw[o, c, a, b] = sum over n, i, j of dy[n, o, i, j]
// * x[n, c, i', j']. Lanes are pixels again: x and dy are planes of one pitch, so every product of a filter is a dot
// product of two runs of memory, zeros of dy standing between the rows. A register tile holds up to four output
// channels times a few products; its lanes are added up at the end, in double. Units, bands of one image or a few small
// images, are dealt to a fixed number of parts whose sums are added in order, so threads do not matter.
#pragma once
#include "conv2d_narrow.h"

namespace pynn::cpu {

// Products in flight, by the number of outputs less one.
inline constexpr int kPlaneProducts[kPlaneOutputs] = {kVectorRegisters == 32 ? 16 : 8, kVectorRegisters == 32 ? 12 : 5,
                                                      kVectorRegisters == 32 ? 8 : 3, kVectorRegisters == 32 ? 6 : 2};

// `images` runs of `vectors` vectors, the distances between images, and between the planes of dy.
struct PlaneRuns {
  int64_t images, vectors, x_image, dy_image, dy_plane;
};

// sums[o * stride + k * L + lane] += sum over the positions p of that lane of dy[o][p] * x[offsets[k] + p].
template <int O, int K, class A>
[[gnu::noinline]] void plane_weight_tile(const A* dy, const A* x, const int64_t* offsets, const PlaneRuns& runs,
                                         A* sums, int64_t stride) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[O][K] = {};
  for (int64_t n = 0; n < runs.images; ++n, dy += runs.dy_image, x += runs.x_image)
    for (int64_t p = 0; p < runs.vectors * L; p += L) {
      Vec<A> gradient[O];
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o) gradient[o] = in_register(load(dy + o * runs.dy_plane + p));
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        const Vec<A> value = O > 1 ? in_register(load(x + offsets[k] + p)) : load(x + offsets[k] + p);
#pragma GCC unroll 4
        for (int o = 0; o < O; ++o) sum[o][k] = fma(value, gradient[o], sum[o][k]);
      }
    }
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      A* to = sums + o * stride + k * L;
      store(to, load(to) + sum[o][k]);
    }
}

template <int O, class A, int... K>
inline auto plane_weight_tile_of(std::integer_sequence<int, K...>, int64_t products) {
  static constexpr decltype(&plane_weight_tile<O, 1, A>) kTiles[] = {&plane_weight_tile<O, K + 1, A>...};
  return kTiles[products - 1];
}
template <class A>
inline auto plane_weight_tile_of(int64_t outputs, int64_t products) {
  switch (outputs) {
    case 1:
      return plane_weight_tile_of<1, A>(std::make_integer_sequence<int, kPlaneProducts[0]>(), products);
    case 2:
      return plane_weight_tile_of<2, A>(std::make_integer_sequence<int, kPlaneProducts[1]>(), products);
    case 3:
      return plane_weight_tile_of<3, A>(std::make_integer_sequence<int, kPlaneProducts[2]>(), products);
    default:
      return plane_weight_tile_of<4, A>(std::make_integer_sequence<int, kPlaneProducts[3]>(), products);
  }
}

// Whether lanes of pixels beat lanes of channels here too.
inline bool has_narrow_weights(const Window& window) {
  return is_narrow(window) && std::min(window.in_channels, window.out_channels) <= 8;
}

template <class T>
class NarrowWeightGradient {
  using A = accumulate_t<T>;
  static constexpr int L = kLanes<A>;
  static constexpr int64_t kBytes = 256 << 10, kChannels = 32;  // of a unit, a bundle
  static constexpr int64_t kVectors = L >= 16 ? 48 : 16;  // of a chain of sums: fewer lanes take more products each

 public:
  NarrowWeightGradient(const T* dy, const Strides4& g, const T* x, const Strides4& s, const Window& window)
      : dy_(dy),
        g_(g),
        x_(x),
        s_(s),
        window_(window),
        in_(window.in_channels),
        out_(window.out_channels),
        depth_(window.depth()),
        tiles_(ceil_div(out_, kPlaneOutputs)),
        bundle_(std::clamp<int64_t>(kChannels / std::max(in_, out_), 1, window.groups)),
        rows_(rows_of(window, bundle_)),
        planes_(window, rows_),
        gradient_planes_(gradient_window(window), rows_, planes_.pitch()) {
    const int64_t bands = ceil_div(window.h.out, rows_), vectors = ceil_div(planes_.positions(rows_), L);
    const int64_t fit =
        kBytes / int64_t(sizeof(A)) / (bundle_ * (in_ * planes_.channel() + out_ * gradient_planes_.channel()));
    images_ = bands > 1 ? 1 : std::clamp<int64_t>(std::min(kVectors / vectors, fit), 1, ceil_div(window.batch, 8));
    units_ = ceil_div(window.batch, images_) * bands;
    parts_ = std::min<int64_t>(8, units_);
    for (int64_t k = 0; k < depth_; ++k)
      offsets_.push_back(k / window.taps() * planes_.channel() +
                         planes_.offset(k % window.taps() / window.w.kernel, k % window.w.kernel));
  }

  // False when something is not finite: the positions between two rows may have carried it into filters that never
  // read it.
  bool run(T* dw, T* dbias) const {
    const int64_t bundles = ceil_div(window_.groups, bundle_), work = bundles * parts_;
    const int64_t slots = std::min<int64_t>(work, thread_count()), outputs = window_.groups * out_;
    const int64_t x_size = round_up(images_ * bundle_ * in_ * planes_.channel() + 2 * L, 16);
    const int64_t dy_size = round_up(images_ * bundle_ * out_ * gradient_planes_.channel() + 2 * L, 16);
    const int64_t sums_size = bundle_ * out_ * depth_ * L, slot_size = x_size + dy_size + sums_size;
    const Buffer<A> scratch(slots * slot_size);
    const Buffer<double> results(parts_ * outputs * depth_), biases(parts_ * outputs);
    parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        A *x = scratch.get() + slot * slot_size, *dy = x + x_size, *sums = dy + dy_size;
        std::fill_n(x, x_size + dy_size, A(0));
        for (int64_t i = slot; i < work; i += slots) {
          const int64_t part = i / bundles, group = i % bundles * bundle_;
          sum_part(part, group, std::min(bundle_, window_.groups - group), x, dy, sums,
                   results.get() + (part * outputs + group * out_) * depth_,
                   dbias ? biases.get() + part * outputs + group * out_ : nullptr);
        }
      }
    });
    bool finite = true;
    for (int64_t i = 0; i < outputs * depth_; ++i) {
      double total = results.get()[i];
      for (int64_t part = 1; part < parts_; ++part) total += results.get()[part * outputs * depth_ + i];
      const A sum = A(total);
      finite = finite && std::isfinite(sum);
      dw[i] = from_float<T>(sum);
    }
    for (int64_t o = 0; dbias && o < outputs; ++o) {
      double sum = 0;
      for (int64_t part = 0; part < parts_; ++part) sum += biases.get()[part * outputs + o];
      dbias[o] = from_float<T>(A(sum));
    }
    return finite;
  }

 private:
  static Window gradient_window(const Window& window) {
    const int64_t h = window.h.out, w = window.w.out;
    return {window.batch, window.groups, window.out_channels, 1, {h, h, 1, 1, 1, 0}, {w, w, 1, 1, 1, 0}};
  }

  static int64_t rows_of(const Window& window, int64_t bundle) {
    const Planes one(window, 1);
    const int64_t row = bundle * (window.in_channels * one.row() + window.out_channels * one.pitch());
    const int64_t rows = std::max(kBytes / int64_t(sizeof(A)) / row - one.halo(), 4 + one.halo());
    const int64_t bands =
        std::max(ceil_div(window.h.out, rows),
                 std::min(ceil_div(8, window.batch * ceil_div(window.groups, bundle)), window.h.out / 8));
    return ceil_div(window.h.out, bands);
  }

  // One part's share of the units, for `groups` groups.
  void sum_part(int64_t part, int64_t group, int64_t groups, A* x, A* dy, A* sums, double* results,
                double* biases) const {
    const int64_t bands = ceil_div(window_.h.out, rows_), outputs = groups * out_;
    const int64_t x_image = bundle_ * in_ * planes_.channel(), plane = gradient_planes_.channel();
    const int64_t dy_image = bundle_ * out_ * plane;
    std::fill_n(sums, outputs * depth_ * L, A(0));
    if (biases) std::fill_n(biases, outputs, 0.0);
    for (int64_t u = units_ * part / parts_; u < units_ * (part + 1) / parts_; ++u) {
      const int64_t first = u / bands * images_, images = std::min(images_, window_.batch - first);
      const int64_t row = u % bands * rows_, rows = std::min(rows_, window_.h.out - row);
      const int64_t positions = planes_.positions(rows), vectors = ceil_div(positions, L);
      const int64_t chains = ceil_div(vectors, kVectors);
      for (int64_t n = 0; n < images; ++n) {
        planes_.pack(x_ + (first + n) * s_.n + group * in_ * s_.c, s_, groups * in_, row, rows, x + n * x_image);
        A* gradient = dy + n * dy_image;
        gradient_planes_.pack(dy_ + (first + n) * g_.n + group * out_ * g_.c, g_, outputs, row, rows, gradient);
        for (int64_t o = 0; o < outputs; ++o, gradient += plane) {
          if (vectors * L > positions) std::fill(gradient + positions, gradient + vectors * L, A(0));
          if (biases) biases[o] += plane_sum(gradient, vectors);
        }
      }
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t chain = 0; chain < chains; ++chain) {
          const int64_t v = vectors * chain / chains, count = vectors * (chain + 1) / chains - v;
          add_products(x + g * in_ * planes_.channel() + v * L, dy + g * out_ * plane + v * L,
                       {images, count, x_image, dy_image, plane}, sums + g * out_ * depth_ * L);
        }
    }
    for (int64_t i = 0; i < outputs * depth_; ++i) results[i] = add_lanes(load(sums + i * L));
  }

  void add_products(const A* x, const A* dy, const PlaneRuns& runs, A* sums) const {
    const int64_t most = kPlaneProducts[ceil_div(out_, tiles_) - 1], pieces = ceil_div(depth_, most);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t k = depth_ * piece / pieces, products = depth_ * (piece + 1) / pieces - k;
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        const int64_t o = out_ * tile / tiles_, outputs = out_ * (tile + 1) / tiles_ - o;
        plane_weight_tile_of<A>(outputs, products)(dy + o * runs.dy_plane, x, offsets_.data() + k, runs,
                                                   sums + (o * depth_ + k) * L, depth_ * L);
      }
    }
  }

  static double plane_sum(const A* plane, int64_t vectors) {
    VecDouble sum = {};
    for (int64_t v = 0; v < vectors; ++v) sum += fold(load(plane + v * L));
    return add_lanes(sum);
  }

  const T* dy_;
  Strides4 g_;
  const T* x_;
  Strides4 s_;
  Window window_;
  int64_t in_, out_, depth_, tiles_;  // per group
  int64_t bundle_, rows_;             // groups and output rows of a unit
  Planes planes_, gradient_planes_;
  int64_t images_, units_, parts_;  // images of a unit
  std::vector<int64_t> offsets_;    // of each product
};

}  // namespace pynn::cpu
