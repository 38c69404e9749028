// Depthwise correlations: forward and input gradient. A unit is one plane or one vector of channels of a band of rows;
// its padded rows are packed once. A tile computes a few output rows together, so that each packed vector is loaded
// once for all of them, times a few vectors of pixels. Every kernel row is summed on its own, tap after tap, and the
// rows are added in order; kernels of so few taps per row that this would only add roundings are one sum.
#include "conv2d_depthwise.h"

#include "conv2d_depthwise_pack.h"
#include "parallel.h"

namespace pynn::cpu {
namespace {

inline constexpr int kMostRows = kVectorRegisters == 32 ? 2 : 2, kMostVectors = kVectorRegisters == 32 ? 4 : 3;

// The filter of one channel, or of one vector of channels, and where it meets a packed row.
template <class A>
struct Filter {
  const A* weights;        // [member][kernel row][kernel column][channel]
  const int64_t* columns;  // of the kernel, in a packed row
  int64_t members, height, width, dilation;
  int64_t member_rows;  // packed rows of one member
  bool chained;         // one sum for all kernel rows
};

// sum[r] += one vector per pixel x, times the weights of one kernel column.
template <bool kPlanes, int N, int J, class A>
PYNN_HD void add_column(const A* x, const A* const (&filter)[N], int64_t b, const int64_t (&at)[J],
                        Vec<A> (&sum)[N][J]) {
  Vec<A> weight[N];
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r) {
    if constexpr (kPlanes)
      weight[r] = broadcast(filter[r][b]);
    else
      weight[r] = load(filter[r] + b * kLanes<A>);
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) {
    const Vec<A> value = load(x + at[j]);
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) sum[r][j] = fma(value, weight[r], sum[r][j]);
  }
}

// total[r] += packed row x kernel row (that of `weights` - r), for r in [kFirst, kLast). K: kernel columns, 0: any.
template <int K, int kFirst, int kLast, bool kPlanes, int R, int J, class A>
PYNN_HD void add_kernel_rows(const A* row, const A* weights, const Filter<A>& f, const int64_t (&at)[J],
                             Vec<A> (&total)[R][J]) {
  constexpr int N = kLast - kFirst;
  const bool chained = K == 0 && f.chained;
  const int64_t width = K ? K : f.width;
  Vec<A> sum[N][J] = {};
  if (chained)
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) sum[r][j] = total[kFirst + r][j];
  const A* filter[N];
  for (int r = 0; r < N; ++r) filter[r] = weights - (kFirst + r) * width * (kPlanes ? 1 : kLanes<A>);
  if constexpr (K > 0) {
#pragma GCC unroll 8
    for (int b = 0; b < K; ++b) add_column<kPlanes>(row + f.columns[b], filter, b, at, sum);
  } else {
    for (int64_t b = 0; b < width; ++b) add_column<kPlanes>(row + f.columns[b], filter, b, at, sum);
  }
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) total[kFirst + r][j] = chained ? sum[r][j] : total[kFirst + r][j] + sum[r][j];
}

// R output rows x J vectors. rows: the packed rows of the first output row; at: the vectors in a packed row; places:
// in an output row. bias: null, or a value for all lanes (planes) or for each lane. stream: past the caches.
template <int K, int R, int J, bool kPlanes, class A>
[[gnu::noinline]] void compute_tile(const A* const* rows, const Filter<A>& f, const int64_t* at, const A* bias, A* to,
                                    int64_t row_stride, const int64_t* places, bool stream) {
  constexpr int kTap = kPlanes ? 1 : kLanes<A>;
  int64_t from[J];
  for (int j = 0; j < J; ++j) from[j] = at[j];
  Vec<A> total[R][J] = {};
  const A* weights = f.weights;
  for (int64_t k = 0; k < f.members; ++k, rows += f.member_rows, weights += f.height * f.width * kTap) {
    // Packed row q meets kernel row q - r of output row r.
    const auto add = [&]<int first, int last>(int64_t q) {
      if (const A* row = rows[q * f.dilation])
        add_kernel_rows<K, first, last, kPlanes>(row, weights + q * f.width * kTap, f, from, total);
    };
    [&]<int... r>(std::integer_sequence<int, r...>) {
      (add.template operator()<0, r + 1>(r), ...);
      for (int64_t q = R - 1; q < f.height; ++q) add.template operator()<0, R>(q);
      (add.template operator()<r + 1, R>(f.height + r), ...);
    }(std::make_integer_sequence<int, R - 1>());
  }
  const auto biased = [=](Vec<A> v) {
    if (!bias) return v;
    if constexpr (kPlanes)
      return v + broadcast(*bias);
    else
      return v + load(bias);
  };
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      A* const place = to + r * row_stride + places[j];
      stream ? stream_compute(place, biased(total[r][j])) : store(place, biased(total[r][j]));
    }
}

