// scaled_dot_product_attention on GPUs: which engines run, and the launches. See
// scaled_dot_product_attention_forward.cuh, scaled_dot_product_attention_split.cuh and
// scaled_dot_product_attention_backward.cuh.
#pragma once
#include "attention_weights.cuh"
#include "scaled_dot_product_attention_mask_gradient.cuh"
#include "scaled_dot_product_attention_split.cuh"

namespace pynn::cuda {
namespace {
namespace attention {

// Engines by type and by the larger head dimension: of the forward, of the backward by queries and of that by keys,
// where a block holds two sums: two warps share the rows of wide heads, and each of them half of the columns. Split is
// the forward's for few queries: one strip of rows, four warps for a quarter of the columns each.
template <class T, bool wide>
struct Engines {
  using Forward = MmaEngine<T, wide ? 128 : 64, 1, 4, 64>;
  using Split = MmaEngine<T, wide ? 128 : 64, 1, 4, 64, 4>;
  using Backward = MmaEngine<T, wide ? 128 : 64, 1, 4, wide ? 32 : 64>;
  using KeyBackward = MmaEngine<T, wide ? 128 : 64, 1, wide ? 8 : 4, wide ? 32 : 64, wide ? 2 : 1>;
  static constexpr int kForwardBlocks = 2, kSplitBlocks = 4, kBackwardBlocks = 2, kKeyBackwardBlocks = wide ? 1 : 2,
                       kStages = 2;
};
template <bool wide>
struct Engines<float, wide> {
  using Forward = std::conditional_t<wide, FmaEngine<float, 128, 4, 2>, FmaEngine<float, 64, 4, 4>>;
  using Split = FmaEngine<float, wide ? 128 : 64, 1, 2>;
  using Backward = FmaEngine<float, 64, 4, 4>;
  using KeyBackward = Backward;
  static constexpr int kForwardBlocks = 1, kSplitBlocks = 2, kBackwardBlocks = 1, kKeyBackwardBlocks = 1, kStages = 1;
};
template <bool wide>
struct Engines<double, wide> {
  using Forward = FmaEngine<double, 64, 2, 2>;
  using Split = FmaEngine<double, 64, 1, 2>;
  using Backward = Forward;
  using KeyBackward = Forward;
  static constexpr int kForwardBlocks = 1, kSplitBlocks = 2, kBackwardBlocks = 1, kKeyBackwardBlocks = 1, kStages = 1;
};

// Calls body with the Engines for a head dimension.
template <class T, class Body>
void with_engines(const AttentionShape& s, const Body& body) {
  if constexpr (sizeof(T) < 8) {
    if (std::max(s.dim, s.value_dim) > 64) {
      body(Engines<T, true>{});
      return;
    }
  }
  body(Engines<T, false>{});
}

template <class T>
Operand<T> operand_of(const AttentionOperand<T*>& at, const AttentionShape& s, int64_t rows, int64_t heads_divisor) {
  constexpr int64_t kPack = 16 / sizeof(T);
  bool packs = at.column == 1 && (rows == 1 || at.row % kPack == 0) && is_aligned({at.data});
  for (int d = 0; d < s.batch_dims; ++d)
    packs = packs && (s.batch[d] == (d == s.batch_dims - 1 ? heads_divisor : 1) || at.batch[d] % kPack == 0);
  return {at, packs};
}

template <class T>
Problem<T> problem_of(const AttentionOperand<const T*>& query, const AttentionOperand<const T*>& key,
                      const AttentionOperand<const T*>& value, const AttentionMaskOperand& mask,
                      const AttentionPerHead<accumulate_t<T>>& per_head, const AttentionShape& s) {
  if (std::max({s.queries + s.keys, s.dim, s.value_dim}) >= (int64_t(1) << 31) - 1024)
    throw std::runtime_error("scaled_dot_product_attention: expected fewer than 2^31 queries and keys on a GPU");
  Problem<T> p{};
  p.shape = s, p.mask = mask, p.per_head = per_head;
  p.dropout = {s.dropout_key, uint64_t(s.dropout_p * 4294967296.0), s.dropout_p < 1 ? 1 / (1 - s.dropout_p) : 0.0};
  p.query = operand_of(query, s, s.queries, 1);
  p.key = operand_of(key, s, s.keys, s.group), p.value = operand_of(value, s, s.keys, s.group);
  const bool capped = s.softcap != 0;
  p.factor = accumulate_t<T>(capped ? s.scale / s.softcap : s.scale * double(kLogUnit<T>));
  p.cap = accumulate_t<T>(s.softcap * double(kLogUnit<T>));
  return p;
}

// A block for every tile of every head, and for every part of the columns of the results.
inline dim3 grid_of(int64_t heads, int64_t rows, int tile_rows, int64_t width, int tile_width) {
  const int64_t blocks = heads * ceil_div(rows, tile_rows), parts = std::max<int64_t>(ceil_div(width, tile_width), 1);
  if (blocks >= int64_t(1) << 31 || parts >= 65536)
    throw std::runtime_error("scaled_dot_product_attention: too large for one launch");
  return dim3(unsigned(blocks), unsigned(parts));
}

// How the gradient of a mask comes about.
struct MaskPlan {
  int64_t matrices = 1, sharing = 1, row_parts, column_parts;
  bool whole;  // a number for every score: dS is the gradient
  MaskPlan(const AttentionMaskOperand& mask, const AttentionShape& s, int tile_rows, int tile_columns) {
    for (int d = 0; d < s.batch_dims; ++d) {
      matrices *= mask.batch[d];
      if (mask.batch[d] == 1) sharing *= s.batch[d];
    }
    row_parts = mask.rows == 1 ? ceil_div(s.queries, tile_rows) : mask.rows;
    column_parts = mask.columns == 1 ? ceil_div(s.keys, tile_columns) : mask.columns;
    whole = matrices == s.heads && mask.rows == s.queries && mask.columns == s.keys;
  }
  int64_t partials() const { return matrices * row_parts * column_parts; }
};

// Of one number per row, a multiple of 256 bytes.
template <class T>
int64_t statistics_bytes(const AttentionShape& s) {
  return ceil_div(s.heads * s.queries, 64) * 64 * int64_t(sizeof(RowStatistics<accumulate_t<T>>));
}

template <class T, class Engines>
void launch_backward(const Problem<T>& p, BackwardArguments<T> arguments, accumulate_t<T>* grad_mask,
                     accumulate_t<T>* grad_sinks, void* partial, void* stream) {
  using E = typename Engines::Backward;
  using K = typename Engines::KeyBackward;
  using F = accumulate_t<T>;
  constexpr int kStages = Engines::kStages, kBlocks = Engines::kBackwardBlocks;
  const AttentionShape& s = p.shape;
  const MaskPlan plan(p.mask, s, E::kRows, E::kColumns);
  const int64_t count = s.heads * s.queries * s.keys, width = std::max(s.dim, s.value_dim);
  const auto blocks_of = [](int64_t threads) { return unsigned(ceil_div(threads, kSumThreads)); };
  if (grad_mask && plan.whole) {
    LAUNCH(zero_kernel<F>, blocks_of(count), kSumThreads, 0, stream, grad_mask, count);
    arguments.grad_mask = grad_mask;
  }
  LAUNCH((gradient_kernel<E, false, kStages, kBlocks>), grid_of(s.heads, s.queries, E::kRows, s.dim, E::kWidth),
         E::kThreads, (kBackwardShared<E, kStages>), stream, p, arguments);
  arguments.statistics = arguments.completed;
  if (grad_sinks)
    LAUNCH(sink_gradient_kernel<T>, unsigned(s.heads), kSinkThreads, kSinkThreads * sizeof(double), stream, grad_sinks,
           p.per_head.sinks, arguments.statistics, s.queries);
  LAUNCH((gradient_kernel<K, true, kStages, Engines::kKeyBackwardBlocks>),
         grid_of(s.heads / s.group, s.keys, K::kRows, width, K::kWidth), K::kThreads, (kBackwardShared<K, kStages>),
         stream, p, arguments);
  if (!grad_mask || plan.whole) return;
  const MaskGradient<T> to{static_cast<mask_sum_t<T>*>(partial), arguments.statistics, plan.sharing, plan.row_parts,
                           plan.column_parts};
  const int64_t tiles = ceil_div(s.queries, E::kRows) * ceil_div(s.keys, E::kColumns);
  LAUNCH((mask_gradient_kernel<E, kBlocks>), grid_of(plan.matrices, tiles, 1, 1, 1), E::kThreads,
         (kBackwardShared<E, 1>), stream, p, to);
  const int64_t rows = p.mask.rows, columns = p.mask.columns, sums = plan.matrices * rows * columns;
  LAUNCH((sum_mask_gradient_kernel<mask_sum_t<T>, F>), blocks_of(sums), kSumThreads, 0, stream, to.partial, grad_mask,
         rows, columns, plan.row_parts, plan.column_parts, sums);
}

template <class T>
int64_t backward_scratch(const AttentionMaskOperand& mask, const AttentionShape& s, bool mask_gradient) {
  int64_t bytes = 2 * statistics_bytes<T>(s);
  with_engines<T>(s, [&]<class Engines>(Engines) {
    using E = typename Engines::Backward;
    if (!mask_gradient) return;
    const MaskPlan plan(mask, s, E::kRows, E::kColumns);
    if (!plan.whole) bytes += plan.partials() * int64_t(sizeof(mask_sum_t<T>));
  });
  return bytes;
}

template <class T>
void forward(const Problem<T>& p, const ForwardOutputs<T>& to, void* scratch, void* stream) {
  const AttentionShape& s = p.shape;
  with_engines<T>(s, [&]<class Engines>(Engines) {
    using E = typename Engines::Forward;
    using Split = typename Engines::Split;
    if (is_split(s)) {
      const PartialOutputs<T> parts = partial_outputs<T>(s, scratch);
      const dim3 rows = grid_of(s.heads, s.queries, 1, 1, 1);
      LAUNCH((part_kernel<Split, Engines::kSplitBlocks>),
             grid_of(s.heads / s.group * parts.parts, s.queries * s.group, Split::kRows, s.value_dim, Split::kWidth),
             Split::kThreads, kForwardShared<Split>, stream, p, parts);
      LAUNCH(merge_kernel<T>, rows, kMergeThreads, 0, stream, p, parts, to);
      return;
    }
    LAUNCH((forward_kernel<E, Engines::kForwardBlocks>), grid_of(s.heads, s.queries, E::kRows, s.value_dim, E::kWidth),
           E::kThreads, kForwardShared<E>, stream, p, to);
  });
}

template <class T>
void write_weights(const Problem<T>& p, const WeightsArguments<T>& to, void* stream) {
  const AttentionShape& s = p.shape;
  with_engines<T>(s, [&]<class Engines>(Engines) {
    using E = typename Engines::Forward;
    const int64_t tiles = ceil_div(s.queries, E::kRows) * ceil_div(s.keys, E::kColumns);
    LAUNCH((weights_kernel<E, Engines::kForwardBlocks>), grid_of(s.heads / to.together, tiles, 1, 1, 1), E::kThreads,
           kWeightsShared<E>, stream, p, to);
  });
}

template <class T>
void backward(const Problem<T>& p, BackwardArguments<T> arguments, const Operand<const T>& out,
              const attention_lse_t<T>* lse, accumulate_t<T>* grad_mask, accumulate_t<T>* grad_sinks, void* scratch,
              void* stream) {
  auto* const statistics = static_cast<RowStatistics<accumulate_t<T>>*>(scratch);
  arguments.statistics = statistics;
  arguments.completed = statistics + statistics_bytes<T>(p.shape) / int64_t(sizeof(*statistics));
  LAUNCH(statistics_kernel<T>, grid_of(1, p.shape.heads * p.shape.queries, kDeltaThreads / 32, 1, 1), kDeltaThreads, 0,
         stream, p, out, lse, arguments.grad_lse, statistics);
  with_engines<T>(p.shape, [&]<class Engines>(Engines) {
    void* const partial = static_cast<char*>(scratch) + 2 * statistics_bytes<T>(p.shape);
    launch_backward<T, Engines>(p, arguments, grad_mask, grad_sinks, partial, stream);
  });
}

constexpr int kKeepThreads = 256;
__global__ void __launch_bounds__(kKeepThreads)
    keep_kernel(bool* keep, const int64_t* key, uint64_t threshold, int64_t count) {
  const int64_t group = int64_t(blockIdx.x) * kKeepThreads + threadIdx.x;
  if (4 * group >= count) return;
  uint32_t words[4];
  philox4x32(uint64_t(key[0]), uint64_t(key[1]) + uint64_t(group), words);
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (4 * group + k < count) keep[4 * group + k] = words[k] >= threshold;
}

}  // namespace attention
}  // namespace

template <class T>
int64_t Attention<T>::bwd_scratch(const AttentionMaskOperand& mask, const AttentionShape& shape, bool mask_gradient) {
  return attention::backward_scratch<T>(mask, shape, mask_gradient);
}

template <class T>
int64_t Attention<T>::fwd_scratch(const AttentionShape& shape) {
  return attention::split_scratch<T>(shape);
}

template <class T>
bool Attention<T>::fwd(Output out, Lse* lse, Input query, Input key, Input value, AttentionMaskOperand mask,
                       PerHead per_head, AttentionShape shape, void* scratch, void* stream) {
  using namespace attention;
  forward<T>(problem_of<T>(query, key, value, mask, per_head, shape), {operand_of(out, shape, shape.queries, 1), lse},
             scratch, stream);
  return true;
}

template <class T>
bool Attention<T>::bwd(Output grad_query, Output grad_key, Output grad_value, F* grad_mask, F* grad_sinks,
                       Input grad_out, const Lse* grad_lse, Input query, Input key, Input value,
                       AttentionMaskOperand mask, PerHead per_head, Input out, const Lse* lse, AttentionShape shape,
                       void* scratch, void* stream) {
  using namespace attention;
  Problem<T> p = problem_of<T>(query, key, value, mask, per_head, shape);
  p.grad_out = operand_of(grad_out, shape, shape.queries, 1);
  BackwardArguments<T> arguments{};
  arguments.grad_query = operand_of(grad_query, shape, shape.queries, 1);
  arguments.grad_key = operand_of(grad_key, shape, shape.keys, shape.group);
  arguments.grad_value = operand_of(grad_value, shape, shape.keys, shape.group);
  arguments.grad_lse = grad_lse, arguments.scale = F(shape.scale);
  backward<T>(p, arguments, operand_of(out, shape, shape.queries, 1), lse, grad_mask, grad_sinks, scratch, stream);
  return true;
}

template <class T>
bool Attention<T>::weights(T* to, bool average, Input query, Input key, AttentionMaskOperand mask, PerHead per_head,
                           const Lse* lse, AttentionShape shape, void* stream) {
  using namespace attention;
  shape.value_dim = 0;
  write_weights<T>(problem_of<T>(query, key, key, mask, per_head, shape),
                   {to, lse, average ? shape.batch[shape.batch_dims - 1] : 1}, stream);
  return true;
}

void attention_keep(bool* keep, AttentionShape shape, void* stream) {
  const int64_t count = shape.heads * shape.queries * shape.keys;
  LAUNCH(attention::keep_kernel, attention::grid_of(1, count, 4 * attention::kKeepThreads, 1, 1),
         attention::kKeepThreads, 0, stream, keep, shape.dropout_key, uint64_t(shape.dropout_p * 4294967296.0), count);
}

template struct Attention<double>;
template struct Attention<float>;
template struct Attention<Half>;
template struct Attention<BFloat16>;

}  // namespace pynn::cuda
