// How a block of threads multiplies the tiles of attention: tensor cores for 16-bit data, fused multiply-adds in the
// data's own precision otherwise. Both hold the scores (kRows x kColumns) and the outputs (kRows x kWidth) in
// registers:
//
//   multiply_rows:     scores += own streamed^T     own (kRows x width), streamed (kColumns x width) in shared memory
//   multiply_weights:  output += weights streamed   weights: a tile of scores in registers, streamed (kColumns x width)
//
// kThreadRows x kThreadColumns scores and kThreadRows x kOutputColumns outputs belong to a thread, and kRowLanes
// neighbouring lanes of a warp share a row.
#pragma once
#include <cfloat>

#include "scaled_dot_product_attention_problem.cuh"

namespace pynn::cuda {
namespace {
namespace attention {

// Tensor cores. `parts` neighbouring groups of warps form the same scores and share the columns of the outputs; in a
// group a warp owns 16 * strips rows. Weights are fp32 numbers; one rounding to 16 bits would be an error as
// large as the rounding of the result, so they enter the product as a sum of two 16-bit numbers.
template <class T, int width, int strips, int warps, int columns, int parts = 1>
struct MmaEngine {
  using Element = T;
  static constexpr int kWidth = width, kThreads = 32 * warps, kRows = 16 * strips * warps / parts, kColumns = columns;
  static constexpr int kPart = width / parts, kThreadRows = 2 * strips, kThreadColumns = columns / 4,
                       kOutputColumns = kPart / 4;
  static constexpr int kRowLanes = 4, kRun = 2;
  static constexpr int kOwnBytes = kRows * width * 2, kStreamedBytes = kColumns * width * 2, kExchangeBytes = 0;

  using Tile = float[strips][columns / 8][4];
  using Output = float[strips][kPart / 8][4];

  int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 * strips % kRows;
  int first_output = parts == 1 ? 0 : threadIdx.x / (kThreads / parts) * kPart;  // column

  __device__ __forceinline__ int row(int i) const { return first + i / 2 * 16 + i % 2 * 8 + lane / 4; }
  __device__ __forceinline__ int column(int j) const { return j / 2 * 8 + lane % 4 * 2 + j % 2; }
  __device__ __forceinline__ int output_column(int n) const { return first_output + column(n); }
  template <int count>
  static __device__ __forceinline__ float& at(float (&tile)[strips][count][4], int i, int j) {
    return tile[i / 2][j / 2][i % 2 * 2 + j % 2];
  }

  // Eight rows of one pack lie in different banks.
  static __device__ __forceinline__ int offset(int row, int pack) { return row * width * 2 + (pack ^ (row & 7)) * 16; }

  __device__ __forceinline__ void multiply_rows(Tile& s, const unsigned char* own, const unsigned char* streamed,
                                                int padded) const {
#pragma unroll 1
    for (int k = 0; k < padded / 8; k += 2) {
      uint32_t a[strips][4];
#pragma unroll
      for (int i = 0; i < strips; ++i) ldmatrix(a[i], own + offset(first + 16 * i + lane % 16, k + lane / 16));
#pragma unroll
      for (int j = 0; j < columns / 8; j += 2) {
        uint32_t b[4];
        ldmatrix(b, streamed + offset(8 * j + lane % 8 + lane / 16 * 8, k + lane / 8 % 2));
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < strips; ++i)
          mma_m16n8k16<T>(s[i][j], a[i], left), mma_m16n8k16<T>(s[i][j + 1], a[i], right);
      }
    }
  }

  // Two neighbouring weights as registers of two operands. The first is always finite: of an infinity it leaves all.
  static __device__ __forceinline__ void split(float low, float high, uint32_t& large, uint32_t& small) {
    large = round_pair<T>(low, high);
    const T a = from_float<T>(low - to_float(T{uint16_t(large)}));
    const T b = from_float<T>(high - to_float(T{uint16_t(large >> 16)}));
    small = a.bits | uint32_t(b.bits) << 16;
  }

