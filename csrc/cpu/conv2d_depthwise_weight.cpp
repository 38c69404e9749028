// Weight and bias gradient of a depthwise convolution. The pixels of a row are dealt to as many classes as a vector has
// lanes (pixel j to class j mod lanes), and every class is summed on its own over a chunk of rows, then over the chunks
// of a part; then the classes are added pairwise. Where lanes are pixels of a plane a vector holds all classes; where
// they are channels the classes come one after the other: the order of every sum, and so its bits, are the same. Two
// kernel rows are summed together, so that a vector of x is loaded once for both. Images are dealt to a fixed number of
// parts.
#include "conv2d_depthwise.h"
#include "conv2d_depthwise_pack.h"
#include "parallel.h"

namespace pynn::cpu {
namespace {

inline constexpr int kMostTaps = kVectorRegisters == 32 ? 8 : 4;
inline constexpr int kTogether = kVectorRegisters == 32 ? 2 : 1;  // kernel rows

typedef int64_t VecMask __attribute__((vector_size(kVectorBytes)));

// All bits of the first `count` lanes.
template <class A>
VecMask first_lanes(int64_t count) {
  unsigned char bytes[kVectorBytes] = {};
  std::memset(bytes, 0xff, size_t(count) * sizeof(A));
  VecMask mask;
  std::memcpy(&mask, bytes, sizeof(mask));
  return mask;
}

// What one chunk sums: `rows` output rows of `vectors` vectors each, the last one of a plane partly.
template <class A>
struct Chunk {
  const A* const* x;  // packed rows of the first output row
  const A* dy;
  int64_t rows, vectors, dy_pitch, dy_step, x_step, stride, dilation;
  bool masked;  // the lanes of the last vector are cut by mask
  VecMask mask;
};

// sum[r][b] += one vector of x shifted by kernel column b, times that of output row i - r, for kernel rows r in
// [kFirst, kLast); dy is output row i's.
template <int kFirst, int kLast, bool kMasked, int R, int B, class A>
PYNN_HD void add_vector(const Chunk<A>& chunk, const A* x, const A* dy, const int64_t (&shift)[B],
                        Vec<A> (&sum)[R][B]) {
  constexpr int N = kLast - kFirst;
  Vec<A> gradient[N];
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r) gradient[r] = load(dy - (kFirst + r) * chunk.dy_pitch);
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    Vec<A> value = load(x + shift[b]);
    if (kMasked) value = (Vec<A>)((VecMask)value & chunk.mask);
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) sum[kFirst + r][b] = fma(value, gradient[r], sum[kFirst + r][b]);
  }
}

// A row of x, null where it is all zeros, with the output rows that meet it.
template <int kFirst, int kLast, int R, int B, class A>
PYNN_HD void add_row(const Chunk<A>& chunk, const A* x, const A* dy, const int64_t (&shift)[B], Vec<A> (&sum)[R][B]) {
  if (!x) return;
  for (int64_t t = 0; t < chunk.vectors - chunk.masked; ++t, x += chunk.x_step, dy += chunk.dy_step)
    add_vector<kFirst, kLast, false>(chunk, x, dy, shift, sum);
  if (chunk.masked) add_vector<kFirst, kLast, true>(chunk, x, dy, shift, sum);
}

// sums[a][b] += x shifted by kernel row a and column b, times dy, for R kernel rows from a on and B columns.
template <int R, int B, class A>
[[gnu::noinline]] void add_taps(const Chunk<A>& chunk, int64_t a, const int64_t* columns, A* sums, int64_t row_size,
                                int64_t tap_size) {
  Vec<A> sum[R][B] = {};
  int64_t shift[B];
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) shift[b] = columns[b];
  const A* const* rows = chunk.x + a * chunk.dilation;
  const int64_t step = R == 1 ? chunk.stride : 1;
  const A* dy = chunk.dy;
  int64_t i = R - 1;
  if constexpr (R == 2) add_row<0, 1>(chunk, rows[0], dy, shift, sum);
  for (; i < chunk.rows; ++i) add_row<0, R>(chunk, rows[i * step], dy + i * chunk.dy_pitch, shift, sum);
  if constexpr (R == 2) add_row<1, R>(chunk, rows[i], dy + i * chunk.dy_pitch, shift, sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      A* to = sums + r * row_size + b * tap_size;
      store(to, load(to) + sum[r][b]);
    }
}

