// The frame of the elementwise diffusion kernels.
//
// The tensor is flat. A thread handles packs: 16 bytes of a tensor (32 of float64), which are whole Philox counters,
// and loads the next pack while it computes one. A block owns a span of consecutive packs; the coefficients of the rows
// that the span touches are computed once, a row per thread, and shared. Rows may begin anywhere inside a pack.
//
// An op is a struct with
//   Element, Inputs, Values, Outputs, Row, kBlocks           its types, and the resident blocks to compile for
//   Inputs  load(index, flat)                                the packs it reads
//   Values  values(index, flat, rows)                        the noise of a pack
//   Row     row(b)                                           the coefficients of row b
//   void    element(outputs, inputs, values, row, k)         element k of a pack
//   void    store(outputs, index, flat)
#pragma once
#include "diffusion_math.h"
#include "pack.cuh"

namespace pynn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxPacks = 4;              // of a thread, in a large tensor
constexpr int64_t kFullDevice = 132 * 8;  // blocks that fill a large GPU; with fewer, a thread takes fewer packs

template <class T>
constexpr int kPack = sizeof(T) == 2 ? 8 : 4;  // elements

// Resident blocks of a multiprocessor to compile for: enough to keep the memory busy with the packs in flight, and as
// many registers as the op needs without spilling.
template <class T>
constexpr int kResidentBlocks = sizeof(T) == 8   ? 1
                                : sizeof(T) == 4 ? 4
                                                 : 3;

template <class T>
using Pack = PackOf<T, kPack<T>>;

// The tensors seen as one flat array.
struct Flat {
  int64_t size, inner;  // elements; elements of a row
  bool aligned;         // every tensor begins on 16 bytes
};

template <class T>
__device__ int valid_elements(int64_t index, const Flat& flat) {
  return index + kPack<T> <= flat.size ? kPack<T> : int(flat.size - index);
}
template <class T>
__device__ Pack<T> load_pack(const T* from, int64_t index, const Flat& flat) {
  Pack<T> pack;
  load_pack(pack, from + index, valid_elements<T>(index, flat), flat.aligned);
  return pack;
}
template <class T>
__device__ void store_pack(T* to, int64_t index, const Pack<T>& pack, const Flat& flat) {
  store_pack(to + index, pack, valid_elements<T>(index, flat), flat.aligned);
}

struct Position {
  int64_t row, column;
};

// Where elements lie, from `begin` to at most kFar elements further: one 64-bit division, then 32-bit ones.
class Rows {
 public:
  const int64_t first;

  __device__ Rows(int64_t begin, int64_t inner)
      : first(begin / inner), start_(first * inner), inner_(inner), divisor_(unsigned(inner < kFar ? inner : kFar)) {}

  __device__ Position of(int64_t index) const {
    const int64_t offset = index - start_;
    if (offset < inner_) return {first, offset};
    const unsigned past = unsigned(offset - inner_), rows = past / divisor_;
    return {first + 1 + rows, int64_t(past - rows * divisor_)};
  }

 private:
  static constexpr int64_t kFar = 1 << 30;
  const int64_t start_, inner_;
  const unsigned divisor_;
};

// The noise of packs: given, or regenerated from the draw's key or from a key per row.
template <class T>
struct NoiseSource {
  using C = accumulate_t<T>;
  struct Values {
    C z[kPack<T>];
  };

  const T* given;
  const int64_t* keys;
  bool key_per_row;

  NoiseSource(const DiffusionNoise<T>& noise, const DiffusionShape& shape)
      : given(noise.given), keys(noise.key), key_per_row(shape.key_count > 1) {}

  __device__ Values values(int64_t index, const Flat& flat, const Rows& rows) const {
    Values values{};
    if (given) {
      const Pack<T> loaded = load_pack(given, index, flat);
#pragma unroll
      for (int k = 0; k < kPack<T>; ++k) values.z[k] = to_float(loaded.element[k]);
    } else if (!key_per_row) {
      const uint64_t seed = uint64_t(__ldg(keys)), counter = uint64_t(__ldg(keys + 1)) + uint64_t(index >> 2);
#pragma unroll
      for (int q = 0; q < kPack<T> / 4; ++q) quad(&values.z[4 * q], seed, counter + q);
    } else if (flat.inner % 4 == 0) {  // a row begins with a quad
#pragma unroll
      for (int q = 0; q < kPack<T> / 4; ++q)
        if (index + 4 * q < flat.size) quad_of(&values.z[4 * q], rows.of(index + 4 * q));
    } else {
      one_by_one(values.z, index, flat, rows);
    }
    return values;
  }

