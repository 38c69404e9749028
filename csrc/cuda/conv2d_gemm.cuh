// Implicit GEMM convolution: which tiles run, what is copied first, how many blocks share a sum.
//
// 16-bit types use the tensor cores; fp32 uses them where the user allows TF32, fused multiply-adds otherwise. Operands
// whose channels do not lie in packs of 16 bytes (NCHW, odd channel counts, odd strides) are copied to scratch in that
// layout, as many images at a time as fit a part of the L2 cache, so that one kernel serves every layout.
//
// The order of a sum depends on the shape of one sample alone, never on the batch, the layout or the device. A long sum
// of a small image is a total of chunks, which are added in order whether one block computes all of them or one each.
#pragma once
#include "conv2d_gemm_correlate.cuh"
#include "conv2d_gemm_pack.cuh"

namespace pynn::cuda {
namespace {
namespace gemm {

template <class T>
using Large = MmaTile<T, 128, 128, 64, 32, 2, 3, false>;
template <class T>
using Medium = MmaTile<T, 128, 64, 32, 32, 2, 4, true>;
template <class T>
using Small = MmaTile<T, 64, 64, 32, 32, 4, 4, true>;
// Large has no registers left for a prologue. Medium adds in the same order.
template <class Tile>
constexpr bool kTakesPrologue = Tile::kTotals;
using LargeFma = FmaTile<8, 2, 3>;
using SmallFma = FmaTile<4, 3, 3>;

constexpr int64_t kCopyBytes = int64_t(32) << 20, kSumsBytes = int64_t(32) << 20;
constexpr int64_t kMostImages = 32768;
constexpr int64_t kEnoughBlocks = 2 * 132;  // two for each processor of a large GPU
// How often a large correlation may apply a prologue to the same pixel, once for each tap and column tile that reads
// it.
constexpr int64_t kMostRepeats = 4;

// The chunk of an fp32 sum, in steps: the square root of the length of the sum balances the rounding errors of chunks
// and total.
inline int64_t short_chunk(int64_t sum) { return std::clamp<int64_t>(std::llround(std::sqrt(double(sum)) / 4), 1, 16); }

// A correlation in numbers: everything that follows from the shape.
template <class T>
struct Plan {
  static constexpr int64_t kDepth = kRowBytes / sizeof(T);

  Line h, w;
  int64_t batch, groups, channels, padded, columns;  // channels: summed over, of one group
  int64_t image_height, image_width, height, width;  // of the image and of the output
  int64_t filter_height, filter_width;
  PaddingMode padding_mode;
  bool tensor_cores;
  int64_t chunk, split, parts;  // see Correlation

  Plan(const Conv2dShape& s, bool forward)
      : h(forward ? forward_line(rows_of(s)) : gradient_line(rows_of(s))),
        w(forward ? forward_line(columns_of(s)) : gradient_line(columns_of(s))),
        batch(s.batch),
        groups(s.groups),
        channels((forward ? s.in_channels : s.out_channels) / s.groups),
        padded(round_up(channels, kPackOf<T>)),
        columns((forward ? s.out_channels : s.in_channels) / s.groups),
        image_height(forward ? s.in_height : s.out_height),
        image_width(forward ? s.in_width : s.out_width),
        height(forward ? s.out_height : s.in_height),
        width(forward ? s.out_width : s.in_width),
        filter_height(s.kernel_height),
        filter_width(s.kernel_width),
        padding_mode(forward ? s.padding_mode : PaddingMode::zeros),  // no output stands outside of grad_output
        tensor_cores(sizeof(T) == 2 || s.allow_tf32) {
    const int64_t sum = h.most_taps() * w.most_taps() * padded, blocks = std::max<int64_t>(ceil_div(sum, kDepth), 1);
    parts = height * width <= 256 && sum >= 1024 ? std::min<int64_t>(sum / 512, 8) : 1;
    split = ceil_div(blocks, parts);
    chunk = split;
    if (!tensor_cores) chunk = short_chunk(std::min(sum, split * kDepth));
    parts = ceil_div(blocks, split);
  }

  int64_t copy_size() const { return image_height * image_width * groups * padded; }
  int64_t sums_size() const { return parts * height * width * groups * columns; }
  int64_t filter_size() const { return groups * columns * filter_height * filter_width * padded; }
  int64_t rows() const { return int64_t(h.most_pixels()) * w.most_pixels(); }
  int64_t phases() const { return int64_t(h.phases) * w.phases; }

