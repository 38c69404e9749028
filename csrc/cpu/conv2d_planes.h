// The input of kernels whose vector lanes are pixels: one plane per channel, in compute dtype, with what the filter
// sees outside the image stored around it. A strided correlation keeps a plane for each stride phase that a tap needs.
// Output pixel (i, j) of a plane is position q = i * pitch + j, and tap t reads offset(t) + q: so a vector runs on from
// row to row, and only the few positions between two rows are wasted. Rows share their zeros where they can.
#pragma once
#include <utility>
#include <vector>

#include "conv2d_geometry.h"

namespace pynn::cpu {

// One axis: tap t of output position i is at packed position i + shift[t] of stride phase phase[t].
struct PlaneAxis {
  std::vector<int64_t> phase, shift;
  std::vector<int64_t> first;  // of each phase: the input position of packed position 0 of output position 0
  int64_t extra = 0;           // packed positions beyond the outputs

  explicit PlaneAxis(const Axis& axis) {
    std::vector<int64_t> residues;
    for (int64_t t = 0; t < axis.kernel; ++t) {
      const int64_t at = axis.input(0, t), residue = (at % axis.stride + axis.stride) % axis.stride;
      const auto found = std::find(residues.begin(), residues.end(), residue);
      phase.push_back(found - residues.begin());
      if (found == residues.end()) {  // taps rise, so the first of a phase is its lowest
        residues.push_back(residue);
        first.push_back(at);
      }
      shift.push_back((at - first[phase.back()]) / axis.stride);
      extra = std::max(extra, shift.back());
    }
  }
  int64_t phases() const { return int64_t(first.size()); }
  // The packed positions [begin, end) of a phase, of `count` ones, that lie inside the image.
  std::pair<int64_t, int64_t> inside(const Axis& axis, int64_t phase, int64_t count) const {
    const int64_t at = first[phase];
    const int64_t end = at >= axis.in ? 0 : std::min(count, (axis.in - 1 - at) / axis.stride + 1);
    return {std::min(at >= 0 ? 0 : ceil_div(-at, axis.stride), std::max<int64_t>(end, 0)), std::max<int64_t>(end, 0)};
  }
};

// Planes of a band of `rows` output rows, with a pitch of at least `pitch`.
class Planes {
 public:
  Planes(const Window& window, int64_t rows, int64_t pitch = 0)
      : h_(window.h), w_(window.w), rows_(window.h), columns_(window.w) {
    width_ = w_.out + columns_.extra;
    int64_t shared = columns_.extra;  // zeros that end a row and begin the next
    for (int64_t p = 0; p < columns_.phases(); ++p) {
      const auto [begin, end] = inside_.emplace_back(columns_.inside(w_, p, width_));
      shared = std::min({shared, begin, width_ - end});
    }
    pitch_ = std::max(width_ - shared, pitch);
    plane_ = round_up((rows + rows_.extra) * pitch_ + shared, 16);
    if (plane_ % 256 == 0) plane_ += 16;  // planes 1 KiB apart would compete for the same cache lines
    channel_ = plane_ * std::max<int64_t>(rows_.phases() * columns_.phases(), 1);
  }
  int64_t pitch() const { return pitch_; }
  int64_t channel() const { return channel_; }  // elements of a channel
  int64_t positions(int64_t rows) const { return (rows - 1) * pitch_ + w_.out; }
  int64_t offset(int64_t a, int64_t b) const {
    return (rows_.phase[a] * columns_.phases() + columns_.phase[b]) * plane_ + rows_.shift[a] * pitch_ +
           columns_.shift[b];
  }
  int64_t row() const { return pitch_ * std::max<int64_t>(rows_.phases() * columns_.phases(), 1); }  // of a channel
  // Input rows that a band of output rows adds to its own.
  int64_t halo() const { return rows_.extra; }

  // Packs `channels` channels of one image for output rows [row, row + rows) into a buffer that was once cleared and
  // has held planes of this geometry only: their zeros lie where they lay, but for rows outside the image.
  template <class T, class A>
  void pack(const T* image, const Strides4& s, int64_t channels, int64_t row, int64_t rows, A* to) const {
    const bool bordered = h_.border.mode != PaddingMode::zeros;
    // Of many channels last, one vector at a time: more planes at once would need more pages than the first TLB holds.
    const int64_t lanes = kLanes<A>, block_size = channels <= 2 * lanes ? channels : lanes;
    const int64_t together = s.c == 1 && channels >= lanes ? block_size : 1;
    const bool in_line = together == 1 && !bordered && s.w == 1 && w_.stride == 1;
    for (int64_t block = 0; block < channels; block += together) {
      const int64_t c = std::min(block, channels - together);
      for (int64_t row_phase = 0; row_phase < rows_.phases(); ++row_phase) {
        A* planes = to + c * channel_ + row_phase * columns_.phases() * plane_;
        if (in_line) {
          pack_lines(image + c * s.c, s, rows_.first[row_phase] + row * h_.stride, rows + rows_.extra, planes);
          continue;
        }
        for (int64_t r = 0; r < rows + rows_.extra; ++r)
          for (int64_t p = 0; p < columns_.phases(); ++p) {  // which share the row's cache lines
            const auto [begin, end] = inside_[p];
            const int64_t in = rows_.first[row_phase] + (row + r) * h_.stride;
            A* plane = planes + p * plane_ + r * pitch_;
            if (in < 0 || in >= h_.in) {
              for (int64_t k = 0; k < together; ++k) std::fill_n(plane + k * channel_, width_, A(0));
            } else if (begin < end) {
              pack_row(image + c * s.c + (bordered ? h_.source(in) : in) * s.h, s.w, together, columns_.first[p], begin,
                       end, p ? 0 : s.c, plane);
            }
          }
      }
    }
  }

