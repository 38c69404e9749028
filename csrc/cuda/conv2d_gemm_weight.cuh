// The weight gradient as a GEMM: output channels times (filter tap, input channel), summed over the pixels of the
// batch. A block sums a span of pixels for one tile; the spans depend on the shape alone, and their sums are added in
// order by a second kernel. A thread copies one pack of channels of each of its pixels, so it keeps one filter tap
// throughout.
#pragma once
#include "conv2d_gemm.cuh"

namespace pynn::cuda {
namespace {
namespace gemm {

template <class T>
struct WeightGradient {
  Image<T> left, right;  // grad_output and input, from the sample of the first pixel on
  Divider out_height, out_width;
  Axis h, w;
  PaddingMode padding_mode;
  int rows, columns, column_tiles;  // of one group: output channels, and taps times channels of `right`
  int first, end, span;             // pixels
  int chunk;                        // steps of the sum that make a chunk
};

template <class Tile>
struct WeightLoader {
  using T = typename Tile::Element;
  // How an operand of `width` columns is dealt out to the threads.
  template <int width>
  struct Deal {
    static constexpr int kPacks = width / kPackOf<T>, kStep = Tile::kThreads / kPacks, kCount = Tile::kDepth / kStep;
    int pack = threadIdx.x % kPacks, k = threadIdx.x / kPacks;
    __device__ __forceinline__ int to(int r) const { return offset_across<T, width>(k + r * kStep, pack); }
  };
  using Left = Deal<Tile::kRows>;
  using Right = Deal<Tile::kColumns>;
  static constexpr int kLeftBytes = Tile::kRows * Tile::kDepth * int(sizeof(T));

  const WeightGradient<T>& p;
  Left deal_left;
  Right deal_right;
  const T *left, *right;  // null where this thread's pack does not exist
  int tap_h, tap_w;       // position of the tap, from the pixel's
  int pixel, end;

  __device__ __forceinline__ WeightLoader(const WeightGradient<T>& p, int first_row, int first_column, int group,
                                          int begin, int end)
      : p(p), left(nullptr), right(nullptr), pixel(begin), end(end) {
    const int row = first_row + deal_left.pack * kPackOf<T>, column = first_column + deal_right.pack * kPackOf<T>;
    if (row < p.left.channels) left = p.left.data + int64_t(group) * p.left.group + row;
    const int tap = column / p.right.channels;
    if (column < p.columns) right = p.right.data + int64_t(group) * p.right.group + (column - tap * p.right.channels);
    const int i = tap / int(p.w.kernel), j = tap - i * int(p.w.kernel);
    tap_h = i * int(p.h.dilation) - int(p.h.pad), tap_w = j * int(p.w.dilation) - int(p.w.pad);
  }

  __device__ __forceinline__ Pixel pixel_at(int at) const {
    uint32_t i, j;
    const uint32_t line = p.out_width.divide(uint32_t(at), j), n = p.out_height.divide(line, i);
    return {int(n), int(i), int(j)};
  }

