// Rotary embedding on a GPU: a thread owns a pack of pairs of one row of one head, read and written once in accesses of
// 16 bytes where rows allow it, or a pack of the channels behind them, which it copies.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "arithmetic.cuh"
#include "pack.cuh"
#include "rotary_embedding.h"

namespace pynn::cuda {
namespace {
namespace rotary {

constexpr int kThreads = 256;
template <class T>
constexpr int kPack = 16 / sizeof(T);

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

template <class T>
__device__ __forceinline__ void turn(T& first, T& second, accumulate_t<T> cos, accumulate_t<T> sin) {
  const accumulate_t<T> a = to_float(first), b = to_float(second);
  first = from_float<T>(multiply_add(a, cos, -(b * sin)));
  second = from_float<T>(multiply_add(b, cos, a * sin));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(const __grid_constant__ RotaryEmbeddingCall<T> c, int turned_packs, int packs, bool aligned) {
  using F = accumulate_t<T>;
  const int64_t count = c.batch * c.length * c.heads * packs, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const int64_t pack = i % packs, head = i / packs % c.heads, position = i / packs / c.heads,
                  row = position % c.length, n = position / c.length;
    const T* const x = c.x + n * c.x_strides.batch + head * c.x_strides.head + row * c.x_strides.row;
    T* const y = c.y + n * c.y_strides.batch + head * c.y_strides.head + row * c.y_strides.row;
    if (pack >= turned_packs) {
      const int64_t first = 2 * c.pairs + (pack - turned_packs) * kPack<T>;
      const int valid = int(min(c.width - first, int64_t(kPack<T>)));
      PackOf<T, kPack<T>> rest;
      load_pack(rest, x + first, valid, aligned);
      store_pack(y + first, rest, valid, aligned);
      continue;
    }
    const int64_t pair = pack * kPack<T>;
    const int valid = int(min(c.pairs - pair, int64_t(kPack<T>)));
    const int64_t table = n * c.table_batch + row * c.table_row + pair;
    // The pack of first channels and that of second ones; interleaved, two packs of pairs.
    const int64_t low = c.interleaved ? 2 * pair : pair, high = c.interleaved ? low + kPack<T> : pair + c.pairs;
    const int low_valid = c.interleaved ? min(2 * valid, kPack<T>) : valid,
              high_valid = c.interleaved ? max(2 * valid - kPack<T>, 0) : valid;
    PackOf<T, kPack<T>> pack_low, pack_high;
    load_pack(pack_low, x + low, low_valid, aligned);
    load_pack(pack_high, x + high, high_valid, aligned);
#pragma unroll
    for (int k = 0; k < kPack<T>; ++k) {
      if (k >= valid) continue;
      const F cos = c.cos[table + k], sin = c.inverse ? -c.sin[table + k] : c.sin[table + k];
      if (!c.interleaved)
        turn(pack_low.element[k], pack_high.element[k], cos, sin);
      else if (2 * k < kPack<T>)
        turn(pack_low.element[2 * k % kPack<T>], pack_low.element[2 * k % kPack<T> + 1], cos, sin);
      else
        turn(pack_high.element[2 * k % kPack<T>], pack_high.element[2 * k % kPack<T> + 1], cos, sin);
    }
    store_pack(y + low, pack_low, low_valid, aligned);
    store_pack(y + high, pack_high, high_valid, aligned);
  }
}

// Whether every pack of the operand lies on 16 bytes.
template <class T>
bool in_packs(const T* data, const RotaryStrides& strides, int64_t pairs) {
  return is_aligned({data}) && (strides.batch | strides.head | strides.row | pairs) % kPack<T> == 0;
}

}  // namespace rotary
}  // namespace

template <class T>
void RotaryEmbedding<T>::run(const RotaryEmbeddingCall<T>& call, void* stream) {
  using namespace rotary;
  const int64_t turned = ceil_div(call.pairs, kPack<T>),
                rest = call.x == call.y ? 0 : ceil_div(call.width - 2 * call.pairs, kPack<T>);
  if (turned + rest >= int64_t(1) << 31) throw std::runtime_error("rotary_embedding: expected narrower rows on a GPU");
  const int64_t count = call.batch * call.length * call.heads * (turned + rest);
  if (count == 0) return;
  const bool aligned =
      in_packs<T>(call.x, call.x_strides, call.pairs) && in_packs<T>(call.y, call.y_strides, call.pairs);
  const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(count, kThreads), 1 << 30));
  LAUNCH(rotary_kernel<T>, blocks, kThreads, 0, stream, call, int(turned), int(turned + rest), aligned);
}

template struct RotaryEmbedding<double>;
template struct RotaryEmbedding<float>;
template struct RotaryEmbedding<Half>;
template struct RotaryEmbedding<BFloat16>;

}  // namespace pynn::cuda