// add_taps for `rows` kernel rows and `taps` columns.
template <class A>
void add_taps(int64_t rows, int64_t taps, const Chunk<A>& chunk, int64_t a, const int64_t* columns, A* sums,
              int64_t row_size, int64_t tap_size) {
  const auto of_height = [&]<int R, int... B>(std::integer_sequence<int, B...>) {
    ((taps == B + 1 ? add_taps<R, B + 1>(chunk, a, columns, sums, row_size, tap_size) : void()), ...);
  };
  [&]<int... R>(std::integer_sequence<int, R...>) {
    ((rows == R + 1 ? of_height.template operator()<R + 1>(std::make_integer_sequence<int, kMostTaps>()) : void()),
     ...);
  }(std::make_integer_sequence<int, kTogether>());
}

template <class T, bool kPlanes>
class DepthwiseWeightGradient {
  using A = accumulate_t<T>;
  static constexpr int64_t L = kLanes<A>, kBlock = kPlanes ? 1 : L;
  static constexpr int64_t kBandBytes = 256 << 10;  // packed rows of x

 public:
  DepthwiseWeightGradient(const T* dy, const Strides4& g, const T* x, const Strides4& s, const Window& window)
      : window_(window),
        channels_(window.groups * window.out_channels),
        blocks_(ceil_div(channels_, kBlock)),
        taps_(window.taps()),
        classes_(std::min(L, window.w.out)),
        x_(x, s, window),
        dy_(dy, g, gradient_window(window)),
        gradient_(dy),
        g_(g) {
    for (int64_t b = 0; b < window.w.kernel; ++b) columns_.push_back(x_.column(b));
    // Chunks, bands and parts are of the same size in both layouts.
    const int64_t out = window.h.out, per_row = ceil_div(window.w.out, L);
    // A class sums its terms in chunks of about the root of their number, where rounding errors within and between
    // chunks balance.
    const double terms = double(window.batch) * double(out) * double(per_row);
    chunk_rows_ = std::clamp<int64_t>(std::clamp<int64_t>(int64_t(std::sqrt(2 * terms)), 4, 32) / per_row, 1, out);
    const int64_t row_bytes = reach(window.w, window.w.out) * L * int64_t(sizeof(A)) * window.h.stride;
    const int64_t chunks = std::max<int64_t>(1, kBandBytes / std::max<int64_t>(1, row_bytes * chunk_rows_));
    band_rows_ = std::min(chunks * chunk_rows_, out);
    bands_ = ceil_div(out, band_rows_);
    parts_ = std::min<int64_t>(8, window.batch * bands_);
  }

