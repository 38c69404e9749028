// additive_attention: validation, allocation, launch. See csrc/include/additive_attention.h.
#include "additive_attention.h"

#include "kept_scratch.h"
#include "library.h"

namespace pynn {
namespace {

using OptionalTensor = std::optional<Tensor>;
constexpr const char* kOp = "additive_attention";

struct AdditiveTensors {
  const Tensor &query, &key, &value, &weight;
  const OptionalTensor& attn_mask;
};

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

ScalarType sum_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
ScalarType lse_dtype(const Tensor& query) {
  const bool wide = query.scalar_type() == ScalarType::Double || query.scalar_type() == ScalarType::Float;
  return wide ? ScalarType::Double : ScalarType::Float;
}

void check_like_query(const char* name, const Tensor& tensor, const Tensor& query) {
  check_same_device(kOp, name, tensor, "query", query);
  check_same_dtype(kOp, name, tensor, "query", query);
}

// A tensor with the leading dimensions of query, then `rows`, and `columns` unless negative.
void check_led(const char* name, const Tensor& tensor, const Tensor& query, int64_t rows, int64_t columns) {
  const int64_t lead = query.dim() - 2;
  std::vector<int64_t> expected(query.sizes().begin(), query.sizes().end() - 2);
  expected.push_back(rows);
  if (columns >= 0) expected.push_back(columns);
  bool same = tensor.dim() == int64_t(expected.size());
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == expected[size_t(d)];
  PYNN_CHECK(same, kOp, ": expected ", name, " of shape ", to_string(Sizes(expected.data(), expected.size())),
             lead > 0 ? " (leading dimensions of query first), got " : ", got ", shape_of(tensor));
}

void check_mask(const AdditiveShape& shape, const Tensor& query, const Tensor& mask) {
  check_same_device(kOp, "attn_mask", mask, "query", query);
  const ScalarType dtype = mask.scalar_type();
  PYNN_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Float || dtype == query.scalar_type(), kOp,
             ": expected attn_mask dtype to be bool or float32 or to match query dtype, but got attn_mask.dtype: ",
             name_of(dtype), " and query.dtype: ", name_of(query.scalar_type()));
  const int64_t lead = query.dim() - mask.dim();
  bool fits = lead >= 0;
  for (int64_t d = 0; fits && d < mask.dim(); ++d) {
    const int64_t whole = lead + d == query.dim() - 1 ? shape.keys : query.size(lead + d);
    fits = mask.size(d) == 1 || mask.size(d) == whole;
  }
  PYNN_CHECK(fits, kOp, ": expected attn_mask that broadcasts to the scores (..., ", shape.queries, ", ", shape.keys,
             ") of query ", shape_of(query), ", got ", shape_of(mask));
}

AdditiveShape check(const AdditiveTensors& t) {
  const Tensor& query = t.query;
  check_floating(kOp, "query", query);
  const int64_t rank = query.dim();
  PYNN_CHECK(rank >= 2 && rank <= kAttentionBatchDims + 1, kOp, ": expected query with 2 to ", kAttentionBatchDims + 1,
             " dimensions, got ", rank, " (shape ", shape_of(query), ")");
  AdditiveShape shape{};
  shape.batch_dims = int(rank) - 2;
  shape.heads = 1;
  for (int d = 0; d < shape.batch_dims; ++d) {
    shape.batch[d] = query.size(d);
    shape.heads = checked_multiply(kOp, shape.heads, shape.batch[d]);
  }
  PYNN_CHECK(shape.heads <= INT32_MAX, kOp, ": expected leading dimensions of at most ", INT32_MAX,
             " matrices, got query ", shape_of(query));
  check_like_query("key", t.key, query);
  check_rank(kOp, "key", t.key, rank);
  check_like_query("value", t.value, query);
  check_rank(kOp, "value", t.value, rank);
  shape.queries = query.size(-2), shape.keys = t.key.size(-2), shape.dim = query.size(-1);
  shape.value_dim = t.value.size(-1);
  check_led("key", t.key, query, shape.keys, shape.dim);
  check_led("value", t.value, query, shape.keys, shape.value_dim);
  check_like_query("weight", t.weight, query);
  check_shape(kOp, "weight", t.weight, {shape.dim});
  if (t.attn_mask) check_mask(shape, query, *t.attn_mask);
  // Scores are numbered in 64 bits; scratch holds each operand several times, in 8 bytes per element.
  const int64_t widest = std::max(shape.dim, shape.value_dim) + 64, longest = std::max(shape.queries, shape.keys) + 64;
  checked_multiply(kOp, checked_multiply(kOp, std::max<int64_t>(shape.heads, 1), longest),
                   checked_multiply(kOp, widest, 256));
  checked_multiply(kOp, checked_multiply(kOp, shape.heads, shape.queries), checked_multiply(kOp, shape.keys, 8));
  return shape;
}

struct AdditiveSavedTensors {
  const Tensor& grad_out;
  const OptionalTensor& grad_weights;
  const Tensor& lse;
};

AdditiveShape check(const AdditiveTensors& t, const AdditiveSavedTensors& saved, bool mask_gradient) {
  const AdditiveShape shape = check(t);
  check_like_query("grad_out", saved.grad_out, t.query);
  check_led("grad_out", saved.grad_out, t.query, shape.queries, shape.value_dim);
  check_same_device(kOp, "lse", saved.lse, "query", t.query);
  PYNN_CHECK(saved.lse.scalar_type() == lse_dtype(t.query), kOp, ": expected lse to be ", name_of(lse_dtype(t.query)),
             ", got ", name_of(saved.lse.scalar_type()));
  check_led("lse", saved.lse, t.query, shape.queries, -1);
  if (saved.grad_weights) {
    check_like_query("grad_weights", *saved.grad_weights, t.query);
    check_led("grad_weights", *saved.grad_weights, t.query, shape.queries, shape.keys);
  }
  PYNN_CHECK(!mask_gradient || (t.attn_mask && is_floating(t.attn_mask->scalar_type())), kOp,
             ": expected a floating attn_mask to give it a gradient");
  return shape;
}

bool is_empty(const AdditiveShape& shape) { return shape.heads == 0 || shape.queries == 0 || shape.keys == 0; }

Tensor new_scores(const Tensor& query, const AdditiveShape& shape, ScalarType dtype) {
  std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end());
  sizes.back() = shape.keys;
  return torch::stable::new_empty(query, sizes, dtype);
}

