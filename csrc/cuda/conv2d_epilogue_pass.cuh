// The epilogue of a convolution as a pass of its own, for sums that a vendor's library computed. Tensors are flat: a
// thread takes 16 bytes of the sums, and follows the channel (and the place in a broadcast residual) of each element.
#pragma once
#include "conv2d_activation.cuh"
#include "conv2d_geometry.cuh"
#include "pack.cuh"

namespace pynn::cuda {
namespace {

__device__ __forceinline__ void advance(Element& e, const Elements& all) {
  if (all.channels_last && ++e.c < all.channels) return;
  if (all.channels_last) e.c = 0;
  if (++e.w < all.width) return;
  e.w = 0;
  if (++e.h < all.height) return;
  e.h = 0;
  if (!all.channels_last && ++e.c < all.channels) return;
  if (!all.channels_last) e.c = 0;
  ++e.n;
}

// flat_residual: the residual lies in memory as the sums do.
template <class T>
__global__ void __launch_bounds__(kThreads)
    epilogue_pass_kernel(const T* sum, T* y, Conv2dEpilogue<T> epilogue, bool flat_residual, bool aligned,
                         Elements elements, int64_t count) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t first = thread_index() * kPack;
  if (first >= count) return;
  const int valid = int(min(count - first, int64_t(kPack)));
  PackOf<T, kPack> pack, residual{};
  load_pack(pack, sum + first, valid, aligned);
  if (flat_residual) load_pack(residual, epilogue.residual + first, valid, aligned);
  accumulate_t<T> values[kPack];
  Element at = elements[first];
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    values[k] = to_float(pack.element[k]);
    if (k < valid) {
      if (epilogue.bias) values[k] += to_float(epilogue.bias[at.c * epilogue.bias_stride]);
      if (flat_residual)
        values[k] += to_float(residual.element[k]);
      else if (epilogue.residual)
        values[k] += to_float(epilogue.residual[at.at(epilogue.residual_strides)]);
    }
    advance(at, elements);
  }
  const auto store = [&](T* to) {
#pragma unroll
    for (int k = 0; k < kPack; ++k) pack.element[k] = from_float<T>(values[k]);
    store_pack(to + first, pack, valid, aligned);
  };
  if (epilogue.pre) store(epilogue.pre);
  with_activation(epilogue.activation, [&]<Activation kind>() {
#pragma unroll
    for (int k = 0; k < kPack; ++k) values[k] = activated<T, kind>(values[k]);
  });
  store(y);
}

}  // namespace

template <class T>
void Conv2dEpiloguePass<T>::run(const T* sum, T* y, Strides4 strides, const Conv2dEpilogue<T>& epilogue, int64_t batch,
                                int64_t channels, int64_t height, int64_t width, void* stream) {
  const Elements elements{batch, channels, height, width, strides.c == 1 && channels > 1};
  const Strides4& r = epilogue.residual_strides;
  const auto same = [](int64_t size, int64_t a, int64_t b) { return size == 1 || a == b; };
  const bool flat = epilogue.residual && same(batch, r.n, strides.n) && same(channels, r.c, strides.c) &&
                    same(height, r.h, strides.h) && same(width, r.w, strides.w);
  const bool aligned = is_aligned({sum, y, epilogue.pre, flat ? epilogue.residual : nullptr});
  const int64_t count = elements.count(), packs = ceil_div(count, int64_t(16 / sizeof(T)));
  LAUNCH(epilogue_pass_kernel<T>, blocks_of(packs), kThreads, 0, stream, sum, y, epilogue, flat, aligned, elements,
         count);
}

template struct Conv2dEpiloguePass<double>;
template struct Conv2dEpiloguePass<float>;
template struct Conv2dEpiloguePass<Half>;
template struct Conv2dEpiloguePass<BFloat16>;

}  // namespace pynn::cuda
