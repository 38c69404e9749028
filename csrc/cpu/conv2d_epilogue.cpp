// The epilogue of a convolution as a pass of its own, for sums that another library computed.
#include "conv2d_epilogue.h"

#include "parallel.h"

namespace pynn::cpu {

template <class T>
void Conv2dEpiloguePass<T>::run(const T* sum, T* y, Strides4 s, const Conv2dEpilogue<T>& e, int64_t batch,
                                int64_t channels, int64_t height, int64_t width, void*) {
  using A = accumulate_t<T>;
  constexpr int64_t kLine = 512;
  const Bias<T> bias(e, channels);
  const Strides4& r = e.residual_strides;
  if (s.h == width * s.w && (!e.residual || r.h == width * r.w)) width *= height, height = 1;  // rows touch
  const Epilogue<T> epilogue{bias.get(), e.residual, r, y, s, e.pre, e.activation, width};
  // Lines run along channels where the tensor is channels last, otherwise along a row.
  const bool last = s.c == 1 && channels > 1;
  const int64_t lines = batch * height * (last ? width : channels), length = last ? channels : width;
  const int64_t step = last ? s.c : s.w, r_step = last ? r.c : r.w;
  parallel_for(lines, 1 + 16384 / std::max<int64_t>(length, 1), [&](int64_t begin, int64_t end) {
    A values[kLine];
    for (int64_t i = begin; i < end; ++i) {
      // (n, channel, row) or (n, row, column)
      const int64_t inner = last ? width : height, a = i % inner, outer = last ? height : channels;
      const int64_t b = i / inner % outer, n = i / inner / outer;
      const auto at = [&](const Strides4& t) { return n * t.n + (last ? b * t.h + a * t.w : b * t.c + a * t.h); };
      for (int64_t first = 0; first < length; first += kLine) {
        const int64_t count = std::min(kLine, length - first), from = at(s) + first * step;
        if (step == 1) {
          copy_converted(sum + from, count, values);
        } else {
          for (int64_t j = 0; j < count; ++j) values[j] = to_float(sum[from + j * step]);
        }
        const A* biases = bias.get() ? bias.get() + (last ? first : b) : nullptr;
        epilogue.line(values, count, biases, last, from, step, at(r) + first * r_step, r_step);
      }
    }
  });
}

template struct Conv2dEpiloguePass<double>;
template struct Conv2dEpiloguePass<float>;
template struct Conv2dEpiloguePass<Half>;
template struct Conv2dEpiloguePass<BFloat16>;

}  // namespace pynn::cpu