  // Starts the copies of the next block of the sum to a stage.
  __device__ __forceinline__ void copy(unsigned char* stage) {
#pragma unroll
    for (int r = 0; r < Left::kCount; ++r) {
      const int at = pixel + deal_left.k + r * Left::kStep;
      const Pixel out = pixel_at(at);
      const bool exists = left && at < end;
      const auto offset = out.n * p.left.n + out.h * p.left.h + out.w * p.left.w;
      cp_async<16>(stage + deal_left.to(r), exists ? left + offset : p.left.data, exists ? 16 : 0);
    }
#pragma unroll
    for (int r = 0; r < Right::kCount; ++r) {
      const int at = pixel + deal_right.k + r * Right::kStep;
      const Pixel out = pixel_at(at);
      int h = out.h * int(p.h.stride) + tap_h, w = out.w * int(p.w.stride) + tap_w;
      if (p.padding_mode != PaddingMode::zeros)
        h = int(source_of(h, p.h.in, p.padding_mode)), w = int(source_of(w, p.w.in, p.padding_mode));
      const bool exists = right && at < end && unsigned(h) < unsigned(p.h.in) && unsigned(w) < unsigned(p.w.in);
      const auto offset = out.n * p.right.n + h * p.right.h + w * p.right.w;
      cp_async<16>(stage + kLeftBytes + deal_right.to(r), exists ? right + offset : p.right.data, exists ? 16 : 0);
    }
    pixel += Tile::kDepth;
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerProcessor)
    weight_gradient_kernel(const __grid_constant__ WeightGradient<typename Tile::Element> p,
                           const __grid_constant__ Target<float> to) {
  DYNAMIC_SHARED(unsigned char, shared);
  const int row_tile = int(blockIdx.x) / p.column_tiles, group = int(blockIdx.y);
  const int first_row = row_tile * Tile::kRows;
  const int first_column = (int(blockIdx.x) - row_tile * p.column_tiles) * Tile::kColumns;
  const int begin = p.first + int(blockIdx.z) * p.span, end = min(begin + p.span, p.end);

  Tile tile(p.chunk);
  WeightLoader<Tile> loader(p, first_row, first_column, group, begin, end);
  run_pipeline(tile, loader, (end - begin + Tile::kDepth - 1) / Tile::kDepth, shared, WeightLoader<Tile>::kLeftBytes);
  store_tile(tile, to, shared, p.rows - first_row, first_column, p.columns - first_column,
             [&](int r) { return Pixel{group * p.rows + first_row + r, 0, 0}; });
}

// dw (output channel, channel, tap) from the sums (span, output channel, tap, channel rounded up to packs).
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_spans_kernel(T* dw, const float* sums, int64_t spans, int channels, int padded, int taps, int64_t count) {
  int64_t rest = thread_index();
  if (rest >= count) return;
  const int channel = int(rest % channels);
  rest /= channels;
  const int tap = int(rest % taps);
  const int64_t row = rest / taps, rows = count / channels / taps;
  const float* from = sums + (row * taps + tap) * padded + channel;
  double sum = 0;
  for (int64_t s = 0; s < spans; ++s) sum += double(from[s * rows * taps * padded]);
  dw[(row * channels + channel) * taps + tap] = from_float<T>(float(sum));
}

// What follows from the shape.
template <class T>
struct WeightPlan {
  static constexpr int64_t kDepth = kRowBytes / sizeof(T), kMostSums = int64_t(128) << 20;

  int64_t rows, padded_rows, channels, padded, columns, pixels, span, spans;
  bool large;

  explicit WeightPlan(const Conv2dShape& s)
      : rows(s.out_channels / s.groups),
        padded_rows(round_up(rows, kPackOf<T>)),
        channels(s.in_channels / s.groups),
        padded(round_up(channels, kPackOf<T>)),
        columns(s.kernel_height * s.kernel_width * padded),
        pixels(s.batch * s.out_height * s.out_width),
        large(rows > 64 && (sizeof(T) == 4 ? !s.allow_tf32 : columns > 64)) {
    const int64_t tile_rows = large ? 128 : 64, tile_columns = large && sizeof(T) == 2 ? 128 : 64;
    const int64_t tiles = ceil_div(rows, tile_rows) * ceil_div(columns, tile_columns) * s.groups;
    // Enough blocks for a large GPU, but spans that are worth a block; short enough for the accuracy of their fp32
    // sums.
    const bool fma = sizeof(T) == 4 && !s.allow_tf32;
    const int64_t least = fma ? 16 : 256, most = fma ? 1024 : 8192;
    int64_t count = std::min(ceil_div(2 * kEnoughBlocks, tiles), ceil_div(pixels, least));
    count = std::max(count, ceil_div(pixels, most));
    count = std::min(count, kMostSums / (s.out_channels * columns * int64_t(sizeof(float))));
    count = std::max({count, int64_t(1), ceil_div(pixels, kMostRows / 2)});
    span = round_up(ceil_div(pixels, count), kDepth);
    spans = ceil_div(pixels, span);
  }

  int64_t left_size(const Conv2dShape& s) const { return s.out_height * s.out_width * s.groups * padded_rows; }
  int64_t right_size(const Conv2dShape& s) const { return s.in_height * s.in_width * s.groups * padded; }
  int64_t sums_size(const Conv2dShape& s) const { return spans * s.out_channels * columns; }