// The tile for K kernel columns of each height and width.
template <bool kPlanes, class A>
using Tile = void (*)(const A* const*, const Filter<A>&, const int64_t*, const A*, A*, int64_t, const int64_t*, bool);
template <int K, bool kPlanes, class A>
Tile<kPlanes, A> tile_of(int64_t rows, int64_t vectors) {
  Tile<kPlanes, A> found = nullptr;
  const auto of_height = [&]<int R, int... J>(std::integer_sequence<int, J...>) {
    ((vectors == J + 1 ? void(found = compute_tile<K, R, J + 1, kPlanes, A>) : void()), ...);
  };
  [&]<int... R>(std::integer_sequence<int, R...>) {
    ((rows == R + 1 ? of_height.template operator()<R + 1>(std::make_integer_sequence<int, kMostVectors>()) : void()),
     ...);
  }(std::make_integer_sequence<int, kMostRows>());
  return found;
}

template <bool kPlanes, class A>
Tile<kPlanes, A> tile_of(int64_t kernel_width, int64_t rows, int64_t vectors) {
  switch (kernel_width) {
    case 3:
      return tile_of<3, kPlanes, A>(rows, vectors);
    case 5:
      return tile_of<5, kPlanes, A>(rows, vectors);
    case 7:
      return tile_of<7, kPlanes, A>(rows, vectors);
    default:
      return tile_of<0, kPlanes, A>(rows, vectors);
  }
}

template <class T, class E, bool kPlanes>
class DepthwiseCorrelation {
  using A = accumulate_t<T>;
  static constexpr int64_t L = kLanes<A>, kBlock = kPlanes ? 1 : L;
  static constexpr int64_t kBandBytes = 128 << 10;  // packed rows of a unit

 public:
  DepthwiseCorrelation(const T* x, const Strides4& s, const Window& window, const T* w, const WeightView& view,
                       const Epilogue<E>& epilogue)
      : window_(window),
        input_(x, s, window),
        epilogue_(epilogue),
        channels_(window.groups * window.out_channels),
        inputs_(kPlanes ? window.groups : ceil_div(channels_, L)),
        filter_size_(window.depth() * kBlock),
        weights_(ceil_div(channels_, kBlock) * filter_size_) {
    pack_weights(w, view);
    for (int64_t b = 0; b < window.w.kernel; ++b) columns_.push_back(input_.column(b));
    const int64_t width = window.w.out, last = std::max<int64_t>(width - L, 0);
    for (int64_t p = 0; p < (kPlanes ? ceil_div(width, L) : width); ++p) {
      at_.push_back(kPlanes ? std::min(p * L, last) : p * input_.step());
      places_.push_back(kPlanes ? at_.back() : p * L);
      direct_places_.push_back(kPlanes ? at_.back() : p * epilogue.s.w);
    }
    const bool plain = !epilogue.residual && !epilogue.pre && epilogue.activation == Activation::none;
    direct_ = plain && sizeof(E) == sizeof(A) && (kPlanes ? epilogue.s.w == 1 && width >= L : epilogue.s.c == 1);
    stream_ = direct_ && !kPlanes && streams(epilogue);
    together_ = window.h.stride == 1 && window.h.dilation == 1 ? std::clamp<int64_t>(window.h.kernel, 1, kMostRows) : 1;
    cut_bands();
  }