  __device__ __forceinline__ void multiply_weights(Output& out, Tile& weights, const unsigned char* streamed,
                                                   unsigned char*, int padded) const {
#pragma unroll
    for (int k = 0; k < columns / 8; k += 2) {
      uint32_t large[strips][4], small[strips][4];
#pragma unroll
      for (int i = 0; i < strips; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float (&pair)[4] = weights[i][k + e / 2];
          split(pair[e % 2 * 2], pair[e % 2 * 2 + 1], large[i][e], small[i][e]);
        }
#pragma unroll
      for (int n = 0; n < kPart / 8; n += 2) {
        if (first_output + 8 * n >= padded) continue;
        uint32_t b[4];
        ldmatrix_trans(b, streamed + offset(8 * k + lane % 16, first_output / 8 + n + lane / 16));
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < strips; ++i) {
          mma_m16n8k16<T>(out[i][n], large[i], left), mma_m16n8k16<T>(out[i][n + 1], large[i], right);
          mma_m16n8k16<T>(out[i][n], small[i], left), mma_m16n8k16<T>(out[i][n + 1], small[i], right);
        }
      }
    }
  }
};

// True fp32 and fp64: 16 x 16 threads, rows and columns of a thread 16 apart. Weights pass through shared memory, from
// the half of a warp that owns a row to itself. Long sums are sums of short ones, which keeps their rounding errors
// small.
template <class T, int width, int height, int breadth>
struct FmaEngine {
  using Element = T;
  static constexpr int kPack = 16 / sizeof(T);
  static constexpr int kWidth = width, kThreads = 256, kRows = 16 * height, kColumns = 16 * breadth;
  static constexpr int kThreadRows = height, kThreadColumns = breadth, kOutputColumns = width / 16;
  static constexpr int kRowLanes = 16, kRun = kPack;
  static constexpr int kRunLength = 8;                           // products of a short sum
  static constexpr int kRowBytes = width * int(sizeof(T)) + 16;  // eight rows of one pack lie in different banks
  static constexpr int kExchangeRow = kColumns + kPack;          // elements
  static constexpr int kOwnBytes = kRows * kRowBytes, kStreamedBytes = kColumns * kRowBytes;
  static constexpr int kExchangeBytes = kRows * kExchangeRow * int(sizeof(T));
  static_assert(width % (16 * kPack) == 0 && kColumns % kPack == 0);

  using Tile = T[height][breadth];
  using Output = T[height][width / 16];
  using Vector = PackOf<T, kPack>;

  int x = threadIdx.x % 16, y = threadIdx.x / 16;

  __device__ __forceinline__ int row(int i) const { return y + 16 * i; }
  __device__ __forceinline__ int column(int j) const { return x + 16 * j; }
  __device__ __forceinline__ int output_column(int n) const { return n / kPack * 16 * kPack + x * kPack + n % kPack; }
  template <int count>
  static __device__ __forceinline__ T& at(T (&tile)[height][count], int i, int j) {
    return tile[i][j];
  }
  static __device__ __forceinline__ int offset(int row, int pack) { return row * kRowBytes + pack * 16; }
  static __device__ __forceinline__ Vector read(const void* from) { return *static_cast<const Vector*>(from); }

  __device__ __forceinline__ void multiply_rows(Tile& s, const unsigned char* own, const unsigned char* streamed,
                                                int padded) const {
#pragma unroll 1
    for (int pack = 0; pack < padded / kPack; pack += kRunLength / kPack) {
      T sum[height][breadth];
#pragma unroll
      for (int part = 0; part < kRunLength / kPack; ++part) {
        Vector a[height];
#pragma unroll
        for (int i = 0; i < height; ++i) a[i] = read(own + offset(row(i), pack + part));
#pragma unroll
        for (int j = 0; j < breadth; ++j) {
          const Vector b = read(streamed + offset(column(j), pack + part));
#pragma unroll
          for (int k = 0; k < kPack; ++k)
#pragma unroll
            for (int i = 0; i < height; ++i)
              sum[i][j] = part + k == 0 ? a[i].element[k] * b.element[k]
                                        : multiply_add(a[i].element[k], b.element[k], sum[i][j]);
        }
      }
#pragma unroll
      for (int i = 0; i < height; ++i)
#pragma unroll
        for (int j = 0; j < breadth; ++j) s[i][j] += sum[i][j];
    }
  }

  __device__ __forceinline__ void multiply_weights(Output& out, Tile& weights, const unsigned char* streamed,
                                                   unsigned char* exchange, int padded) const {
    T* const shared = reinterpret_cast<T*>(exchange);
    __syncwarp();  // the last product has been taken
#pragma unroll
    for (int i = 0; i < height; ++i)
#pragma unroll
      for (int j = 0; j < breadth; ++j) shared[row(i) * kExchangeRow + column(j)] = weights[i][j];
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kOutputColumns; n += kPack) {
      if (16 * n >= padded) continue;
#pragma unroll 1
      for (int first = 0; first < kColumns; first += kRunLength) {
        T sum[height][kPack] = {};
#pragma unroll
        for (int k = first; k < first + kRunLength; k += kPack) {
          Vector a[height];
#pragma unroll
          for (int i = 0; i < height; ++i) a[i] = read(shared + row(i) * kExchangeRow + k);
#pragma unroll
          for (int step = 0; step < kPack; ++step) {
            const Vector b = read(streamed + offset(k + step, n / kPack * 16 + x));
#pragma unroll
            for (int i = 0; i < height; ++i)
#pragma unroll
              for (int c = 0; c < kPack; ++c) sum[i][c] = multiply_add(a[i].element[step], b.element[c], sum[i][c]);
          }
        }
#pragma unroll
        for (int i = 0; i < height; ++i)
#pragma unroll
          for (int c = 0; c < kPack; ++c) out[i][n + c] += sum[i][c];
      }
    }
  }
};