  // Spans of one launch, and the most images they touch.
  int64_t slice(const Conv2dShape& s, bool copying) const {
    const int64_t image = s.out_height * s.out_width;
    const int64_t bytes = (left_size(s) + right_size(s)) * int64_t(sizeof(T));
    int64_t most = std::min(spans, int64_t(32768));
    most = std::min(most, (kMostRows - image) / span);
    if (copying) most = std::min(most, std::max<int64_t>(kCopyBytes / bytes - 1, 1) * image / span);
    return std::max<int64_t>(most, 1);
  }
  int64_t images(const Conv2dShape& s, int64_t slice) const {
    return std::min(s.batch, ceil_div(slice * span, s.out_height * s.out_width) + 1);
  }
};

template <class T>
int64_t weight_gradient_scratch(const Conv2dShape& s) {
  const WeightPlan<T> p(s);
  const int64_t images = p.images(s, p.slice(s, true));
  Scratch scratch(nullptr);
  scratch.take<float>(p.sums_size(s));
  scratch.take<T>(images * p.left_size(s));
  scratch.take<T>(images * p.right_size(s));
  return scratch.used();
}

template <class T>
void weight_gradient(T* dw, const T* dy, const Strides4& dy_strides, const T* x, const Strides4& x_strides,
                     const Conv2dShape& s, void* memory, void* stream) {
  const WeightPlan<T> p(s);
  const Strides4 left = used_strides(dy_strides, s.batch, s.out_height, s.out_width);
  const Strides4 right = used_strides(x_strides, s.batch, s.in_height, s.in_width);
  const bool copy_left = !in_packs(dy, left, p.rows), copy_right = !in_packs(x, right, p.channels);
  const int64_t slice = p.slice(s, copy_left || copy_right), image = s.out_height * s.out_width;
  const int64_t images = copy_left || copy_right ? p.images(s, slice) : 0;
  Scratch scratch(memory);
  float* const sums = scratch.take<float>(p.sums_size(s));
  T* const left_copy = scratch.take<T>(copy_left ? images * p.left_size(s) : 0);
  T* const right_copy = scratch.take<T>(copy_right ? images * p.right_size(s) : 0);

  for (int64_t first_span = 0; first_span < p.spans; first_span += slice) {
    const int64_t spans = std::min(slice, p.spans - first_span);
    const int64_t begin = first_span * p.span, end = std::min(begin + spans * p.span, p.pixels);
    const int64_t n = begin / image, touched = ceil_div(end, image) - n;
    WeightGradient<T> g{{dy + n * left.n, left.n, left.h, left.w, int(p.rows), int(p.rows)},
                        {x + n * right.n, right.n, right.h, right.w, int(p.channels), int(p.channels)},
                        Divider(uint32_t(s.out_height)),
                        Divider(uint32_t(s.out_width)),
                        rows_of(s),
                        columns_of(s),
                        s.padding_mode,
                        int(p.rows),
                        int(p.columns),
                        0,
                        int(begin - n * image),
                        int(end - n * image),
                        int(p.span),
                        sizeof(T) == 4 && !s.allow_tf32 ? int(short_chunk(p.span)) : 1 << 30};
    if (copy_left) {
      copy_images(left_copy, g.left.data, left, p.rows, p.padded_rows, s.groups, s.out_height, s.out_width, touched,
                  stream);
      g.left = {left_copy,          p.left_size(s),    s.out_width * s.groups * p.padded_rows, s.groups * p.padded_rows,
                int(p.padded_rows), int(p.padded_rows)};
    }
    if (copy_right) {
      copy_images(right_copy, g.right.data, right, p.channels, p.padded, s.groups, s.in_height, s.in_width, touched,
                  stream);
      g.right = {right_copy,          p.right_size(s), s.in_width * s.groups * p.padded,
                 s.groups * p.padded, int(p.padded),   int(p.padded)};
    }
    const int64_t part = s.out_channels * p.columns;
    const Target<float> to{{}, false, 1, 1, int(p.columns), sums + first_span * part, part};
    const auto run = [&]<class Tile>(Tile*) {
      g.column_tiles = int(ceil_div(p.columns, Tile::kColumns));
      const dim3 grid(unsigned(ceil_div(p.rows, Tile::kRows) * g.column_tiles), unsigned(s.groups), unsigned(spans));
      LAUNCH(weight_gradient_kernel<Tile>, grid, Tile::kThreads, kSharedBytes<Tile>, stream, g, to);
    };
    if constexpr (sizeof(T) == 2) {
      if (p.large)
        run(static_cast<MmaTile<T, 128, 128, 64, 32, 2, 3, false, true>*>(nullptr));
      else
        run(static_cast<MmaTile<T, 64, 64, 32, 32, 4, 4, false, true>*>(nullptr));
    } else if (s.allow_tf32) {
      run(static_cast<MmaTile<T, 64, 64, 32, 32, 4, 4, false, true>*>(nullptr));
    } else if (p.large) {
      run(static_cast<FmaTile<8, 2, 3, true>*>(nullptr));
    } else {
      run(static_cast<FmaTile<4, 3, 3, true>*>(nullptr));
    }
  }
  const int64_t count = s.out_channels * p.channels * s.kernel_height * s.kernel_width;
  LAUNCH(add_spans_kernel<T>, blocks_of(count), kThreads, 0, stream, dw, sums, p.spans, int(p.channels), int(p.padded),
         int(s.kernel_height * s.kernel_width), count);
}

}  // namespace gemm
}  // namespace
}  // namespace pynn::cuda
