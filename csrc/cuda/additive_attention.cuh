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
#include "additive_attention_tiles.cuh"

namespace pynn::cuda {
namespace {
namespace additive {

constexpr int kResident = 2;           // blocks on a processor: asked for less, the compiler spills to have more
constexpr int64_t kMostHeads = 65535;  // of a grid; its blocks go on to the others

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    forward_kernel(T* out, attention_lse_t<T>* lse, T* weights, accumulate_t<T>* sums, AdditiveOperands<T> o,
                   AdditiveShape shape) {
  using A = accumulate_t<T>;
  using Score = attention_lse_t<T>;
  ADDITIVE_TILES(T, tiles);
  SHARED_ARRAY(A, shares, kThreads);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  A* const share = shares + warp * 32;
  for (int64_t head = blockIdx.y; head < shape.heads; head += gridDim.y) {
    const int64_t first_query = int64_t(blockIdx.x) * kWarps, query = first_query + warp;
    const int64_t row = head * shape.queries + query, mask_at = o.mask.offset(shape, head);
    Score top = -Score(INFINITY), total = 0;
    A added;
    bool any = false;
    for (int64_t first = 0; first < shape.keys; first += kKeys) {
      const auto score = tiles.score(o, shape, head, first_query, first);
      const Place at{head, query, first + lane, query < shape.queries && first + lane < shape.keys};
      const bool seen = visible(o, at, mask_at, added);
      const unsigned bits = __ballot_sync(kFullWarp, seen);
      const Score own = seen ? score + Score(added) : -Score(INFINITY), new_top = largest(own > top ? own : top);
      // Nothing of the softmax so far: out begins at 0. A NaN is no maximum, but its share is NaN.
      const A rescale = any ? exp_of<T>(A(top - new_top)) : A(0), p = seen ? exp_of<T>(A(own - new_top)) : A(0);
      __syncwarp();
      share[lane] = p;
      __syncwarp();
      if (bits == 0) continue;
      total = total * Score(rescale) + Score(sum_lanes(double(p)));
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
        out[row * shape.value_dim + v] = any ? from_float<T>(A(Score(sums[row * shape.value_dim + v]) / total)) : T{};
      if (lane == 0) lse[row] = any ? Score(double(top) + log(double(total))) : -Score(INFINITY);
    }
    if (weights == nullptr) continue;
    for (int64_t first = 0; first < shape.keys; first += kKeys) {
      const auto score = tiles.score(o, shape, head, first_query, first);
      const Place at{head, query, first + lane, query < shape.queries && first + lane < shape.keys};
      const bool seen = visible(o, at, mask_at, added);
      if (at.exists)
        weights[row * shape.keys + at.key] =
            seen ? from_float<T>(A(Score(exp_of<T>(A(score + Score(added) - top))) / total)) : T{};
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    query_kernel(AdditiveGradients<T> gradients, accumulate_t<T>* query_sums, accumulate_t<T>* weight_parts,
                 double* deltas, AdditiveSaved<T> saved, AdditiveOperands<T> o, AdditiveShape shape) {
  using A = accumulate_t<T>;
  ADDITIVE_TILES(T, tiles);
  SHARED_ARRAY(A, slopes, kThreads);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  A* const slope = slopes + warp * 32;
  for (int64_t head = blockIdx.y; head < shape.heads; head += gridDim.y) {
    const int64_t first_query = int64_t(blockIdx.x) * kWarps, query = first_query + warp;
    const int64_t row = head * shape.queries + query, mask_at = o.mask.offset(shape, head);
    A* const to_query = query_sums + row * shape.dim;
    A* const to_weight = weight_parts + ((head * gridDim.x + blockIdx.x) * kWarps + warp) * shape.dim;
    A added;
    for (int64_t d = lane; d < shape.dim; d += 32) {
      if (query < shape.queries) to_query[d] = 0;
      to_weight[d] = 0;
    }
    double delta = 0;
    for (int64_t first = 0; first < shape.keys; first += kKeys) {
      const auto score = tiles.score(o, shape, head, first_query, first);
      const Place at{head, query, first + lane, query < shape.queries && first + lane < shape.keys};
      if (visible(o, at, mask_at, added)) {
        const Slope<T> s = slope_of(saved, o, shape, at, score + added);
        delta += double(s.share) * s.to_share;
      }
    }
    delta = sum_lanes(delta);
    if (lane == 0 && query < shape.queries) deltas[row] = delta;
    for (int64_t first = 0; first < shape.keys; first += kKeys) {
      const auto score = tiles.score(o, shape, head, first_query, first);
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
__global__ void __launch_bounds__(kThreads, kResident)
    key_kernel(AdditiveGradients<T> gradients, accumulate_t<T>* key_sums, accumulate_t<T>* value_sums,
               const double* deltas, AdditiveSaved<T> saved, AdditiveOperands<T> o, AdditiveShape shape) {
  using A = accumulate_t<T>;
  ADDITIVE_TILES(T, tiles);
  SHARED_ARRAY(A, slopes, kThreads);
  SHARED_ARRAY(A, shares, kThreads);
  SHARED_ARRAY(unsigned, seen_bits, kWarps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kOwned = kKeys / kWarps;  // keys whose sums a warp makes
  for (int64_t head = blockIdx.y; head < shape.heads; head += gridDim.y) {
    const int64_t first = int64_t(blockIdx.x) * kKeys, mask_at = o.mask.offset(shape, head);
    const int64_t first_own = first + warp * kOwned, end_own = min(first_own + kOwned, shape.keys);
    for (int64_t key = first_own; key < end_own; ++key) {
      for (int64_t d = lane; d < shape.dim; d += 32) key_sums[(head * shape.keys + key) * shape.dim + d] = 0;
      for (int64_t v = lane; v < shape.value_dim; v += 32)
        value_sums[(head * shape.keys + key) * shape.value_dim + v] = 0;
    }
    for (int64_t first_query = 0; first_query < shape.queries; first_query += kWarps) {
      const auto score = tiles.score(o, shape, head, first_query, first);
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
__global__ void __launch_bounds__(kThreads, kResident)
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

// Blocks for `rows` of each head in tiles of `tile`.
inline dim3 grid_of(const AdditiveShape& shape, int64_t rows, int tile) {
  return dim3(unsigned(ceil_div(rows, tile)), unsigned(min(shape.heads, kMostHeads)));
}

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
  LAUNCH((additive::forward_kernel<T>), additive::grid_of(shape, shape.queries, additive::kWarps), additive::kThreads,
         0, stream, out, lse, weights, static_cast<accumulate_t<T>*>(scratch), operands, shape);
  return true;
}

template <class T>
bool AdditiveAttention<T>::bwd(const AdditiveGradients<T>& gradients, const AdditiveSaved<T>& saved,
                               const AdditiveOperands<T>& operands, const AdditiveShape& shape, void* scratch,
                               void* stream) {
  const additive::Scratch<accumulate_t<T>> s(shape, scratch);
  const int64_t parts = shape.heads * ceil_div(shape.queries, additive::kWarps) * additive::kWarps;
  LAUNCH((additive::query_kernel<T>), additive::grid_of(shape, shape.queries, additive::kWarps), additive::kThreads, 0,
         stream, gradients, s.query, s.weight, s.deltas, saved, operands, shape);
  LAUNCH((additive::key_kernel<T>), additive::grid_of(shape, shape.keys, additive::kKeys), additive::kThreads, 0,
         stream, gradients, s.key, s.value, s.deltas, saved, operands, shape);
  if (shape.dim > 0)
    LAUNCH((additive::weight_kernel<T>), unsigned(ceil_div(shape.dim, 32)), additive::kThreads, 0, stream,
           gradients.weight, s.weight, parts, shape.dim);
  return true;
}

template struct AdditiveAttention<double>;
template struct AdditiveAttention<float>;
template struct AdditiveAttention<Half>;
template struct AdditiveAttention<BFloat16>;

}  // namespace pynn::cuda
