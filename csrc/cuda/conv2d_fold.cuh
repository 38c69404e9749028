// The input gradient in other padding modes than zeros: the gradient of the padded image is computed into scratch, in
// fp32 (fp64), and folded back onto the image, where it is finished.
#pragma once
#include "conv2d_epilogue.cuh"

namespace pynn::cuda {
namespace {

inline bool needs_fold(const Conv2dShape& s) {
  return s.padding_mode != PaddingMode::zeros && (s.pad_top | s.pad_left | s.pad_bottom | s.pad_right) != 0;
}

// The same convolution of an image that is padded already.
inline Conv2dShape padded(Conv2dShape s) {
  s.in_height += s.pad_top + s.pad_bottom, s.in_width += s.pad_left + s.pad_right;
  s.pad_top = s.pad_left = s.pad_bottom = s.pad_right = 0;
  s.padding_mode = PaddingMode::zeros;
  return s;
}
inline int64_t padded_size(const Conv2dShape& s) {
  const Conv2dShape p = padded(s);
  return p.batch * p.in_channels * p.in_height * p.in_width;
}
inline Strides4 padded_strides(const Conv2dShape& s, bool channels_last) {
  const Conv2dShape p = padded(s);
  const int64_t c = p.in_channels, h = p.in_height, w = p.in_width;
  return channels_last ? Strides4{h * w * c, 1, w * c, c} : Strides4{c * h * w, h * w, w, 1};
}

// One axis: the positions of the padded image that show one position of the image are those of up to three ranges.
struct FoldAxis {
  int64_t size, before, after;
  PaddingMode mode;

  struct Range {
    int64_t begin, end;
  };
  __device__ Range range(int64_t position, int which) const {
    const int64_t own = before + position;
    if (which == 1) {
      if (mode != PaddingMode::replicate) return {own, own + 1};
      return {position == 0 ? 0 : own, position == size - 1 ? before + size + after : own + 1};
    }
    int64_t other = -1;  // what stands before the image (0) or behind it (2)
    if (mode == PaddingMode::reflect) other = which == 0 ? before - position : before + 2 * (size - 1) - position;
    if (mode == PaddingMode::circular) other = which == 0 ? own - size : own + size;
    const bool there =
        which == 0 ? other >= 0 && other < before : other >= before + size && other < before + size + after;
    return there ? Range{other, other + 1} : Range{0, 0};
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(Output<T> out, const accumulate_t<T>* image, Strides4 strides, FoldAxis rows, FoldAxis columns,
                Elements elements, int64_t count) {
  const int64_t index = thread_index();
  if (index >= count) return;
  const Element e = elements[index];
  const accumulate_t<T>* const plane = image + e.n * strides.n + e.c * strides.c;
  double sum = 0;
  for (int a = 0; a < 3; ++a) {
    const auto v = rows.range(e.h, a);
    for (int64_t i = v.begin; i < v.end; ++i)
      for (int b = 0; b < 3; ++b) {
        const auto h = columns.range(e.w, b);
        for (int64_t j = h.begin; j < h.end; ++j) sum += plane[i * strides.h + j * strides.w];
      }
  }
  out.store(accumulate_t<T>(sum), e);
}

// image: of padded_size(), with padded_strides().
template <class T>
void fold(const Output<T>& out, const accumulate_t<T>* image, const Strides4& strides, const Conv2dShape& s,
          void* stream) {
  const Elements elements{s.batch, s.in_channels, s.in_height, s.in_width, is_channels_last(out.strides)};
  const FoldAxis rows{s.in_height, s.pad_top, s.pad_bottom, s.padding_mode};
  const FoldAxis columns{s.in_width, s.pad_left, s.pad_right, s.padding_mode};
  LAUNCH(fold_kernel<T>, blocks_of(elements.count()), kThreads, 0, stream, out, image, strides, rows, columns, elements,
         elements.count());
}

}  // namespace
}  // namespace pynn::cuda
