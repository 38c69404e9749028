// The operand of a depthwise correlation as its tiles read it: rows of one plane (lanes are pixels) or of one vector of
// channels, in the compute type, with the columns of the padding in place. Rows of the padding have no copy. Columns of
// zeros are never written: the scratch is cleared once.
#pragma once
#include "conv2d_geometry.h"
#include "vec_load.h"

namespace pynn::cpu {

// Padded positions that `outputs` neighbouring outputs meet.
inline int64_t reach(const Axis& axis, int64_t outputs) {
  return axis.kernel == 0 ? 0 : (outputs - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1;
}

// The image's position at a padded one, -1 where zeros stand.
inline int64_t image_position(const Axis& axis, int64_t padded) {
  const int64_t p = padded - axis.pad;
  if (p < 0 || p >= axis.in) return -1;
  return axis.border.mode == PaddingMode::zeros ? p : axis.source(p);
}

// to[0:count] = from[0:count * step:step] in the compute type; memory past the last element is not read.
template <class T, class A>
PYNN_HD void copy_strided(const T* from, int64_t step, int64_t count, A* to) {
  constexpr int64_t L = kLanes<A>;
  if (step == 1 && count >= L) {
    for (int64_t i = 0; i + L <= count; i += L) store(to + i, load_compute(from + i));
    store(to + count - L, load_compute(from + count - L));
  } else if (step == 2) {
    copy_every_second(from, count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i * step]);
  }
}

template <class T, bool kPlanes>
class PaddedRows {
  using A = accumulate_t<T>;
  static constexpr int64_t L = kLanes<A>, kPixel = kPlanes ? 1 : L;

 public:
  PaddedRows(const T* x, const Strides4& s, const Window& window)
      : x_(x),
        s_(s),
        h_(window.h),
        w_(window.w),
        members_(window.in_channels),
        outputs_(window.out_channels),
        channels_(window.groups * window.out_channels),
        columns_(reach(w_, w_.out)),
        phases_(kPlanes ? w_.stride : 1),
        phase_size_(ceil_div(columns_, phases_) + (kPlanes ? L : 0)) {
    const bool bordered = window.bordered();
    const int64_t before = w_.pad + (bordered ? w_.border.before : 0), size = bordered ? w_.border.size : w_.in;
    begin_ = std::clamp<int64_t>(before, 0, columns_);
    end_ = std::clamp<int64_t>(before + size, begin_, columns_);
    if (phases_ == 1 && kPlanes) lead_ = round_up(begin_, L) - begin_;  // rows are stored on whole vectors
    pitch_ = round_up(lead_ + phases_ * phase_size_ * kPixel, L);
    // Rows shorter than two vectors are turned in one piece with the rows that touch them.
    if (!kPlanes && single() && !bordered && s.w == 1 && s.h == size && end_ - begin_ == size && size < 2 * L) {
      places_.resize(h_.in * size);
      for (size_t p = 0; p < places_.size(); ++p) places_[p] = int64_t(p) / size * pitch_ + int64_t(p) % size * L;
    }
  }

  int64_t pitch() const { return pitch_; }                                // elements of a packed row
  int64_t step() const { return w_.stride / phases_ * kPixel; }           // from one output to the next
  int64_t column(int64_t tap) const { return place(tap * w_.dilation); }  // of a kernel column for output 0

  // Packs `count` padded rows from `first` on and lists them, null for rows of zeros. `member` counts the input
  // channels of a group.
  void pack(int64_t image, int64_t output, int64_t member, int64_t first, int64_t count, A* to, const A** rows) const {
    int64_t lanes[L];
    const int64_t here = kPlanes ? 1 : std::min(L, channels_ - output);
    for (int64_t l = 0; l < here; ++l) lanes[l] = ((output + l) / outputs_ * members_ + member) * s_.c;
    const T* from = x_ + image * s_.n;
    for (int64_t u = 0; u < count; ++u) {
      const int64_t row = image_position(h_, first + u);
      rows[u] = row < 0 ? nullptr : to + u * pitch_;
      if (row < 0) continue;
      if constexpr (kPlanes) {
        pack_plane_row(from + lanes[0] + row * s_.h, to + u * pitch_);
      } else {
        pack_edges(from + row * s_.h, lanes, here, to + u * pitch_);
        if (places_.empty() || here < L) pack_pixels(from + row * s_.h, lanes, here, to + u * pitch_);
      }
    }
    if (places_.empty() || here < L) return;
    const int64_t row = std::max(first, h_.pad), last = std::min(first + count, h_.pad + h_.in);
    A* target = to + (row - first) * pitch_ + begin_ * L;
    if (row < last)
      transpose_in(from + lanes[0] + (row - h_.pad) * s_.h, s_.c, (last - row) * s_.h, L, target,
                   [&](int64_t p) { return places_[p]; });
  }

 private:
  bool single() const { return members_ == 1 && outputs_ == 1; }
  int64_t place(int64_t v) const { return lead_ + (v % phases_ * phase_size_ + v / phases_) * kPixel; }

  // Columns outside the image that continue it.
  template <class Copy>
  void each_edge(const Copy& copy) const {
    if (w_.border.mode == PaddingMode::zeros) return;
    for (int64_t v = 0; v < begin_; ++v) copy(v, image_position(w_, v));
    for (int64_t v = end_; v < columns_; ++v) copy(v, image_position(w_, v));
  }

  void pack_plane_row(const T* from, A* to) const {
    const T* first = begin_ < end_ ? from + image_position(w_, begin_) * s_.w : from;
    for (int64_t v = begin_; v < std::min(end_, begin_ + phases_); ++v)
      copy_strided(first + (v - begin_) * s_.w, phases_ * s_.w, ceil_div(end_ - v, phases_), to + place(v));
    each_edge([&](int64_t v, int64_t q) { to[place(v)] = to_float(from[q * s_.w]); });
  }

  void pack_edges(const T* from, const int64_t* lanes, int64_t count, A* to) const {
    each_edge([&](int64_t v, int64_t q) {
      for (int64_t l = 0; l < count; ++l) to[v * L + l] = to_float(from[q * s_.w + lanes[l]]);
    });
  }

  void pack_pixels(const T* from, const int64_t* lanes, int64_t count, A* to) const {
    if (begin_ == end_) return;
    from += image_position(w_, begin_) * s_.w;
    const int64_t pixels = end_ - begin_;
    to += begin_ * L;
    const bool dense = single() && count == L;
    if (dense && s_.c == 1) {
      for (int64_t p = 0; p < pixels; ++p) store(to + p * L, load_compute(from + lanes[0] + p * s_.w));
    } else if (dense && s_.w == 1) {
      transpose_in(from + lanes[0], s_.c, pixels, L, to, [](int64_t p) { return p * L; });
    } else {
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t l = 0; l < count; ++l) to[p * L + l] = to_float(from[p * s_.w + lanes[l]]);
    }
  }

  const T* x_;
  Strides4 s_;
  Axis h_, w_;
  int64_t members_, outputs_, channels_;
  int64_t columns_, phases_, phase_size_, pitch_, lead_ = 0;
  int64_t begin_, end_;  // padded columns that are the image
  std::vector<int64_t> places_;
};

}  // namespace pynn::cpu
