// Launchers of additive_attention (Bahdanau, Cho, Bengio 2015, arXiv 1409.0473).
//
//   S_ij = sum_d weight_d tanh(Q_id + K_jd) + mask_ij,  lse_i = log sum_j exp S_ij,  P = exp(S - lse),  out = P V
//
// Q (..., Lq, D), K (..., Lk, D), V (..., Lk, Dv): all leading dimensions together are "heads" here, numbered
// row-major. A score that is masked (bool false, float -inf) contributes nothing, whatever its key and value hold; a
// row without any score gives out 0 and lse -inf. With u_ijd = dS_ij (1 - tanh(Q_id + K_jd)^2) the gradients are
//
//   dS = P (grad_out V^T + grad_weights - delta),  delta = rowsum(P (grad_out V^T + grad_weights)),
//   dQ_id = weight_d sum_j u_ijd,  dK_jd = weight_d sum_i u_ijd,  dweight_d = sum_ij dS_ij tanh(Q_id + K_jd)
//
// so each of them is a sum over terms that are made when they are needed: nothing of Lq x Lk x D elements is stored.
// delta comes from the scores, not from rowsum(grad_out out): dS sums to nearly 0 over a row, and the rounding of out
// would be its largest error.
#pragma once
#include <cmath>

#include "scaled_dot_product_attention.h"

namespace pynn {

struct AdditiveShape {
  int batch_dims;
  int64_t batch[kAttentionBatchDims];
  int64_t heads;  // product of batch, of 31 bits
  int64_t queries, keys, dim, value_dim;
};

// Which scores take part, and what is added to them; strides in elements, 0 where the mask is broadcast.
template <class T>
struct ScoreMask {
  enum class Kind { none, boolean, floating, wide };  // wide: float32 beside another T
  using A = accumulate_t<T>;
  Kind kind;
  const void* data;
  int64_t batch[kAttentionBatchDims], row, column;

  PYNN_HD int64_t offset(const AdditiveShape& shape, int64_t head) const {
    int64_t at = 0;
    uint32_t left = uint32_t(head);
#ifdef __CUDACC__
#pragma unroll  // an index known to the compiler keeps the arrays out of local memory
#endif
    for (int d = kAttentionBatchDims - 1; d >= 0; --d) {
      if (d >= shape.batch_dims) continue;
      const uint32_t size = uint32_t(shape.batch[d]);
      at += int64_t(left % size) * batch[d];
      left /= size;
    }
    return at;
  }
  // Whether the score at `at` takes part; `added` is what the mask adds to it.
  PYNN_HD bool visible(int64_t at, A& added) const {
    added = 0;
    if (kind == Kind::none) return true;
    if (kind == Kind::boolean) return static_cast<const uint8_t*>(data)[at] != 0;
    added = kind == Kind::wide ? A(static_cast<const float*>(data)[at]) : to_float(static_cast<const T*>(data)[at]);
    return added != -A(INFINITY);
  }
};

// Every operand is contiguous.
template <class T>
struct AdditiveOperands {
  const T *query, *key, *value, *weight;
  ScoreMask<T> mask;
};

template <class T>
struct AdditiveSaved {
  const T* grad_out;
  const T* grad_weights;  // (heads, queries, keys), or nullptr for zeros
  const attention_lse_t<T>* lse;
};

template <class T>
struct AdditiveGradients {
  T *query, *key, *value, *weight;
  accumulate_t<T>* scores;  // (heads, queries, keys), or nullptr
};

}  // namespace pynn

namespace pynn::PYNN_LAUNCH_NAMESPACE {

template <class T>
struct AdditiveAttention {
  // Bytes of scratch that the passes want.
  static int64_t fwd_scratch(const AdditiveShape& shape);
  static int64_t bwd_scratch(const AdditiveShape& shape);

  // weights: (heads, queries, keys), the P of the formula, or nullptr. Both return false when there is no memory for
  // what the CPU kernels allocate themselves.
  static bool fwd(T* out, attention_lse_t<T>* lse, T* weights, const AdditiveOperands<T>& operands,
                  const AdditiveShape& shape, void* scratch, void* stream);
  static bool bwd(const AdditiveGradients<T>& gradients, const AdditiveSaved<T>& saved,
                  const AdditiveOperands<T>& operands, const AdditiveShape& shape, void* scratch, void* stream);
};

}  // namespace pynn::PYNN_LAUNCH_NAMESPACE