  // Images of one launch.
  int64_t slice(bool copying) const {
    int64_t most = std::min({batch, kMostImages, kMostRows / rows()});
    if (copying) most = std::min(most, kCopyBytes / (copy_size() * int64_t(sizeof(T))));
    if (parts > 1) most = std::min(most, kSumsBytes / (sums_size() * int64_t(sizeof(float))));
    return std::max<int64_t>(most, 1);
  }

  int64_t scratch() const {
    int64_t most = 0;
    for (const bool copying : {false, true}) {
      Scratch scratch(nullptr);
      scratch.take<T>(filter_size());
      if (copying) scratch.take<T>(slice(copying) * copy_size());
      if (parts > 1) scratch.take<float>(slice(copying) * sums_size());
      most = std::max(most, scratch.used());
    }
    return most;
  }
};

// Strides of dimensions of size 1 mean nothing.
inline Strides4 used_strides(const Strides4& s, int64_t n, int64_t h, int64_t w) {
  return {n > 1 ? s.n : 0, s.c, h > 1 ? s.h : 0, w > 1 ? s.w : 0};
}

// Whether a tensor can be read as it is: whole packs of channels, each on 16 bytes.
template <class T>
bool in_packs(const T* data, const Strides4& s, int64_t channels) {
  constexpr int64_t kPack = kPackOf<T>;
  return channels % kPack == 0 && s.c == 1 && s.n % kPack == 0 && s.h % kPack == 0 && s.w % kPack == 0 &&
         is_aligned({data});
}

template <class T>
Filter<T> filter_of(const Plan<T>& p, const T* w, const Strides4& strides, bool forward, Scratch& scratch,
                    void* stream) {
  const Strides4 s = used_strides(strides, 2, p.filter_height, p.filter_width);
  T* const copy = scratch.take<T>(p.filter_size());
  if (forward && in_packs(w, s, p.channels) && std::max(s.h, s.w) < kMostRows / (p.filter_height * p.filter_width))
    return {w, p.columns * s.n, s.n, int(s.h), int(s.w)};
  FilterCopy<T> c{copy, w,  (forward ? p.columns : p.channels) * s.n, forward ? s.n : s.c, forward ? s.c : s.n,
                  s.h,  s.w};
  c.rows = int(p.columns), c.channels = int(p.channels), c.packs = int(p.padded / kPackOf<T>);
  c.width = int(p.filter_width), c.taps = int(p.filter_height * p.filter_width);
  c.rows_first = c.row == 1;
  c.count = p.filter_size() / kPackOf<T>;
  LAUNCH(copy_filter_kernel<T>, blocks_of(c.count), kThreads, 0, stream, c);
  const int64_t row = c.taps * p.padded;
  return {copy, p.columns * row, row, int(c.width * p.padded), int(p.padded)};
}

template <class T>
void copy_images(T* to, const T* from, const Strides4& s, int64_t channels, int64_t padded, int64_t groups,
                 int64_t height, int64_t width, int64_t images, void* stream,
                 const Conv2dPrologue<T>* prologue = nullptr) {
  const int64_t tile_pixels = kTileElements / std::min<int64_t>(padded, kTileChannels);
  const ImageCopy<T> c{to,
                       from,
                       s,
                       int(channels),
                       int(padded),
                       int(groups),
                       int(width),
                       int(height * width),
                       int(ceil_div(padded, kTileChannels)),
                       int(tile_pixels)};
  const dim3 grid(unsigned(ceil_div(c.pixels, tile_pixels)), unsigned(c.groups * c.channel_tiles), unsigned(images));
  if (prologue) {
    const PrologueCopy<T> with{c, *prologue};
    LAUNCH((copy_image_kernel<T, PrologueCopy<T>>), grid, kThreads, 0, stream, with);
  } else {
    LAUNCH((copy_image_kernel<T, ImageCopy<T>>), grid, kThreads, 0, stream, c);
  }
}

template <class Tile, class T>
void launch_correlation(Correlation<T> c, const Target<T>& to, int64_t rows, int64_t phases, int64_t parts,
                        const Conv2dPrologue<T>* prologue, void* stream) {
  c.column_tiles = int(ceil_div(c.columns, Tile::kColumns));
  const dim3 grid(unsigned(ceil_div(rows, Tile::kRows) * c.column_tiles), unsigned(phases * c.groups), unsigned(parts));
  if constexpr (kTakesPrologue<Tile>) {
    if (prologue) {
      LAUNCH(prologue_correlate_kernel<Tile>, grid, Tile::kThreads, kSharedBytes<Tile>, stream, c, to, *prologue);
      return;
    }
  }
  LAUNCH(correlate_kernel<Tile>, grid, Tile::kThreads, kSharedBytes<Tile>, stream, c, to);
}

template <class T, class Out>
Output<Out> from_sample(Output<Out> out, int64_t n) {
  out.y += n * out.strides.n;
  if (out.epilogue.residual) out.epilogue.residual += n * out.epilogue.residual_strides.n;
  if (out.epilogue.pre) out.epilogue.pre += n * out.strides.n;
  return out;
}

template <class T>
Conv2dPrologue<T> from_sample(Conv2dPrologue<T> prologue, int64_t n) {
  if (prologue.scale.values) prologue.scale.values += n * prologue.scale.stride;
  if (prologue.shift.values) prologue.shift.values += n * prologue.shift.stride;
  return prologue;
}

// Whether the kernel that multiplies applies the prologue too, to each pack that it reads. Where a pixel is read often
// and many blocks keep the GPU busy, it is better applied once, in a copy of as many images as the L2 cache holds.
template <class T>
bool applies_in_kernel(const Plan<T>& p, const Conv2dPrologue<T>& prologue) {
  if (!suits_kernel(prologue, p.batch * p.groups * p.channels)) return false;
  const int64_t repeats = p.filter_height * p.filter_width * ceil_div(p.columns, 64);
  return repeats <= kMostRepeats ||
         ceil_div(p.batch * p.rows(), 64) * ceil_div(p.columns, 64) * p.groups < kEnoughBlocks;
}

// Sums of a correlation, of x' if there is a prologue, to `out`: of type T with any strides, or fp32 with dense NHWC
// strides.
template <class T, class Out>
void correlate(const Plan<T>& p, const Output<Out>& out, const T* image, const Strides4& image_strides, const T* w,
               const Strides4& w_strides, bool forward, const Conv2dPrologue<T>* prologue, void* memory, void* stream) {
  const Strides4 s = used_strides(image_strides, p.batch, p.image_height, p.image_width);
  const bool copying = !in_packs(image, s, p.channels) || (prologue && !applies_in_kernel(p, *prologue));
  const int64_t slice = p.slice(copying), channels = p.groups * p.columns;
  Scratch scratch(memory);
  const Filter<T> filter = filter_of(p, w, w_strides, forward, scratch, stream);
  T* const copy = scratch.take<T>(copying ? slice * p.copy_size() : 0);
  float* const sums = scratch.take<float>(p.parts > 1 ? slice * p.sums_size() : 0);

  for (int64_t n = 0; n < p.batch; n += slice) {
    const int64_t images = std::min(slice, p.batch - n), rows = images * p.rows();
    const T* from = image + n * s.n;
    Image<T> view{from, s.n, s.h, s.w, int(p.channels), int(p.channels)};
    Conv2dPrologue<T> of_slice{};
    if (prologue) of_slice = from_sample(*prologue, n);
    const Conv2dPrologue<T>* const on_copy = prologue && copying ? &of_slice : nullptr;
    const Conv2dPrologue<T>* const in_kernel = prologue && !copying ? &of_slice : nullptr;
    if (copying) {
      copy_images(copy, from, s, p.channels, p.padded, p.groups, p.image_height, p.image_width, images, stream,
                  on_copy);
      view = {copy,          p.copy_size(), p.image_width * p.groups * p.padded, p.groups * p.padded,
              int(p.padded), int(p.padded)};
    }
    const auto tiles = [&](int64_t tile_rows, int64_t tile_columns) {
      return ceil_div(rows, tile_rows) * ceil_div(p.columns, tile_columns) * p.groups * p.phases();
    };
    const bool many = tiles(128, 64) >= kEnoughBlocks;
    const bool split = p.parts > 1 && (!p.tensor_cores || tiles(64, 64) < kEnoughBlocks);
    const Output<Out> finished = from_sample<T>(out, n);
    Target<T> to{{}, false, int(p.height), int(p.width), int(channels), nullptr, 0};
    if constexpr (std::is_same_v<T, Out>) {
      to.out = finished;
      to.packs = finished.template has_vectors<kPackOf<T>>() && (p.groups == 1 || p.columns % kPackOf<T> == 0);
    } else {
      to.sums = finished.y;
    }
    if (split) to.sums = sums, to.sums_stride = images * p.sums_size() / p.parts;

    Correlation<T> c{p.h,
                     p.w,
                     view,
                     filter,
                     int(images),
                     int(p.groups),
                     int(p.columns),
                     0,
                     int(p.chunk),
                     int(split ? p.split : p.split * p.parts),
                     p.padding_mode};
    const int64_t parts = split ? p.parts : 1;
    const auto run = [&]<class Tile>(Tile*) {
      launch_correlation<Tile>(c, to, rows, p.phases(), parts, in_kernel, stream);
    };
    if constexpr (sizeof(T) == 2) {
      if (p.parts == 1 && p.columns > 64 && !in_kernel && tiles(128, 128) >= kEnoughBlocks)
        run(static_cast<Large<T>*>(nullptr));
      else if (many)
        run(static_cast<Medium<T>*>(nullptr));
      else
        run(static_cast<Small<T>*>(nullptr));
    } else if (p.tensor_cores) {
      run(static_cast<Small<T>*>(nullptr));
    } else if (many) {
      run(static_cast<LargeFma*>(nullptr));
    } else {
      run(static_cast<SmallFma*>(nullptr));
    }
    if (split) {
      const Target<Out> last{finished, false, to.height, to.width, to.channels, sums, to.sums_stride};
      const Elements elements{images, channels, p.height, p.width, is_channels_last(finished.strides)};
      LAUNCH(finish_kernel<Out>, blocks_of(elements.count()), kThreads, 0, stream, last, int(parts), elements,
             elements.count());
    }
  }
}

// Whether the kernels' 32-bit positions suffice.
inline bool fits(const Conv2dShape& s) {
  if (s.in_channels == 0 || s.batch == 0) return false;
  const auto line_fits = [](const Axis& a) {
    return a.out > 0 && a.in + a.pad + a.kernel * a.dilation + a.out * a.stride < kMostRows;
  };
  const int64_t channels = std::max(s.in_channels, s.out_channels) + 16 * s.groups;
  return line_fits(rows_of(s)) && line_fits(columns_of(s)) && s.in_height * s.in_width < kMostRows &&
         s.out_height * s.out_width < kMostRows && s.kernel_height * s.kernel_width < kMostRows / channels &&
         s.groups * std::max<int64_t>(kMaxPhases * kMaxPhases, ceil_div(channels, kTileChannels)) < 65536;
}

// Whether a tile is filled well enough: fewer output channels, a single image channel or small groups are better off in
// the direct kernels.
inline bool fills_tiles(int64_t summed, int64_t columns, int64_t groups) {
  return groups == 1 ? summed >= 3 && columns >= 8 : std::min(summed, columns) >= 16 * groups;
}

template <class T>
bool suits_forward(const Conv2dShape& s) {
  return sizeof(T) < 8 && fits(s) && fills_tiles(s.in_channels, s.out_channels, s.groups);
}
template <class T>
bool suits_input_gradient(const Conv2dShape& s) {
  return sizeof(T) < 8 && fits(s) && fills_tiles(s.out_channels, s.in_channels, s.groups) &&
         std::min(s.stride_height, s.in_height) <= kMaxPhases && std::min(s.stride_width, s.in_width) <= kMaxPhases;
}
template <class T>
bool suits_weight_gradient(const Conv2dShape& s) {
  return suits_forward<T>(s);
}

template <class T>
int64_t forward_scratch(const Conv2dShape& s) {
  return Plan<T>(s, true).scratch();
}
template <class T>
void forward(const Output<T>& out, const T* x, const Strides4& x_strides, const T* w, const Strides4& w_strides,
             const Conv2dShape& s, const Conv2dPrologue<T>* prologue, void* scratch, void* stream) {
  correlate(Plan<T>(s, true), out, x, x_strides, w, w_strides, true, prologue, scratch, stream);
}

template <class T>
int64_t input_gradient_scratch(const Conv2dShape& s) {
  return Plan<T>(s, false).scratch();
}
template <class T, class Out>
void input_gradient(const Output<Out>& out, const T* dy, const Strides4& dy_strides, const T* w,
                    const Strides4& w_strides, const Conv2dShape& s, void* scratch, void* stream) {
  const Conv2dPrologue<T>* const none = nullptr;
  correlate(Plan<T>(s, false), out, dy, dy_strides, w, w_strides, false, none, scratch, stream);
}

}  // namespace gemm
}  // namespace
}  // namespace pynn::cuda