// The sum, or the largest, over the lanes that share a row.
template <class E, class F, class Combine>
__device__ __forceinline__ F over_row(F value, const Combine& combine) {
#pragma unroll
  for (int distance = E::kRowLanes / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(kWarp, value, distance));
  return value;
}

template <class E>
__device__ __forceinline__ void clear(typename E::Tile& tile) {
#pragma unroll
  for (int i = 0; i < E::kThreadRows; ++i)
#pragma unroll
    for (int j = 0; j < E::kThreadColumns; ++j) E::at(tile, i, j) = 0;
}
template <class E>
__device__ __forceinline__ void clear_output(typename E::Output& out) {
#pragma unroll
  for (int i = 0; i < E::kThreadRows; ++i)
#pragma unroll
    for (int n = 0; n < E::kOutputColumns; ++n) E::at(out, i, n) = 0;
}

// A weight that is two 16-bit numbers makes NaN of an infinity, where the second is negative or one is 0. Such sums are
// set aside, as a number that no other sum can be, for add_nonfinite. Returns whether there are any.
template <class E>
__device__ __forceinline__ bool set_nan_aside(typename E::Output& out) {
  bool found = false;
  if constexpr (sizeof(typename E::Element) == 2) {
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i)
#pragma unroll
      for (int n = 0; n < E::kOutputColumns; ++n)
        if (E::at(out, i, n) != E::at(out, i, n)) E::at(out, i, n) = FLT_MAX, found = true;
  }
  return found;
}
template <class E>
__device__ __forceinline__ void put_nan_back(typename E::Output& out) {
  if constexpr (sizeof(typename E::Element) == 2) {
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i)
#pragma unroll
      for (int n = 0; n < E::kOutputColumns; ++n)
        if (E::at(out, i, n) == FLT_MAX) E::at(out, i, n) = NAN;
  }
}

// The rows [first_streamed, end_streamed) of m that are not finite, for themselves, in sums that lack some of them: a
// weight that takes part is positive, so each of them adds itself. Rare, hence slow: reads the matrix again.
// of_query(query) is NaN where weights are, otherwise 0.
template <bool kKeyRows, class E, class S, class T, class OfQuery>
__device__ __forceinline__ void add_nonfinite(typename E::Output& out, const E& e, const S& scores,
                                              const Matrix<const T>& m, int first_row, int first_streamed,
                                              int end_streamed, int first_column, const OfQuery& of_query) {
  const int end = min(end_streamed, m.rows);
#pragma unroll 1
  for (int streamed = first_streamed; streamed < end; ++streamed) {
    const T* const from = m.data + streamed * m.row;
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i) {
      const int row = first_row + e.row(i), query = kKeyRows ? streamed : row;
      if (!scores.takes_part(query, kKeyRows ? row : streamed)) continue;
      const accumulate_t<T> added = of_query(query);
#pragma unroll
      for (int n = 0; n < E::kOutputColumns; ++n) {
        const int column = first_column + e.output_column(n);
        const accumulate_t<T> v = added + (column < m.width ? to_float(from[column * m.column]) : accumulate_t<T>(0));
        if (!is_finite(v)) E::at(out, i, n) += v;
      }
    }
  }
}

// Writes the thread's part of an output tile, times `factor` per row.
template <class E, class T, class Value>
__device__ __forceinline__ void store_tile(const Matrix<T>& to, const E& e, int first_row, int first_column,
                                           const Value& value) {
  constexpr int kRun = E::kRun;
  struct alignas(kRun * sizeof(T)) Run {
    T element[kRun];
  };
#pragma unroll
  for (int i = 0; i < E::kThreadRows; ++i) {
    const int row = first_row + e.row(i);
    if (row >= to.rows) continue;
    T* const start = to.at(row);
#pragma unroll
    for (int n = 0; n < E::kOutputColumns; n += kRun) {
      const int column = first_column + e.output_column(n);
      Run run;
#pragma unroll
      for (int k = 0; k < kRun; ++k) run.element[k] = from_float<T>(value(i, n + k));
      if (to.packs && column + kRun <= to.width) {
        *reinterpret_cast<Run*>(start + column) = run;
      } else {
#pragma unroll
        for (int k = 0; k < kRun; ++k)
          if (column + k < to.width) start[(column + k) * to.column] = run.element[k];
      }
    }
  }
}

}  // namespace attention
}  // namespace
}  // namespace pynn::cuda