 private:
  // The usual case: rows of pixels without gaps, of which the first is `in` of the image; the next channel, in another
  // page, is fetched early.
  template <class T, class A>
  void pack_lines(const T* image, const Strides4& s, int64_t in, int64_t rows, A* to) const {
    const auto [begin, end] = inside_[0];
    const T* from = image + in * s.h + columns_.first[0] + begin;
    for (int64_t r = 0; r < rows; ++r, in += h_.stride, from += h_.stride * s.h, to += pitch_) {
      if (in < 0 || in >= h_.in) {
        std::fill_n(to, width_, A(0));
      } else if (begin < end) {
        for (int64_t i = 0; i < end - begin; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + s.c + i);
        copy_converted(from, end - begin, to + begin);
      }
    }
  }

  // Positions [begin, end) of a row of `channels` channels; position 0 stands at `first` of the image. What is fetched
  // early, often from another page, is `next` from here.
  template <class T, class A>
  void pack_row(const T* row, int64_t step, int64_t channels, int64_t first, int64_t begin, int64_t end, int64_t next,
                A* to) const {
    int64_t from = begin, last = end;
    if (h_.border.mode != PaddingMode::zeros) {
      const int64_t before = w_.border.before, past = before + w_.border.size - 1;
      from = std::clamp(first >= before ? 0 : ceil_div(before - first, w_.stride), begin, end);
      last = std::clamp(past < first ? 0 : (past - first) / w_.stride + 1, from, end);
      const auto continue_to = [&](int64_t p) {
        const T* source = row + w_.source(first + p * w_.stride) * step;
        for (int64_t c = 0; c < channels; ++c) to[c * channel_ + p] = to_float(source[c]);
      };
      for (int64_t p = begin; p < from; ++p) continue_to(p);
      for (int64_t p = last; p < end; ++p) continue_to(p);
      first -= before;
    }
    if (from == last) return;
    const T* pixels = row + (first + from * w_.stride) * step;
    if (channels > 1)
      split_pixels(pixels, w_.stride * step, last - from, channels, to + from, channel_);
    else
      copy_row(pixels, w_.stride * step, last - from, to + from, next);
  }

  // to[c * stride + p] = from[p * step + c] for p < count and c < channels, which fill a vector at least.
  template <class T, class A>
  static void split_pixels(const T* from, int64_t step, int64_t count, int64_t channels, A* to, int64_t stride) {
    constexpr int L = kLanes<A>;
    for (int64_t start = 0; start < count; start += L) {
      const int64_t p = std::max<int64_t>(std::min(start, count - L), 0);
      for (int64_t block = 0; block < channels; block += L) {
        const int64_t c = std::min(block, channels - L);
        const T* pixels = from + p * step + c;
        Vec<A> rows[L] = {};
        if (count < L) {
          for (int64_t i = 0; i < count; ++i) rows[i] = load_compute(pixels + i * step);
          transpose<A>(rows);
          for (int i = 0; i < L; ++i) store_part(to + (c + i) * stride, count, rows[i]);
          continue;
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          rows[i] = load_compute(pixels + i * step);
          __builtin_prefetch(pixels + (i + L) * step);
        }
        transpose<A>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(to + (c + i) * stride + p, rows[i]);
      }
    }
  }

  Axis h_, w_;
  PlaneAxis rows_, columns_;
  std::vector<std::pair<int64_t, int64_t>> inside_;  // packed positions of each column phase
  int64_t width_, pitch_, plane_, channel_;
};

// A dense image with channels last as kernels read it whose lanes are output channels: rows as they are, with the zeros
// around the image.
class PixelRows {
 public:
  explicit PixelRows(const Window& window) : h_(window.h), w_(window.w), channels_(window.in_channels) {
    width_ = (w_.out - 1) * w_.stride + (w_.kernel - 1) * w_.dilation + 1;
    begin_ = std::clamp<int64_t>(w_.pad, 0, width_);
    end_ = std::clamp<int64_t>(w_.pad + w_.in, begin_, width_);
  }
  static bool fits(const Window& window, const Strides4& s) {
    return window.groups == 1 && !window.bordered() && window.depth() > 0 && (s.c == 1 || window.in_channels == 1) &&
           s.w == window.in_channels;
  }
  // Elements between neighbouring outputs of a column and of a row, and of a band.
  int64_t down() const { return h_.stride * pitch(); }
  int64_t across() const { return w_.stride * channels_; }
  int64_t size(int64_t rows) const { return in_rows(rows) * pitch(); }
  int64_t offset(int64_t channel, int64_t a, int64_t b) const {
    return a * h_.dilation * pitch() + b * w_.dilation * channels_ + channel;
  }

  // As Planes::pack, with all channels.
  template <class T, class A>
  void pack(const T* image, const Strides4& s, int64_t row, int64_t rows, A* to) const {
    for (int64_t r = 0; r < in_rows(rows); ++r, to += pitch()) {
      const int64_t in = h_.input(row, 0) + r;
      if (in < 0 || in >= h_.in)
        std::fill_n(to, pitch(), A(0));
      else if (begin_ < end_)
        copy_converted(image + in * s.h + (begin_ - w_.pad) * s.w, (end_ - begin_) * channels_,
                       to + begin_ * channels_);
    }
  }

 private:
  int64_t pitch() const { return width_ * channels_; }
  int64_t in_rows(int64_t rows) const { return (rows - 1) * h_.stride + (h_.kernel - 1) * h_.dilation + 1; }

  Axis h_, w_;
  int64_t channels_, width_, begin_, end_;  // columns of a row, and those of the image
};

}  // namespace pynn::cpu