// The operands as the launchers take them, kept alive.
struct AdditiveMemory {
  AdditiveMemory(const AdditiveTensors& t, const AdditiveShape& s)
      : shape(s),
        query(dense(t.query)),
        key(dense(t.key)),
        value(dense(t.value)),
        weight(dense(t.weight)),
        mask(t.attn_mask) {}

  template <class T>
  AdditiveOperands<T> operands() const {
    return {pointer<T>(query), pointer<T>(key), pointer<T>(value), pointer<T>(weight), score_mask<T>()};
  }

  const AdditiveShape& shape;
  Tensor query, key, value, weight;
  const OptionalTensor& mask;

 private:
  template <class T>
  ScoreMask<T> score_mask() const {
    using Kind = typename ScoreMask<T>::Kind;
    ScoreMask<T> result{};
    if (!mask) return result;
    const ScalarType dtype = mask->scalar_type();
    result.kind = dtype == ScalarType::Bool      ? Kind::boolean
                  : dtype == query.scalar_type() ? Kind::floating
                                                 : Kind::wide;
    result.data = mask->const_data_ptr();
    const int64_t rank = query.dim(), lead = rank - mask->dim();
    for (int64_t d = 0; d < mask->dim(); ++d) {
      const int64_t stride = mask->size(d) == 1 ? 0 : mask->stride(d), at = lead + d;
      (at == rank - 1 ? result.column : at == rank - 2 ? result.row : result.batch[at]) = stride;
    }
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                       const Tensor& weight, const OptionalTensor& attn_mask, bool return_weights) {
  const AdditiveTensors tensors{query, key, value, weight, attn_mask};
  const AdditiveShape shape = check(tensors);
  std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end());
  sizes.back() = shape.value_dim;
  Tensor out = torch::stable::new_empty(query, sizes);
  sizes.pop_back();
  Tensor lse = torch::stable::new_empty(query, sizes, lse_dtype(query));
  Tensor weights =
      return_weights ? new_scores(query, shape, query.scalar_type()) : new_dense(query, {0}, query.scalar_type());
  if (is_empty(shape)) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {out, lse, weights};
  }
  const AdditiveMemory memory(tensors, shape);
  dispatch_floating(kOp, query.scalar_type(), [&]<class T>(Tag<T>) {
    using Launch = launch::AdditiveAttention<T>;
    KeptScratch scratch(query, Launch::fwd_scratch(shape));
    const bool done = Launch::fwd(mutable_pointer<T>(out), mutable_pointer<attention_lse_t<T>>(lse),
                                  return_weights ? mutable_pointer<T>(weights) : nullptr, memory.operands<T>(), shape,
                                  scratch.get(), current_stream(query));
    PYNN_CHECK(done, kOp, ": out of memory");
  });
  return {out, lse, weights};
}