  void run() const {
    const int64_t work = window_.batch * inputs_ * bands_, slots = std::min<int64_t>(work, thread_count());
    const int64_t rows = window_.in_channels * reach(window_.h, rows_);
    const int64_t input_size = rows * input_.pitch() + L;
    const int64_t output_size = output_rows() * (kPlanes ? round_up(window_.w.out, L) : window_.w.out * L);
    const Buffer<A> scratch(slots * (input_size + output_size));
    const Buffer<const A*> lists(slots * std::max<int64_t>(rows, 1));
    parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        A* packed = scratch.get() + slot * (input_size + output_size);
        std::fill_n(packed, input_size, A(0));
        for (int64_t i = slot; i < work; i += slots)
          run_unit(i / bands_ / inputs_, kPlanes ? i / bands_ % inputs_ : i % inputs_,
                   (kPlanes ? i % bands_ : i / inputs_ % bands_) * rows_, packed, lists.get() + slot * rows,
                   packed + input_size);
      }
      if (stream_) stream_end();
    });
  }

 private:
  // Whether whole lines are written, of a result that would not stay in the caches.
  bool streams(const Epilogue<E>& epilogue) const {
    const Strides4& s = epilogue.s;
    return window_.batch * channels_ * window_.h.out * window_.w.out * int64_t(sizeof(E)) >= kStreamBytes &&
           (s.n | s.h | s.w) % L == 0 && reinterpret_cast<uintptr_t>(epilogue.y) % sizeof(Vec<A>) == 0;
  }

  void pack_weights(const T* w, const WeightView& view) {
    const int64_t kw = window_.w.kernel, taps = window_.taps(), outputs = window_.out_channels;
    if (channels_ % kBlock) std::fill_n(weights_.get() + channels_ / kBlock * filter_size_, filter_size_, A(0));
    for (int64_t o = 0; o < channels_; ++o) {
      const T* from = w + o / outputs * view.group + o % outputs * view.o;
      A* to = weights_.get() + o / kBlock * filter_size_ + o % kBlock;
      for (int64_t k = 0; k < window_.in_channels; ++k)
        for (int64_t t = 0; t < taps; ++t, to += kBlock)
          *to = to_float(from[k * view.c + t / kw * view.a + t % kw * view.b]);
    }
  }

  // Bands of rows whose packed input stays in the second-level cache, and a few units for every thread.
  void cut_bands() {
    const int64_t row_bytes = window_.in_channels * input_.pitch() * int64_t(sizeof(A)), out = window_.h.out;
    const int64_t overlap = reach(window_.h, 1);
    const int64_t fit = std::max(kBandBytes / std::max<int64_t>(row_bytes, 1) - overlap, 2 * overlap);
    bands_ = ceil_div(out * window_.h.stride, std::max<int64_t>(fit, 1));
    bands_ = std::max(bands_, std::min(ceil_div(8, window_.batch * inputs_), out / 8));
    rows_ = round_up(ceil_div(out, std::clamp<int64_t>(bands_, 1, out)), together_);
    bands_ = ceil_div(out, rows_);
  }

  // Rows of sums between two calls of the epilogue; many where it has to turn them.
  int64_t output_rows() const { return !kPlanes && epilogue_.s.c != 1 ? rows_ : together_; }

  void run_unit(int64_t image, int64_t input, int64_t first, A* packed, const A** list, A* sums) const {
    const int64_t rows = std::min(rows_, window_.h.out - first), needed = reach(window_.h, rows);
    const int64_t output = input * (kPlanes ? window_.out_channels : L);
    for (int64_t k = 0; k < window_.in_channels; ++k)
      input_.pack(image, output, k, first * window_.h.stride, needed, packed + k * needed * input_.pitch(),
                  list + k * needed);
    for (int64_t o = output; o < output + (kPlanes ? window_.out_channels : 1); ++o)
      run_output(image, o, first, rows, list, needed, sums);
  }

  // All rows of one output channel, or of one vector of them.
  void run_output(int64_t image, int64_t output, int64_t first, int64_t rows, const A* const* list, int64_t needed,
                  A* sums) const {
    const Filter<A> filter{weights_.get() + output / kBlock * filter_size_,
                           columns_.data(),
                           window_.in_channels,
                           window_.h.kernel,
                           window_.w.kernel,
                           window_.h.dilation,
                           needed,
                           window_.w.kernel == 1 || (window_.w.kernel == 2 && window_.h.kernel <= 2)};
    const int64_t vectors = int64_t(at_.size()), tiles = ceil_div(vectors, kMostVectors);
    const int64_t pitch = (kPlanes ? round_up(window_.w.out, L) : window_.w.out * L);
    const Strides4& s = epilogue_.s;
    const bool direct = direct_ && (kPlanes || channels_ - output >= L);
    const A* bias = direct && epilogue_.bias ? epilogue_.bias + output : nullptr;
    const std::vector<int64_t>& places = direct ? direct_places_ : places_;
    const int64_t steps = ceil_div(rows, together_);
    for (int64_t step = 0, waiting = 0; step < steps; ++step) {
      const int64_t row = rows * step / steps, count = rows * (step + 1) / steps - row;
      A* to = sums + waiting * pitch;
      if constexpr (sizeof(E) == sizeof(A))
        if (direct) to = epilogue_.y + image * s.n + output * s.c + (first + row) * s.h;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t v = vectors * tile / tiles, width = vectors * (tile + 1) / tiles - v;
        tile_of<kPlanes, A>(window_.w.kernel, count, width)(list + row * window_.h.stride, filter, at_.data() + v, bias,
                                                            to, direct ? s.h : pitch, places.data() + v,
                                                            direct && stream_);
      }
      waiting += count;
      if (!direct && (waiting + together_ > output_rows() || step + 1 == steps)) {
        finish(image, output, first + row + count - waiting, waiting, sums, pitch);
        waiting = 0;
      }
    }
  }

  void finish(int64_t image, int64_t output, int64_t row, int64_t rows, A* sums, int64_t pitch) const {
    const Strides4 &s = epilogue_.s, &r = epilogue_.r;
    if constexpr (kPlanes) {
      for (int64_t i = row; i < row + rows; ++i, sums += pitch)
        epilogue_.line(sums, window_.w.out, epilogue_.bias ? epilogue_.bias + output : nullptr, 0,
                       image * s.n + output * s.c + i * s.h, s.w, image * r.n + output * r.c + i * r.h, r.w);
    } else {
      Unit unit(image, row);
      unit.rows = rows;
      epilogue_(Panel<A>{unit, output, std::min(L, channels_ - output), sums, L});
    }
  }

  Window window_;
  PaddedRows<T, kPlanes> input_;
  Epilogue<E> epilogue_;
  int64_t channels_, inputs_, filter_size_;
  Buffer<A> weights_;
  std::vector<int64_t> columns_, at_, places_, direct_places_;
  bool direct_, stream_;
  int64_t together_, rows_, bands_;
};

}  // namespace

template <class T, class E>
void correlate_depthwise(const T* x, const Strides4& s, const Window& window, const T* w, const WeightView& view,
                         const Epilogue<E>& epilogue) {
  constexpr int64_t L = kLanes<accumulate_t<T>>;
  const int64_t channels = window.groups * window.out_channels;
  const bool planes = channels < L || (s.w == 1 && epilogue.s.c != 1 && 2 * window.w.out >= 3 * L);
  if (planes)
    DepthwiseCorrelation<T, E, true>(x, s, window, w, view, epilogue).run();
  else
    DepthwiseCorrelation<T, E, false>(x, s, window, w, view, epilogue).run();
}

#define INSTANTIATE(T, E)                                                                                        \
  template void correlate_depthwise<T, E>(const T*, const Strides4&, const Window&, const T*, const WeightView&, \
                                          const Epilogue<E>&);
INSTANTIATE(double, double)
INSTANTIATE(float, float)
INSTANTIATE(Half, Half)
INSTANTIATE(Half, float)
INSTANTIATE(BFloat16, BFloat16)
INSTANTIATE(BFloat16, float)

}  // namespace pynn::cpu
