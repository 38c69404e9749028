// Additive attention. A hyperbolic tangent for each of Lq Lk D terms is nearly all of the time.
//
// A block of kWarps warps meets kWarps queries with kKeys keys at a time. For the scores a warp has a query and a lane
// a key: the sum over D is a thread's own, and rows come through shared memory. For sums over keys or queries the lanes
// run along D, and make the tangents again instead of exchanging them.
//
//   forward     a tile of queries: softmax of the scores seen so far, out in compute-type scratch, rescaled as it grows
//   query       a tile of queries: delta, then grad_query, the gradient of the scores, and a part of grad_weight
//   key         a tile of keys past all queries: grad_key and grad_value
//   weight      adds the parts
//
// Each number in scratch belongs to one thread, and every sum has one order: no atomics, the same bits every time.
#pragma once
#include "additive_attention.h"
#include "arithmetic.cuh"
#include "warp_sum.cuh"

namespace pynn::cuda {
namespace {
namespace additive {

constexpr int kWarps = 8, kThreads = kWarps * 32, kKeys = 32;
constexpr int kChunk = 64;          // columns of Q and K in shared memory at a time
constexpr int kPitch = kChunk + 1;  // of a key there: lanes read a column
constexpr int64_t kMostBlocks = 1 << 20;

template <class T>
__device__ __forceinline__ accumulate_t<T> tangent(accumulate_t<T> x) {
  if constexpr (sizeof(T) == 8)
    return tanh(x);
  else if constexpr (sizeof(T) == 4)
    return tanhf(x);
  else  // absolute error 1e-7; the exponential may be infinite, the quotient is then 0
    return 1 - 2 * divide<T>(1, exp_of<T>(2 * x) + 1);
}

template <class A>
__device__ __forceinline__ A largest(A value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(kFullWarp, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// The rows of Q and K in shared memory, and the scores of the two.
template <class T>
struct Tiles {
  using A = accumulate_t<T>;
  A *query, *key, *weight;  // (kWarps, kChunk), (kKeys, kPitch), (kChunk)

  // weight . tanh(q + k) for the query of this warp and the key of this lane; any number where one of them does not
  // exist. Called by whole blocks.
  __device__ A score(const AdditiveOperands<T>& o, const AdditiveShape& shape, int64_t head, int64_t first_query,
                     int64_t first_key) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    A score = 0;
    for (int64_t first = 0; first < shape.dim; first += kChunk) {
      const int columns = int(min(shape.dim - first, int64_t(kChunk)));
      __syncthreads();  // the chunk before has been read
      for (int at = threadIdx.x; at < kWarps * kChunk; at += kThreads)
        query[at] = element(o.query, head, first_query + at / kChunk, shape.queries, first + at % kChunk, shape.dim);
      for (int at = threadIdx.x; at < kKeys * kChunk; at += kThreads)
        key[at / kChunk * kPitch + at % kChunk] =
            element(o.key, head, first_key + at / kChunk, shape.keys, first + at % kChunk, shape.dim);
      for (int at = threadIdx.x; at < columns; at += kThreads) weight[at] = to_float(o.weight[first + at]);
      __syncthreads();
      A sums[2] = {0, 0};
      for (int d = 0; d < columns; ++d)
        sums[d % 2] = fma(weight[d], tangent<T>(query[warp * kChunk + d] + key[lane * kPitch + d]), sums[d % 2]);
      score += sums[0] + sums[1];
    }
    return score;
  }

 private:
  // 0 outside of the matrix of a head.
  static __device__ __forceinline__ A element(const T* m, int64_t head, int64_t row, int64_t rows, int64_t column,
                                              int64_t columns) {
    return row < rows && column < columns ? A(to_float(m[(head * rows + row) * columns + column])) : A(0);
  }
};

#define ADDITIVE_TILES(T, tiles)                             \
  SHARED_ARRAY(accumulate_t<T>, query_tile, kWarps* kChunk); \
  SHARED_ARRAY(accumulate_t<T>, key_tile, kKeys* kPitch);    \
  SHARED_ARRAY(accumulate_t<T>, weight_tile, kChunk);        \
  const Tiles<T> tiles { query_tile, key_tile, weight_tile }

// Where a thread is: its query, and the key of its lane.
struct Place {
  int64_t head, query, key;
  bool exists;  // both of them
};

// Whether the score takes part, and what the mask adds to it.
template <class T>
__device__ __forceinline__ bool visible(const AdditiveOperands<T>& o, const Place& at, int64_t mask_at,
                                        accumulate_t<T>& added) {
  added = 0;
  return at.exists && o.mask.visible(mask_at + at.query * o.mask.row + at.key * o.mask.column, added);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(T* out, attention_lse_t<T>* lse, T* weights, accumulate_t<T>* sums, AdditiveOperands<T> o,
                   AdditiveShape shape, int64_t query_tiles) {
  using A = accumulate_t<T>;
  ADDITIVE_TILES(T, tiles);
  SHARED_ARRAY(A, shares, kThreads);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  A* const share = shares + warp * 32;
  for (int64_t tile = blockIdx.x; tile < shape.heads * query_tiles; tile += gridDim.x) {
    const int64_t head = tile / query_tiles, first_query = tile % query_tiles * kWarps, query = first_query + warp;
    const int64_t row = head * shape.queries + query, mask_at = o.mask.offset(shape, head);
    A top = -A(INFINITY), total = 0, added;
    bool any = false;
    for (int64_t first = 0; first < shape.keys; first += kKeys) {
      const A score = tiles.score(o, shape, head, first_query, first);
      const Place at{head, query, first + lane, query < shape.queries && first + lane < shape.keys};
      const bool seen = visible(o, at, mask_at, added);
      const unsigned bits = __ballot_sync(kFullWarp, seen);
      const A own = seen ? score + added : -A(INFINITY), new_top = largest(own > top ? own : top);
      // Nothing of the softmax so far: out begins at 0. A NaN is no maximum, but its share is NaN.
      const A rescale = any ? exp_of<T>(top - new_top) : A(0), p = seen ? exp_of<T>(own - new_top) : A(0);
      __syncwarp();
      share[lane] = p;
      __syncwarp();
      if (bits == 0) continue;
      total = total * rescale + A(sum_lanes(double(p)));
      for (int64_t v = lane; v < shape.value_dim; v += 32) {
        A sum = 0;
        for (int j = 0; j < kKeys; ++j)
          if (bits >> j & 1u)
            sum = fma(share[j], A(to_float(o.value[(head * shape.keys + first + j) * shape.value_dim + v])), sum);
        A* const to = sums + row * shape.value_dim + v;
        *to = any ? fma(*to, rescale, sum) : sum;
      }
      top = new_top, any = true;
    }
    if (query < shape.queries) {
      for (int64_t v = lane; v < shape.value_dim; v += 32)
        out[row * shape.value_dim + v] = any ? from_float<T>(sums[row * shape.value_dim + v] / total) : T{};
      if (lane == 0)
        lse[row] = any ? attention_lse_t<T>(double(top) + log(double(total))) : -attention_lse_t<T>(INFINITY);
    }
    if (weights == nullptr) continue;
    for (int64_t first = 0; first < shape.keys; first += kKeys) {
      const A score = tiles.score(o, shape, head, first_query, first);
      const Place at{head, query, first + lane, query < shape.queries && first + lane < shape.keys};
      const bool seen = visible(o, at, mask_at, added);
      if (at.exists)
        weights[row * shape.keys + at.key] = seen ? from_float<T>(exp_of<T>(score + added - top) / total) : T{};
    }
  }
}

// What both backward kernels need of a score.
template <class T>
struct Slope {
  accumulate_t<T> share;  // P
  double to_share;        // its gradient
};

template <class T>
__device__ Slope<T> slope_of(const AdditiveSaved<T>& saved, const AdditiveOperands<T>& o, const AdditiveShape& shape,
                             const Place& at, accumulate_t<T> score) {
  using A = accumulate_t<T>;
  const int64_t row = at.head * shape.queries + at.query;
  const T* const grad_out = saved.grad_out + row * shape.value_dim;
  const T* const value = o.value + (at.head * shape.keys + at.key) * shape.value_dim;
  A sums[2] = {0, 0};
  for (int64_t v = 0; v < shape.value_dim; ++v)
    sums[v % 2] = fma(A(to_float(grad_out[v])), A(to_float(value[v])), sums[v % 2]);
  double to_share = double(sums[0] + sums[1]);
  if (saved.grad_weights) to_share += double(to_float(saved.grad_weights[row * shape.keys + at.key]));
  return {exp_of<T>(A(double(score) - double(saved.lse[row]))), to_share};
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    query_kernel(AdditiveGradients<T> gradients, accumulate_t<T>* query_sums, accumulate_t<T>* weight_parts,
                 double* deltas, AdditiveSaved<T> saved, AdditiveOperands<T> o, AdditiveShape shape,
                 int64_t query_tiles) {
  using A = accumulate_t<T>;
  ADDITIVE_TILES(T, tiles);
  SHARED_ARRAY(A, slopes, kThreads);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  A* const slope = slopes + warp * 32;
  for (int64_t tile = blockIdx.x; tile < shape.heads * query_tiles; tile += gridDim.x) {
    const int64_t head = tile / query_tiles, first_query = tile % query_tiles * kWarps, query = first_query + warp;
    const int64_t row = head * shape.queries + query, mask_at = o.mask.offset(shape, head);
    A* const to_query = query_sums + row * shape.dim;
    A* const to_weight = weight_parts + (tile * kWarps + warp) * shape.dim;
    A added;
    for (int64_t d = lane; d < shape.dim; d += 32) {
      if (query < shape.queries) to_query[d] = 0;
      to_weight[d] = 0;
    }
    double delta = 0;
    for (int64_t first = 0; first < shape.keys; first += kKeys) {
      const A score = tiles.score(o, shape, head, first_query, first);
      const Place at{head, query, first + lane, query < shape.queries && first + lane < shape.keys};
      if (visible(o, at, mask_at, added)) {
        const Slope<T> s = slope_of(saved, o, shape, at, score + added);
        delta += double(s.share) * s.to_share;
      }
    }
    delta = sum_lanes(delta);
    if (lane == 0 && query < shape.queries) deltas[row] = delta;
    for (int64_t first = 0; first < shape.keys; first += kKeys) {
      const A score = tiles.score(o, shape, head, first_query, first);
      const Place at{head, query, first + lane, query < shape.queries && first + lane < shape.keys};
      const bool seen = visible(o, at, mask_at, added);
      const unsigned bits = __ballot_sync(kFullWarp, seen);
      A own = 0;
      if (seen) {
        const Slope<T> s = slope_of(saved, o, shape, at, score + added);
        own = A(double(s.share) * (s.to_share - delta));
      }
      if (gradients.scores && at.exists) gradients.scores[row * shape.keys + at.key] = own;
      __syncwarp();
      slope[lane] = own;
      __syncwarp();
      if (bits == 0) continue;
      for (int64_t d = lane; d < shape.dim; d += 32) {
        const A q = to_float(o.query[row * shape.dim + d]);
        A query_sum = 0, weight_sum = 0;
        for (int j = 0; j < kKeys; ++j) {
          if (!(bits >> j & 1u)) continue;
          const A t = tangent<T>(q + A(to_float(o.key[(head * shape.keys + first + j) * shape.dim + d])));
          query_sum = fma(slope[j], fma(-t, t, A(1)), query_sum);
          weight_sum = fma(slope[j], t, weight_sum);
        }
        to_query[d] += query_sum;
        to_weight[d] += weight_sum;
      }
    }
    if (query < shape.queries)
      for (int64_t d = lane; d < shape.dim; d += 32)
        gradients.query[row * shape.dim + d] = from_float<T>(to_query[d] * A(to_float(o.weight[d])));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    key_kernel(AdditiveGradients<T> gradients, accumulate_t<T>* key_sums, accumulate_t<T>* value_sums,
               const double* deltas, AdditiveSaved<T> saved, AdditiveOperands<T> o, AdditiveShape shape,
               int64_t key_tiles) {
  using A = accumulate_t<T>;
  ADDITIVE_TILES(T, tiles);
  SHARED_ARRAY(A, slopes, kThreads);
  SHARED_ARRAY(A, shares, kThreads);
  SHARED_ARRAY(unsigned, seen_bits, kWarps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kOwned = kKeys / kWarps;  // keys whose sums a warp makes
  for (int64_t tile = blockIdx.x; tile < shape.heads * key_tiles; tile += gridDim.x) {
    const int64_t head = tile / key_tiles, first = tile % key_tiles * kKeys, mask_at = o.mask.offset(shape, head);
    const int64_t first_own = first + warp * kOwned, end_own = min(first_own + kOwned, shape.keys);
    for (int64_t key = first_own; key < end_own; ++key) {
      for (int64_t d = lane; d < shape.dim; d += 32) key_sums[(head * shape.keys + key) * shape.dim + d] = 0;
      for (int64_t v = lane; v < shape.value_dim; v += 32)
        value_sums[(head * shape.keys + key) * shape.value_dim + v] = 0;
    }
    for (int64_t first_query = 0; first_query < shape.queries; first_query += kWarps) {
      const A score = tiles.score(o, shape, head, first_query, first);
      const int64_t query = first_query + warp;
      const Place at{head, query, first + lane, query < shape.queries && first + lane < shape.keys};
      A added;
      const bool seen = visible(o, at, mask_at, added);
      const unsigned bits = __ballot_sync(kFullWarp, seen);
      Slope<T> s{0, 0};
      double delta = 0;
      if (seen) {
        s = slope_of(saved, o, shape, at, score + added);
        delta = deltas[head * shape.queries + query];
      }
      __syncthreads();  // the slopes of the queries before have been read
      slopes[threadIdx.x] = A(double(s.share) * (s.to_share - delta));
      shares[threadIdx.x] = s.share;
      if (lane == 0) seen_bits[warp] = bits;
      __syncthreads();
      for (int64_t key = first_own; key < end_own; ++key) {
        const int column = int(key - first);
        const int64_t key_row = head * shape.keys + key;
        for (int64_t d = lane; d < shape.dim; d += 32) {
          const A k = to_float(o.key[key_row * shape.dim + d]);
          A sum = 0;
          for (int i = 0; i < kWarps; ++i) {
            if (!(seen_bits[i] >> column & 1u)) continue;
            const A t = tangent<T>(A(to_float(o.query[(head * shape.queries + first_query + i) * shape.dim + d])) + k);
            sum = fma(slopes[i * 32 + column], fma(-t, t, A(1)), sum);
          }
          key_sums[key_row * shape.dim + d] += sum;
        }
        for (int64_t v = lane; v < shape.value_dim; v += 32) {
          A sum = 0;
          for (int i = 0; i < kWarps; ++i) {
            if (!(seen_bits[i] >> column & 1u)) continue;
            const T* const grad = saved.grad_out + (head * shape.queries + first_query + i) * shape.value_dim;
            sum = fma(shares[i * 32 + column], A(to_float(grad[v])), sum);
          }
          value_sums[key_row * shape.value_dim + v] += sum;
        }
      }
    }
    for (int64_t key = first_own; key < end_own; ++key) {
      const int64_t key_row = head * shape.keys + key;
      for (int64_t d = lane; d < shape.dim; d += 32)
        gradients.key[key_row * shape.dim + d] =
            from_float<T>(key_sums[key_row * shape.dim + d] * A(to_float(o.weight[d])));
      for (int64_t v = lane; v < shape.value_dim; v += 32)
        gradients.value[key_row * shape.value_dim + v] = from_float<T>(value_sums[key_row * shape.value_dim + v]);
    }
  }
}

// A block adds the parts of 32 columns: each warp every kWarps-th part, then the first warp those sums.
template <class T>
__global__ void __launch_bounds__(kThreads)
    weight_kernel(T* weight, const accumulate_t<T>* parts, int64_t count, int64_t dim) {
  SHARED_ARRAY(double, sums, kThreads);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t d = int64_t(blockIdx.x) * 32 + lane;
  double sum = 0;
  if (d < dim)
    for (int64_t part = warp; part < count; part += kWarps) sum += double(parts[part * dim + d]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || d >= dim) return;
  for (int other = 1; other < kWarps; ++other) sum += sums[other * 32 + lane];
  weight[d] = from_float<T>(accumulate_t<T>(sum));
}

#undef ADDITIVE_TILES

inline unsigned blocks_of(int64_t tiles) { return unsigned(min(tiles, kMostBlocks)); }

// The parts of scratch in backward.
template <class A>
struct Scratch {
  double* deltas;
  A *query, *weight, *key, *value;
  explicit Scratch(const AdditiveShape& shape, void* memory = nullptr) {
    const int64_t tiles = ceil_div(shape.queries, kWarps), rows = shape.heads * shape.queries;
    deltas = static_cast<double*>(memory);
    query = reinterpret_cast<A*>(deltas + rows);
    weight = query + rows * shape.dim;
    key = weight + shape.heads * tiles * kWarps * shape.dim;
    value = key + shape.heads * shape.keys * shape.dim;
  }
  static int64_t bytes(const AdditiveShape& shape) {
    const int64_t rows = shape.heads * shape.queries, key_rows = shape.heads * shape.keys;
    const int64_t parts = shape.heads * ceil_div(shape.queries, kWarps) * kWarps;
    return rows * int64_t(sizeof(double)) +
           ((rows + parts + key_rows) * shape.dim + key_rows * shape.value_dim) * int64_t(sizeof(A));
  }
};

}  // namespace additive
}  // namespace

template <class T>
int64_t AdditiveAttention<T>::fwd_scratch(const AdditiveShape& shape) {
  return shape.heads * shape.queries * shape.value_dim * int64_t(sizeof(accumulate_t<T>));
}

template <class T>
int64_t AdditiveAttention<T>::bwd_scratch(const AdditiveShape& shape) {
  return additive::Scratch<accumulate_t<T>>::bytes(shape);
}

template <class T>
bool AdditiveAttention<T>::fwd(T* out, attention_lse_t<T>* lse, T* weights, const AdditiveOperands<T>& operands,
                               const AdditiveShape& shape, void* scratch, void* stream) {
  const int64_t tiles = ceil_div(shape.queries, additive::kWarps);
  LAUNCH((additive::forward_kernel<T>), additive::blocks_of(shape.heads * tiles), additive::kThreads, 0, stream, out,
         lse, weights, static_cast<accumulate_t<T>*>(scratch), operands, shape, tiles);
  return true;
}

template <class T>
bool AdditiveAttention<T>::bwd(const AdditiveGradients<T>& gradients, const AdditiveSaved<T>& saved,
                               const AdditiveOperands<T>& operands, const AdditiveShape& shape, void* scratch,
                               void* stream) {
  const additive::Scratch<accumulate_t<T>> s(shape, scratch);
  const int64_t query_tiles = ceil_div(shape.queries, additive::kWarps);
  const int64_t key_tiles = ceil_div(shape.keys, additive::kKeys);
  LAUNCH((additive::query_kernel<T>), additive::blocks_of(shape.heads * query_tiles), additive::kThreads, 0, stream,
         gradients, s.query, s.weight, s.deltas, saved, operands, shape, query_tiles);
  LAUNCH((additive::key_kernel<T>), additive::blocks_of(shape.heads * key_tiles), additive::kThreads, 0, stream,
         gradients, s.key, s.value, s.deltas, saved, operands, shape, key_tiles);
  if (shape.dim > 0)
    LAUNCH((additive::weight_kernel<T>), unsigned(ceil_div(shape.dim, 32)), additive::kThreads, 0, stream,
           gradients.weight, s.weight, shape.heads * query_tiles * additive::kWarps, shape.dim);
  return true;
}

template struct AdditiveAttention<double>;
template struct AdditiveAttention<float>;
template struct AdditiveAttention<Half>;
template struct AdditiveAttention<BFloat16>;

}  // namespace pynn::cuda