// The gradient of the scores is that of a mask of their whole shape; empty without mask_gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& grad_out, const OptionalTensor& grad_weights,
                                                       const Tensor& query, const Tensor& key, const Tensor& value,
                                                       const Tensor& weight, const OptionalTensor& attn_mask,
                                                       const Tensor& lse, bool mask_gradient) {
  const AdditiveTensors tensors{query, key, value, weight, attn_mask};
  const AdditiveShape shape = check(tensors, {grad_out, grad_weights, lse}, mask_gradient);
  const auto like = [](const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); };
  Tensor grad_query = like(query), grad_key = like(key), grad_value = like(value), grad_weight = like(weight);
  Tensor grad_scores =
      mask_gradient ? new_scores(query, shape, sum_dtype(query)) : new_dense(query, {0}, sum_dtype(query));
  if (is_empty(shape)) {
    for (Tensor* grad : {&grad_query, &grad_key, &grad_value, &grad_weight, &grad_scores}) torch::stable::zero_(*grad);
    return {grad_query, grad_key, grad_value, grad_weight, grad_scores};
  }
  const AdditiveMemory memory(tensors, shape);
  const Tensor dense_grad = dense(grad_out), dense_lse = dense(lse);
  const Tensor dense_grad_weights = grad_weights ? dense(*grad_weights) : grad_out;
  dispatch_floating(kOp, query.scalar_type(), [&]<class T>(Tag<T>) {
    using Launch = launch::AdditiveAttention<T>;
    KeptScratch scratch(query, Launch::bwd_scratch(shape));
    const AdditiveGradients<T> gradients{mutable_pointer<T>(grad_query), mutable_pointer<T>(grad_key),
                                         mutable_pointer<T>(grad_value), mutable_pointer<T>(grad_weight),
                                         mask_gradient ? mutable_pointer<accumulate_t<T>>(grad_scores) : nullptr};
    const AdditiveSaved<T> saved{pointer<T>(dense_grad), grad_weights ? pointer<T>(dense_grad_weights) : nullptr,
                                 pointer<attention_lse_t<T>>(dense_lse)};
    const bool done = Launch::bwd(gradients, saved, memory.operands<T>(), shape, scratch.get(), current_stream(query));
    PYNN_CHECK(done, kOp, ": out of memory");
  });
  return {grad_query, grad_key, grad_value, grad_weight, grad_scores};
}

}  // namespace

PYNN_LIBRARY(m) {
  m.impl("additive_attention_fwd", TORCH_BOX(&fwd));
  m.impl("additive_attention_bwd", TORCH_BOX(&bwd));
}

#ifdef PYNN_CHECKS
namespace {

void fwd_check(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& weight,
               const OptionalTensor& attn_mask, bool) {
  check({query, key, value, weight, attn_mask});
}

void bwd_check(const Tensor& grad_out, const OptionalTensor& grad_weights, const Tensor& query, const Tensor& key,
               const Tensor& value, const Tensor& weight, const OptionalTensor& attn_mask, const Tensor& lse,
               bool mask_gradient) {
  check({query, key, value, weight, attn_mask}, {grad_out, grad_weights, lse}, mask_gradient);
}

}  // namespace

PYNN_CHECKS(m) {
  m.impl("additive_attention_fwd_check", TORCH_BOX(&fwd_check));
  m.impl("additive_attention_bwd_check", TORCH_BOX(&bwd_check));
}
#endif

}  // namespace pynn
