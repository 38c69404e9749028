// Every launcher of csrc/include/conv2d_prologue.h: the pass and its gradient with tails and in both layouts, and the
// convolution whose kernel, copy of the image or pass before it applies the prologue.
#include "conv2d_prologue.h"

#include "launchers.h"

namespace {

using launchers::Run;
using namespace pynn;

struct Case {
  int64_t batch, groups, in, out, height, width, kernel, pad;  // channels are per group
};
constexpr Case kCases[] = {
    {2, 1, 16, 20, 5, 6, 3, 1},  // implicit GEMM: the kernel does it for channels last, the copy otherwise
    {2, 1, 13, 16, 4, 5, 1, 0},  // ... no whole packs
    {1, 2, 24, 16, 5, 4, 2, 1},  // ... groups
    {2, 1, 72, 16, 3, 3, 3, 1},  // ... several blocks of the sum
    {2, 6, 1, 1, 6, 9, 3, 1},    // depthwise
    {1, 1, 9, 3, 5, 9, 3, 1},    // head
    {2, 1, 2, 6, 33, 35, 3, 1},  // stem; several spans of the gradient
};

struct alignas(64) Line {
  char bytes[64];
};

template <class T>
void launch_case(Run& run, const Case& c, bool channels_last, Activation activation, bool per_sample) {
  using A = accumulate_t<T>;
  const int64_t channels = c.groups * c.in, outputs = c.groups * c.out;
  const int64_t out_h = c.height + 2 * c.pad - c.kernel + 1, out_w = c.width + 2 * c.pad - c.kernel + 1;
  const Conv2dShape s{
      c.batch, c.groups, channels, c.height, c.width, outputs, out_h, out_w, c.kernel,           c.kernel,
      1,       1,        c.pad,    c.pad,    c.pad,   c.pad,   1,     1,     PaddingMode::zeros, false};
  const ImagesShape images{c.batch, channels, c.height * c.width, channels_last};
  const size_t count = size_t(images.count()), values = size_t(per_sample ? c.batch * channels : channels);
  const T *x = run.normals<T>(count), *dy = run.normals<T>(count);
  const int64_t stride = per_sample ? channels : 0;
  const PerChannel<A> scale{run.normals<A>(values), stride}, shift{run.normals<A>(values), stride};
  const Conv2dPrologue<T> prologue{scale, shift, activation};
  const auto scratch = [&](int64_t bytes) { return run.scratch<Line>(size_t(bytes + 63) / 64); };

  using Pass = launch::Conv2dProloguePass<T>;
  Pass::fwd(x, prologue, run.output<T>(count), images, nullptr);
  Pass::bwd(dy, x, prologue, run.output<T>(count), run.output<A>(size_t(2 * c.batch * channels)), images,
            scratch(Pass::bwd_scratch(images)), nullptr);
  Pass::bwd(dy, x, {scale, {}, activation}, run.output<T>(count), nullptr, images, nullptr, nullptr);

  using Conv = launch::PrologueConv2d<T>;
  const T* w = run.normals<T>(size_t(outputs * c.in * c.kernel * c.kernel));
  const Strides4 w_strides = dense_strides(c.in, c.kernel, c.kernel, false);
  Conv::fwd(x, channels_last, prologue, w, w_strides, run.output<T>(size_t(c.batch * outputs * out_h * out_w)),
            dense_strides(outputs, out_h, out_w, channels_last), {}, s, scratch(Conv::fwd_scratch(s)), nullptr);
}

void launch_all(Run& run) {
  int64_t next = 0;
  launchers::for_each_type(run, [&]<class T>(T) {
    for (const Case& c : kCases)
      for (const bool channels_last : {false, true}) {
        launch_case<T>(run, c, channels_last, Activation(next % kActivations), next % 3 > 0);
        launch_case<T>(run, c, channels_last, next % 2 ? Activation::silu : Activation::relu, next % 3 == 0);
        ++next;
      }
  });
}

const launchers::Op op{"conv2d_prologue", &launch_all};

}  // namespace
