// Launchers of scaled_dot_product_attention.
//
//   S = cap(scale Q K^T) + mask + alibi,  lse = log (exp sink + sum_j exp S_ij),  P = exp(S - lse),
//   out = (P * keep / (1 - dropout_p)) V
//
// without a sink where a head has none. alibi_ij = -slope |j - (i + diagonal)|; cap(x) = softcap tanh(x / softcap), or
// x without a soft cap. Q (..., H, Lq, D), K (..., Hk, Lk, D), V (..., Hk, Lk, Dv) with H a multiple of Hk; all leading
// dimensions together are "heads" here, numbered row-major. A score that is masked (bool false, float -inf, outside of
// the window of its query) contributes nothing, whatever its key and value hold; a row without any score gives out 0
// and lse -inf (sink). Dropout keeps element e of P, counted row-major over (heads, Lq, Lk), when word e % 4 of
// philox4x32(seed, offset + e / 4) is at least dropout_p * 2^32.
#pragma once
#include <cstdint>
#include <type_traits>

#include "dtype.h"

namespace pynn {

inline constexpr int kAttentionBatchDims = 8;

// A matrix per head, read or written through strides (in elements; 0 where it is broadcast).
template <class Pointer>
struct AttentionOperand {
  Pointer data;
  int64_t batch[kAttentionBatchDims];
  int64_t row, column;
};

enum class AttentionMask { kNone, kBool, kDouble, kFloat, kHalf, kBFloat16 };

// Of each query: the keys [begin, end) that it sees, and the key on its diagonal. Of each key: the queries that see it.
// From one to the next neither end of a range decreases.
struct AttentionKeyRange {
  int32_t begin, end, diagonal, unused;
};
struct AttentionQueryRange {
  int32_t begin, end;
};

struct AttentionShape {
  int batch_dims;  // of query: the last one counts heads
  int64_t batch[kAttentionBatchDims];
  int64_t heads;  // product of batch
  int64_t group;  // query heads that share one key head
  int64_t queries, keys, dim, value_dim;
  // Query i sees the keys i + lower .. i + upper: -queries and keys where nothing is hidden. Distances for alibi count
  // from key i + diagonal.
  int64_t lower, upper, diagonal;
  // Both or none; in place of the three above.
  const AttentionKeyRange* key_ranges;
  const AttentionQueryRange* query_ranges;
  double scale, softcap, dropout_p;  // softcap: 0 for none
  const int64_t* dropout_key;        // (seed, offset), or nullptr without dropout

  PYNN_HD bool windowed() const { return key_ranges || lower > 1 - queries || upper < keys - 1; }
};

struct AttentionMaskOperand {
  AttentionMask kind;
  AttentionOperand<const void*> operand;
  int64_t batch[kAttentionBatchDims];  // the mask's own sizes, 1 where it is broadcast
  int64_t rows, columns;
};

// Numbers of the heads; nullptr where they have none.
template <class F>
struct AttentionPerHead {
  const F *alibi_slopes, *sinks;
};

// lse is kept in float64 unless the data is 16 bits wide: its rounding error is a relative error of a whole row of P,
// and in float32 it would be the largest error of the backward.
template <class T>
using attention_lse_t = std::conditional_t<sizeof(T) == 2, float, double>;

}  // namespace pynn

namespace pynn::PYNN_LAUNCH_NAMESPACE {

template <class T>
struct Attention {
  using F = accumulate_t<T>;
  using Lse = attention_lse_t<T>;
  using Input = AttentionOperand<const T*>;
  using Output = AttentionOperand<T*>;
  using PerHead = AttentionPerHead<F>;

  // Bytes of scratch that fwd wants.
  static int64_t fwd_scratch(const AttentionShape& shape);

  // lse: (heads, queries). Returns false when there is no memory for what the CPU kernels allocate themselves.
  static bool fwd(Output out, Lse* lse, Input query, Input key, Input value, AttentionMaskOperand mask,
                  PerHead per_head, AttentionShape shape, void* scratch, void* stream);

  // Bytes of scratch that bwd wants.
  static int64_t bwd_scratch(const AttentionMaskOperand& mask, const AttentionShape& shape, bool mask_gradient);

  // grad_key and grad_value are per key head. grad_mask has the mask's own shape, contiguous; nullptr when not wanted,
  // as grad_sinks (heads). grad_lse (heads, queries) is nullptr for zeros.
  static bool bwd(Output grad_query, Output grad_key, Output grad_value, F* grad_mask, F* grad_sinks, Input grad_out,
                  const Lse* grad_lse, Input query, Input key, Input value, AttentionMaskOperand mask, PerHead per_head,
                  Input out, const Lse* lse, AttentionShape shape, void* scratch, void* stream);

  // The weights of the values, P * keep / (1 - dropout_p), 0 where masked: (heads, queries, keys), or with `average`
  // their mean over the last batch dimension. lse is that of fwd. shape.value_dim does not matter.
  static bool weights(T* to, bool average, Input query, Input key, AttentionMaskOperand mask, PerHead per_head,
                      const Lse* lse, AttentionShape shape, void* stream);
};

// keep[e] = whether dropout keeps element e of P.
void attention_keep(bool* keep, AttentionShape shape, void* stream);

}  // namespace pynn::PYNN_LAUNCH_NAMESPACE