  void run(T* dw, T* dbias) const {
    const int64_t work = blocks_ * parts_, slots = std::min<int64_t>(work, thread_count());
    const int64_t x_rows = reach(window_.h, band_rows_);
    const int64_t x_size = x_rows * x_.pitch() + L, dy_size = band_rows_ * dy_.pitch() + L;
    const int64_t sums_size = round_up((kPlanes ? 1 : classes_) * (taps_ + 2) * L + L * L, 16),
                  size = x_size + dy_size + sums_size;
    // Of a block and part: [tap][channel], then the sums of dy and their errors.
    const int64_t bias_at = round_up(taps_, L) * kBlock, result = bias_at + 2 * kBlock;
    const Buffer<A> scratch(slots * size), results(parts_ * blocks_ * result);
    const Buffer<const A*> lists(slots * (x_rows + band_rows_));
    parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        A* at = scratch.get() + slot * size;
        std::fill_n(at, x_size + dy_size, A(0));
        for (int64_t i = slot; i < work; i += slots)
          sum_part(i / parts_ * kBlock, i % parts_, at, at + x_size, at + x_size + dy_size,
                   lists.get() + slot * (x_rows + band_rows_), results.get() + i * result, dbias != nullptr);
      }
    });
    for (int64_t o = 0; o < channels_; ++o) {
      const A* from = results.get() + o / kBlock * parts_ * result + o % kBlock;
      for (int64_t tap = 0; tap < taps_; ++tap) {
        A sum = from[tap * kBlock];
        for (int64_t part = 1; part < parts_; ++part) sum += from[part * result + tap * kBlock];
        dw[o * taps_ + tap] = from_float<T>(sum);
      }
      if (!dbias) continue;
      A sum, error;
      add_compensated(from + bias_at, parts_, result, kBlock, sum, error);
      dbias[o] = from_float<T>(std::isfinite(sum) ? sum + error : sum);  // the error of an infinite sum is NaN
    }
  }

 private:
  // dy as an operand of its own: one output channel for each of its channels, no kernel.
  static Window gradient_window(const Window& w) {
    return {w.batch, w.groups * w.out_channels, 1, 1, {w.h.out, w.h.out, 1, 1, 1, 0}, {w.w.out, w.w.out, 1, 1, 1, 0}};
  }

  void sum_part(int64_t channel, int64_t part, A* x, A* dy, A* sums, const A** x_rows, A* results,
                bool with_bias) const {
    const int64_t classes = kPlanes ? 1 : classes_, taps = taps_, class_size = (taps + 2) * L;
    const A** dy_rows = x_rows + reach(window_.h, band_rows_);
    const bool in_place = !kPlanes && sizeof(T) == sizeof(A) && g_.c == 1 && channels_ - channel >= L;
    std::fill_n(sums, classes * class_size, A(0));
    const int64_t units = window_.batch * bands_;
    for (int64_t u = units * part / parts_; u < units * (part + 1) / parts_; ++u) {
      const int64_t image = u / bands_, first = u % bands_ * band_rows_;
      const int64_t rows = std::min(band_rows_, window_.h.out - first);
      x_.pack(image, channel, 0, first * window_.h.stride, reach(window_.h, rows), x, x_rows);
      const A* gradient = dy;
      if (in_place) {
        if constexpr (sizeof(T) == sizeof(A)) gradient = gradient_ + image * g_.n + channel + first * g_.h;
      } else {
        dy_.pack(image, channel, 0, first, rows, dy, dy_rows);
      }
      const int64_t pitch = in_place ? g_.h : dy_.pitch(), step = in_place ? g_.w : dy_.step();
      for (int64_t i = 0; i < rows; i += chunk_rows_)
        for (int64_t l = 0; l < classes; ++l)
          add_chunk(l, std::min(chunk_rows_, rows - i), x_rows + i * window_.h.stride, gradient + i * pitch, pitch,
                    step, sums + l * class_size, with_bias);
    }
    add_classes(sums, class_size, results);
    const A* bias = sums + taps * L;
    A* to = results + round_up(taps, L) * kBlock;
    for (int64_t c = 0; c < kBlock; ++c)
      add_compensated(bias + c, classes_, kPlanes ? 1 : class_size, L, to[c], to[kBlock + c]);
  }

  // results[tap][channel]: the classes' sums, added pairwise.
  void add_classes(const A* sums, int64_t class_size, A* results) const {
    for (int64_t tap = 0; tap < taps_; tap += kPlanes ? L : 1) {
      Vec<A> of_class[L] = {};
      for (int64_t l = 0; l < (kPlanes ? L : classes_); ++l)
        of_class[l] = load(sums + tap * L + l * (kPlanes ? L : class_size));
      if constexpr (kPlanes) transpose<A>(of_class);  // from a vector for each tap
      for (int64_t half = L / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) of_class[l] += of_class[l + half];
      store(results + tap * kBlock, of_class[0]);
    }
  }

  // One class, or all of them, of a chunk of rows. sums: [tap][lane], then the sum of dy and its error.
  void add_chunk(int64_t l, int64_t rows, const A* const* x_rows, const A* dy, int64_t dy_pitch, int64_t dy_step,
                 A* sums, bool with_bias) const {
    const int64_t width = window_.w.out, kw = window_.w.kernel, kh = window_.h.kernel;
    const Chunk<A> chunk{x_rows,
                         dy + l * dy_step,
                         rows,
                         ceil_div(width - l, L),
                         dy_pitch,
                         L * dy_step,
                         L * x_.step(),
                         window_.h.stride,
                         window_.h.dilation,
                         kPlanes && width % L,
                         first_lanes<A>(width % L)};
    int64_t columns[kMostTaps];
    const int64_t pieces = ceil_div(kw, kMostTaps);
    const bool sliding = window_.h.stride == 1 && window_.h.dilation == 1;
    const int64_t steps = ceil_div(kh, sliding ? std::min<int64_t>(kTogether, rows) : 1);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t b = kw * piece / pieces, count = kw * (piece + 1) / pieces - b;
      for (int64_t i = 0; i < count; ++i) columns[i] = columns_[b + i] + l * x_.step();
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t a = kh * step / steps, together = kh * (step + 1) / steps - a;
        add_taps(together, count, chunk, a, columns, sums + (a * kw + b) * L, kw * L, L);
      }
    }
    if (!with_bias) return;
    Vec<A> total = load(sums + taps_ * L), error = load(sums + (taps_ + 1) * L);
    for (int64_t i = 0; i < rows; ++i) {
      const A* row = chunk.dy + i * dy_pitch;
      Vec<A> value = load(row);
      for (int64_t t = 1; t < chunk.vectors; ++t) value += load(row + t * chunk.dy_step);
      const Vec<A> next = total + value, taken = next - total;
      error += (total - (next - taken)) + (value - taken);
      total = next;
    }
    store(sums + taps_ * L, total);
    store(sums + (taps_ + 1) * L, error);
  }

  // Adds `count` sums that lie `step` apart, each with its error error_step behind it.
  static void add_compensated(const A* sums, int64_t count, int64_t step, int64_t error_step, A& sum, A& error) {
    sum = sums[0];
    error = sums[error_step];
    for (int64_t i = 1; i < count; ++i) {
      const A value = sums[i * step], next = sum + value, taken = next - sum;
      error += (sum - (next - taken)) + (value - taken);
      error += sums[i * step + error_step];
      sum = next;
    }
  }

  Window window_;
  int64_t channels_, blocks_, taps_, classes_;
  PaddedRows<T, kPlanes> x_, dy_;
  const T* gradient_;
  Strides4 g_;
  std::vector<int64_t> columns_;
  int64_t chunk_rows_, band_rows_, bands_, parts_;
};

}  // namespace

template <class T>
void depthwise_weight_gradient(const T* dy, const Strides4& g, const T* x, const Strides4& s, const Window& window,
                               T* dw, T* dbias) {
  const int64_t L = kLanes<accumulate_t<T>>, channels = window.groups * window.out_channels;
  if (channels < L || (s.w == 1 && s.c != 1 && g.c != 1 && 2 * window.w.out >= 3 * L))
    DepthwiseWeightGradient<T, true>(dy, g, x, s, window).run(dw, dbias);
  else
    DepthwiseWeightGradient<T, false>(dy, g, x, s, window).run(dw, dbias);
}

#define INSTANTIATE(T) \
  template void depthwise_weight_gradient(const T*, const Strides4&, const T*, const Strides4&, const Window&, T*, T*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)

}  // namespace pynn::cpu