 private:
  __device__ static void quad(C* z, uint64_t seed, uint64_t counter) {
    float normal[4];
    normal4(seed, counter, normal);
#pragma unroll
    for (int k = 0; k < 4; ++k) z[k] = C(normal[k]);
  }
  __device__ void quad_of(C* z, Position at) const {
    quad(z, uint64_t(keys[2 * at.row]), uint64_t(keys[2 * at.row + 1]) + uint64_t(at.column >> 2));
  }
  // Rows begin inside packs: an element finds its own quad, which is made again where it changes. The values move up
  // one place per step, so that the loop stays a loop and the array stays in registers.
  __device__ void one_by_one(C (&z)[kPack<T>], int64_t index, const Flat& flat, const Rows& rows) const {
    C made[4] = {};
#pragma unroll 1
    for (int k = 0; k < kPack<T>; ++k) {
      const Position at = rows.of(index + k < flat.size ? index + k : flat.size - 1);
      const int word = int(at.column & 3);
      if (k == 0 || word == 0) quad_of(made, at);
#pragma unroll
      for (int i = 0; i + 1 < kPack<T>; ++i) z[i] = z[i + 1];
      z[kPack<T> - 1] = word == 0 ? made[0] : word == 1 ? made[1] : word == 2 ? made[2] : made[3];
    }
  }
};

struct NoNoise {};

// shared_row: all rows have the coefficients of row 0.
template <class Op>
__global__ void __launch_bounds__(kThreads, Op::kBlocks)
    elementwise_kernel(Op op, Flat flat, int64_t span, bool shared_row) {
  constexpr int kElements = kPack<typename Op::Element>, kStride = kThreads * kElements;
  SHARED_ARRAY(typename Op::Row, coefficients, kThreads);
  const int64_t span_begin = int64_t(blockIdx.x) * span;
  const int64_t span_end = span_begin + span < flat.size ? span_begin + span : flat.size;
  // A part of the span touches no more rows than there are threads: the whole span, unless rows are tiny.
  int64_t part = span;
  if (!shared_row && flat.inner < span / (kThreads - 2)) part = flat.inner * (kThreads - 2) / kElements * kElements;

  for (int64_t begin = span_begin; begin < span_end; begin += part) {
    const int64_t end = begin + part < span_end ? begin + part : span_end;
    const Rows rows(begin, flat.inner);
    int64_t index = begin + int64_t(threadIdx.x) * kElements;
    typename Op::Inputs next{};
    if (index < end) next = op.load(index, flat);

    const int64_t touched = shared_row ? 1 : rows.of(end - 1).row - rows.first + 1;
    if (int64_t(threadIdx.x) < touched) coefficients[threadIdx.x] = op.row(shared_row ? 0 : rows.first + threadIdx.x);
    __syncthreads();
    for (; index < end; index += kStride) {
      const typename Op::Inputs current = next;
      if (index + kStride < end) next = op.load(index + kStride, flat);
      const typename Op::Values values = op.values(index, flat, rows);
      typename Op::Outputs outputs{};
      Position at = rows.of(index);
      if (shared_row || at.column + kElements <= flat.inner) {
        const typename Op::Row row = coefficients[shared_row ? 0 : at.row - rows.first];
#pragma unroll
        for (int k = 0; k < kElements; ++k) op.element(outputs, current, values, row, k);
      } else {
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
          if (index + k >= flat.size) break;
          op.element(outputs, current, values, coefficients[at.row - rows.first], k);
          if (++at.column == flat.inner) at.column = 0, ++at.row;
        }
      }
      op.store(outputs, index, flat);
    }
    __syncthreads();  // the next part overwrites the coefficients
  }
}

// tensors: all that the op reads or writes elementwise; null ones do not count.
template <class Op>
void launch_elementwise(const Op& op, const DiffusionShape& shape, bool shared_row,
                        std::initializer_list<const void*> tensors, void* stream) {
  const Flat flat{shape.batch * shape.inner, shape.inner, is_aligned(tensors)};
  const int64_t block = kThreads * kPack<typename Op::Element>;  // elements, at one pack per thread
  const int64_t most = (flat.size + block - 1) / block, packs = most / (2 * kFullDevice) + 1;
  const int64_t span = block * (packs < kMaxPacks ? packs : kMaxPacks);
  LAUNCH(elementwise_kernel<Op>, unsigned((flat.size + span - 1) / span), kThreads, 0, stream, op, flat, span,
         shared_row);
}

}  // namespace
}  // namespace pynn::cuda
