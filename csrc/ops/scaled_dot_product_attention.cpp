// scaled_dot_product_attention: validation, allocation, launch. See csrc/include/scaled_dot_product_attention.h.
#include "scaled_dot_product_attention.h"

#include <array>

#include "library.h"

namespace pynn {
namespace {

using OptionalTensor = std::optional<Tensor>;
constexpr const char* kOp = "scaled_dot_product_attention";

AttentionMask mask_kind(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
      return AttentionMask::kBool;
    case ScalarType::Double:
      return AttentionMask::kDouble;
    case ScalarType::Float:
      return AttentionMask::kFloat;
    case ScalarType::Half:
      return AttentionMask::kHalf;
    default:
      return AttentionMask::kBFloat16;
  }
}

ScalarType sum_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_query_key(AttentionShape& shape, const Tensor& query, const Tensor& key) {
  const int64_t rank = query.dim();
  PYNN_CHECK(rank >= 2 && key.dim() >= 2, kOp, ": expected query, key and value to all be at least 2 dimensional, got ",
             "query.dim: ", rank, " key.dim: ", key.dim());
  PYNN_CHECK(rank <= kAttentionBatchDims + 1, kOp, ": expected query with at most ", kAttentionBatchDims + 1,
             " dimensions, got ", rank);
  check_floating(kOp, "query", query);
  check_same_device(kOp, "key", key, "query", query);
  check_same_dtype(kOp, "key", key, "query", query);
  check_rank(kOp, "key", key, rank);
  PYNN_CHECK(key.size(-1) == query.size(-1), kOp, ": expected query and key with the same last dimension, got ",
             shape_of(query), " and ", shape_of(key));
  shape.batch_dims = int(rank) - 2;
  shape.heads = 1;
  for (int d = 0; d < shape.batch_dims; ++d) {
    shape.batch[d] = query.size(d);
    shape.heads = checked_multiply(kOp, shape.heads, shape.batch[d]);
    const bool fits = d == shape.batch_dims - 1 ? key.size(d) > 0 && query.size(d) % key.size(d) == 0 : false;
    PYNN_CHECK(fits || key.size(d) == query.size(d), kOp, ": expected key ", shape_of(key),
               " with the leading dimensions of query ", shape_of(query),
               ", or a number of heads that divides the number of heads in query");
  }
  shape.group = 1;
  if (shape.batch_dims == 0)
    shape.batch_dims = 1, shape.batch[0] = 1;
  else if (key.size(rank - 3) > 0)
    shape.group = query.size(rank - 3) / key.size(rank - 3);
  if (shape.group == 0) shape.group = 1;  // no query heads at all
  shape.queries = query.size(-2), shape.keys = key.size(-2), shape.dim = query.size(-1);
  // Scores are numbered in 64 bits, and scratch holds a padded copy of every operand in up to 8 bytes per element.
  checked_multiply(kOp, checked_multiply(kOp, shape.heads, shape.queries), shape.keys);
  checked_multiply(kOp, checked_multiply(kOp, shape.keys + 256, shape.dim + 64), 64);
}

void check_value(AttentionShape& shape, const Tensor& key, const Tensor& value) {
  check_same_device(kOp, "value", value, "key", key);
  check_same_dtype(kOp, "value", value, "key", key);
  check_rank(kOp, "value", value, key.dim());
  for (int64_t d = 0; d < key.dim() - 1; ++d)
    PYNN_CHECK(value.size(d) == key.size(d), kOp, ": expected value ", shape_of(value),
               " with the dimensions of key but the last, ", shape_of(key));
  shape.value_dim = value.size(-1);
  checked_multiply(kOp, checked_multiply(kOp, shape.keys + 256, shape.value_dim + 64), 64);
}

double check_softcap(double softcap) {
  PYNN_CHECK(softcap >= 0 && softcap <= std::numeric_limits<double>::max(), kOp,
             ": expected softcap to be 0, for none, or above it and finite, got ", softcap);
  return softcap;
}

// The key is read by the CPU kernels when they run and by GPU kernels on the device.
Tensor check_dropout(AttentionShape& shape, const Tensor& query, const OptionalTensor& key, double dropout_p) {
  PYNN_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout probability has to be between 0 and 1, but got ", dropout_p);
  PYNN_CHECK(key.has_value() || dropout_p == 0, kOp, ": expected dropout_key with dropout_p > 0");
  shape.dropout_p = dropout_p;
  shape.dropout_key = nullptr;
  if (!key) return query;
  check_same_device(kOp, "dropout_key", *key, "query", query);
  PYNN_CHECK(key->scalar_type() == ScalarType::Long, kOp, ": expected dropout_key to be int64, got ",
             name_of(key->scalar_type()));
  check_shape(kOp, "dropout_key", *key, {2});
  Tensor contiguous = torch::stable::contiguous(*key);
  if (dropout_p > 0) shape.dropout_key = pointer<int64_t>(contiguous);
  return contiguous;
}

// The keys that a query sees, from the diagonal on: `left` and `right` of it, or all where negative.
void set_window(AttentionShape& shape, int64_t left, int64_t right, bool lower_right) {
  shape.diagonal = lower_right ? shape.keys - shape.queries : 0;
  shape.lower =
      left < 0 ? -shape.queries : std::max(shape.diagonal - std::min(left, shape.queries + shape.keys), -shape.queries);
  shape.upper =
      right < 0 ? shape.keys : std::min(shape.diagonal + std::min(right, shape.queries + shape.keys), shape.keys);
}

Tensor check_ranges(const char* name, const Tensor& query, const OptionalTensor& ranges, int64_t rows,
                    int64_t columns) {
  if (!ranges) return query;
  check_same_device(kOp, name, *ranges, "query", query);
  PYNN_CHECK(ranges->scalar_type() == ScalarType::Int, kOp, ": expected ", name, " to be int32, got ",
             name_of(ranges->scalar_type()));
  check_shape(kOp, name, *ranges, {rows, columns});
  return torch::stable::contiguous(*ranges);
}

// What queries of packed sequences see, kept alive as long as the shape points to it.
std::array<Tensor, 2> set_ranges(AttentionShape& shape, const Tensor& query, const OptionalTensor& key_ranges,
                                 const OptionalTensor& query_ranges) {
  PYNN_CHECK(key_ranges.has_value() == query_ranges.has_value(), kOp,
             ": expected both key_ranges and query_ranges, or none of them");
  std::array<Tensor, 2> ranges = {check_ranges("key_ranges", query, key_ranges, shape.queries, 4),
                                  check_ranges("query_ranges", query, query_ranges, shape.keys, 2)};
  if (key_ranges) {
    shape.key_ranges = reinterpret_cast<const AttentionKeyRange*>(pointer<int32_t>(ranges[0]));
    shape.query_ranges = reinterpret_cast<const AttentionQueryRange*>(pointer<int32_t>(ranges[1]));
  }
  return ranges;
}

// A number for every head, in the precision of sums.
Tensor check_per_head(const char* name, const Tensor& query, const OptionalTensor& numbers) {
  if (!numbers) return query;
  check_same_device(kOp, name, *numbers, "query", query);
  PYNN_CHECK(numbers->scalar_type() == sum_dtype(query), kOp, ": expected ", name, " to be ", name_of(sum_dtype(query)),
             ", got ", name_of(numbers->scalar_type()));
  check_rank(kOp, name, *numbers, query.dim() - 2);
  for (int64_t d = 0; d < numbers->dim(); ++d)
    PYNN_CHECK(numbers->size(d) == query.size(d), kOp, ": expected ", name, " with the leading dimensions of query ",
               shape_of(query), ", got ", shape_of(*numbers));
  return torch::stable::contiguous(*numbers);
}

struct PerHeadTensors {
  Tensor alibi_slopes, sinks;
  bool has_alibi_slopes, has_sinks;
  template <class F>
  AttentionPerHead<F> pointers() const {
    return {has_alibi_slopes ? pointer<F>(alibi_slopes) : nullptr, has_sinks ? pointer<F>(sinks) : nullptr};
  }
};

PerHeadTensors check_heads(const AttentionShape& shape, const Tensor& query, const OptionalTensor& alibi_slopes,
                           const OptionalTensor& sinks) {
  PYNN_CHECK(!sinks || shape.keys > 0, kOp, ": expected at least one key together with sinks, got key ", shape.keys);
  return {check_per_head("alibi_slopes", query, alibi_slopes), check_per_head("sinks", query, sinks),
          alibi_slopes.has_value(), sinks.has_value()};
}

AttentionMaskOperand check_mask(const AttentionShape& shape, const Tensor& query, const OptionalTensor& attn_mask) {
  AttentionMaskOperand mask{};
  if (!attn_mask) return mask;
  const Tensor& m = *attn_mask;
  check_same_device(kOp, "attn_mask", m, "query", query);
  const ScalarType dtype = m.scalar_type();
  PYNN_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Float || dtype == query.scalar_type(),
             "Expected attn_mask dtype to be bool or float or to match query dtype, but got attn_mask.dtype: ",
             name_of(dtype), " and query.dtype: ", name_of(query.scalar_type()), " instead.");
  const int64_t lead = query.dim() - m.dim();
  PYNN_CHECK(lead >= 0, kOp, ": expected attn_mask with at most ", query.dim(), " dimensions, got ", shape_of(m));
  mask.kind = mask_kind(dtype);
  mask.operand.data = m.const_data_ptr();
  mask.rows = mask.columns = 1;
  for (int64_t d = 0; d < shape.batch_dims; ++d) mask.batch[d] = 1;
  for (int64_t d = 0; d < m.dim(); ++d) {
    const int64_t size = m.size(d), stride = size == 1 ? 0 : m.stride(d), at = lead + d;
    const int64_t whole = at == query.dim() - 1 ? shape.keys : query.size(at);
    PYNN_CHECK(size == 1 || size == whole, kOp, ": expected attn_mask that broadcasts to the scores (..., ",
               shape.queries, ", ", shape.keys, ") of query ", shape_of(query), ", got ", shape_of(m));
    if (at == query.dim() - 1)
      mask.columns = size, mask.operand.column = stride;
    else if (at == query.dim() - 2)
      mask.rows = size, mask.operand.row = stride;
    else
      mask.batch[at] = size, mask.operand.batch[at] = stride;
  }
  return mask;
}

template <class Pointer>
AttentionOperand<Pointer> operand(Pointer data, const Tensor& tensor) {
  AttentionOperand<Pointer> result{data, {}, tensor.stride(-2), tensor.stride(-1)};
  for (int64_t d = 0; d < tensor.dim() - 2; ++d) result.batch[d] = tensor.stride(d);
  return result;
}
template <class T>
AttentionOperand<const T*> reading(const Tensor& tensor) {
  return operand(pointer<T>(tensor), tensor);
}
template <class T>
AttentionOperand<T*> writing(Tensor& tensor) {
  return operand(mutable_pointer<T>(tensor), tensor);
}

// (..., H, L, width) stored as (..., L, H, width), so that joining the heads afterwards is free.
Tensor new_heads(const Tensor& like, int64_t width) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  const size_t rank = sizes.size();
  sizes[rank - 1] = width;
  if (rank < 4) return torch::stable::new_empty(like, sizes);
  std::swap(sizes[rank - 3], sizes[rank - 2]);
  return torch::stable::transpose(torch::stable::new_empty(like, sizes), -3, -2);
}

ScalarType lse_dtype(const Tensor& query) {
  const bool wide = query.scalar_type() == ScalarType::Double || query.scalar_type() == ScalarType::Float;
  return wide ? ScalarType::Double : ScalarType::Float;
}

bool is_empty(const AttentionShape& shape) { return shape.heads == 0 || shape.queries == 0 || shape.keys == 0; }

// The operands of forward and backward, validated. Its tensors live as long as `shape` and `per_head` point to them.
struct Checked {
  AttentionShape shape{};
  AttentionMaskOperand mask;
  std::array<Tensor, 2> ranges;
  Tensor random;
  PerHeadTensors per_head;
  Checked(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
          const OptionalTensor& dropout_key, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
          const OptionalTensor& key_ranges, const OptionalTensor& query_ranges, double dropout_p, int64_t left,
          int64_t right, bool lower_right, double scale, double softcap)
      : ranges{query, query}, random(query), per_head{query, query, false, false} {
    shape.scale = scale, shape.softcap = check_softcap(softcap);
    check_query_key(shape, query, key);
    check_value(shape, key, value);
    set_window(shape, left, right, lower_right);
    ranges = set_ranges(shape, query, key_ranges, query_ranges);
    random = check_dropout(shape, query, dropout_key, dropout_p);
    mask = check_mask(shape, query, attn_mask);
    per_head = check_heads(shape, query, alibi_slopes, sinks);
  }
};

std::tuple<Tensor, Tensor> fwd(const Tensor& query, const Tensor& key, const Tensor& value,
                               const OptionalTensor& attn_mask, const OptionalTensor& dropout_key,
                               const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                               const OptionalTensor& key_ranges, const OptionalTensor& query_ranges, double dropout_p,
                               int64_t left, int64_t right, bool lower_right, double scale, double softcap) {
  const Checked checked(query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, query_ranges,
                        dropout_p, left, right, lower_right, scale, softcap);
  const auto& [shape, mask, ranges, random, per_head] = checked;
  Tensor out = new_heads(query, shape.value_dim);
  const std::vector<int64_t> rows(query.sizes().begin(), query.sizes().end() - 1);
  Tensor lse = torch::stable::new_empty(query, rows, lse_dtype(query));
  if (is_empty(shape)) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {out, lse};
  }
  dispatch_floating(kOp, query.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    Scratch scratch(query, launch::Attention<T>::fwd_scratch(shape));
    const bool done = launch::Attention<T>::fwd(
        writing<T>(out), mutable_pointer<attention_lse_t<T>>(lse), reading<T>(query), reading<T>(key),
        reading<T>(value), mask, per_head.pointers<accumulate_t<T>>(), shape, scratch.get(), current_stream(query));
    PYNN_CHECK(done, kOp, ": out of memory");
  });
  return {out, lse};
}

void check_lse(const char* name, const Tensor& query, const Tensor& lse) {
  check_same_device(kOp, name, lse, "query", query);
  PYNN_CHECK(lse.scalar_type() == lse_dtype(query), kOp, ": expected ", name, " to be ", name_of(lse_dtype(query)),
             ", got ", name_of(lse.scalar_type()));
  check_rank(kOp, name, lse, query.dim() - 1);
  for (int64_t d = 0; d < lse.dim(); ++d)
    PYNN_CHECK(lse.size(d) == query.size(d), kOp, ": expected ", name,
               " with the shape of query but the last dimension, got ", shape_of(lse));
}

// What backward takes besides the operands of forward.
void check_backward(const AttentionShape& shape, const Tensor& grad_out, const OptionalTensor& grad_lse,
                    const Tensor& query, const OptionalTensor& attn_mask, const OptionalTensor& sinks,
                    const Tensor& out, const Tensor& lse, bool mask_gradient, bool sinks_gradient) {
  check_same_device(kOp, "out", out, "query", query);
  check_same_dtype(kOp, "out", out, "query", query);
  check_rank(kOp, "out", out, query.dim());
  for (int64_t d = 0; d < query.dim(); ++d)
    PYNN_CHECK(out.size(d) == (d == query.dim() - 1 ? shape.value_dim : query.size(d)), kOp,
               ": expected out with the shape of query but a last dimension of ", shape.value_dim, ", got ",
               shape_of(out));
  check_same_device(kOp, "grad_out", grad_out, "query", query);
  check_same_dtype(kOp, "grad_out", grad_out, "query", query);
  check_same_shape(kOp, "grad_out", grad_out, "out", out);
  check_lse("lse", query, lse);
  if (grad_lse) check_lse("grad_lse", query, *grad_lse);
  PYNN_CHECK(!mask_gradient || (attn_mask && is_floating(attn_mask->scalar_type())), kOp,
             ": expected a floating attn_mask to give it a gradient");
  PYNN_CHECK(!sinks_gradient || sinks, kOp, ": expected sinks to give them a gradient");
}

struct Gradients {
  Tensor query, key, value, mask, sinks;
};

// `allocate` gives memory for the gradients of query, key and value once their shapes are known to be right.
template <class Allocate>
Gradients backward(const Checked& checked, const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query,
                   const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask, const OptionalTensor& sinks,
                   const Tensor& out, const Tensor& lse, bool mask_gradient, bool sinks_gradient,
                   const Allocate& allocate) {
  const auto& [shape, mask, ranges, random, per_head] = checked;
  check_backward(shape, grad_out, grad_lse, query, attn_mask, sinks, out, lse, mask_gradient, sinks_gradient);

  auto [grad_query, grad_key, grad_value] = allocate(shape);
  const ScalarType accumulate = sum_dtype(query);
  Tensor grad_mask = mask_gradient ? torch::stable::new_empty(query, attn_mask->sizes(), accumulate)
                                   : torch::stable::new_empty(query, {0});
  Tensor grad_sinks = torch::stable::new_empty(
      query,
      sinks_gradient ? std::vector<int64_t>(sinks->sizes().begin(), sinks->sizes().end()) : std::vector<int64_t>{0},
      accumulate);
  if (is_empty(shape)) {
    for (Tensor* grad : {&grad_query, &grad_key, &grad_value, &grad_mask, &grad_sinks}) torch::stable::zero_(*grad);
  } else {
    const Tensor log_sums = torch::stable::contiguous(lse);
    const Tensor grad_log_sums = grad_lse ? torch::stable::contiguous(*grad_lse) : log_sums;
    dispatch_floating(kOp, query.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      using F = accumulate_t<T>;
      Scratch scratch(query, launch::Attention<T>::bwd_scratch(mask, shape, mask_gradient));
      using Lse = attention_lse_t<T>;
      const bool done = launch::Attention<T>::bwd(
          writing<T>(grad_query), writing<T>(grad_key), writing<T>(grad_value),
          mask_gradient ? mutable_pointer<F>(grad_mask) : nullptr,
          sinks_gradient ? mutable_pointer<F>(grad_sinks) : nullptr, reading<T>(grad_out),
          grad_lse ? pointer<Lse>(grad_log_sums) : nullptr, reading<T>(query), reading<T>(key), reading<T>(value), mask,
          per_head.pointers<F>(), reading<T>(out), pointer<Lse>(log_sums), shape, scratch.get(), current_stream(query));
      PYNN_CHECK(done, kOp, ": out of memory");
    });
  }
  if (mask_gradient && attn_mask->scalar_type() != accumulate)
    grad_mask = torch::stable::to(grad_mask, attn_mask->scalar_type());
  return {grad_query, grad_key, grad_value, grad_mask, grad_sinks};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& attn_mask, const OptionalTensor& dropout_key, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& key_ranges, const OptionalTensor& query_ranges,
    const Tensor& out, const Tensor& lse, double dropout_p, int64_t left, int64_t right, bool lower_right, double scale,
    double softcap, bool mask_gradient, bool sinks_gradient) {
  const auto allocate = [&](const AttentionShape& s) -> std::array<Tensor, 3> {
    return {new_heads(query, s.dim), new_heads(key, s.dim), new_heads(value, s.value_dim)};
  };
  const Checked checked(query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, query_ranges,
                        dropout_p, left, right, lower_right, scale, softcap);
  Gradients g = backward(checked, grad_out, grad_lse, query, key, value, attn_mask, sinks, out, lse, mask_gradient,
                         sinks_gradient, allocate);
  return {g.query, g.key, g.value, g.mask, g.sinks};
}

void check_packed(const AttentionShape& shape, const Tensor& query, const Tensor& key, const Tensor& value,
                  bool with_query) {
  PYNN_CHECK(query.dim() == 4 && shape.value_dim == shape.dim && (!with_query || shape.queries == shape.keys), kOp,
             ": expected query, key and value (N, heads, length, D) of one projection, got ", shape_of(query), ", ",
             shape_of(key), " and ", shape_of(value));
}

// The same for query, key and value (N, heads, length, D) of one projection: their gradients lie next to each other as
// in it, (N, length, heads of all three, D), or the other way round with sequence_first. Unless with_query, query is a
// projection of its own.
std::tuple<Tensor, Tensor, Tensor, Tensor> packed_bwd(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& attn_mask, const OptionalTensor& dropout_key, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& key_ranges, const OptionalTensor& query_ranges,
    const Tensor& out, const Tensor& lse, double dropout_p, int64_t left, int64_t right, bool lower_right, double scale,
    double softcap, bool mask_gradient, bool sinks_gradient, bool with_query, bool sequence_first) {
  Tensor own = torch::stable::new_empty(query, {0}), packed = own;
  const auto new_packed = [&](int64_t length, int64_t heads, int64_t dim) {
    const int64_t batch = query.size(0);
    return sequence_first ? new_dense(query, {length, batch, heads, dim}, query.scalar_type())
                          : new_dense(query, {batch, length, heads, dim}, query.scalar_type());
  };
  // Some of its heads as (N, heads, length, D).
  const auto heads_of = [&](Tensor& from, int64_t first, int64_t count) {
    const Tensor some = torch::stable::narrow(from, 2, first, count);
    return torch::stable::transpose(sequence_first ? torch::stable::transpose(some, 0, 1) : some, 1, 2);
  };
  const auto allocate = [&](const AttentionShape& s) -> std::array<Tensor, 3> {
    check_packed(s, query, key, value, with_query);
    const int64_t heads = query.size(1), key_heads = key.size(1), begin = with_query ? heads : 0;
    packed = new_packed(s.keys, begin + 2 * key_heads, s.dim);
    if (!with_query) own = new_packed(s.queries, heads, s.dim);
    return {heads_of(with_query ? packed : own, 0, heads), heads_of(packed, begin, key_heads),
            heads_of(packed, begin + key_heads, key_heads)};
  };
  const Checked checked(query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, query_ranges,
                        dropout_p, left, right, lower_right, scale, softcap);
  Gradients g = backward(checked, grad_out, grad_lse, query, key, value, attn_mask, sinks, out, lse, mask_gradient,
                         sinks_gradient, allocate);
  return {packed, own, g.mask, g.sinks};
}

void check_weights(const Tensor& query, const Tensor& lse, bool average) {
  check_lse("lse", query, lse);
  PYNN_CHECK(!average || query.dim() > 2, kOp, ": expected query with heads to average over, got ", shape_of(query));
}

// The weights of the values, or their mean over the last batch dimension.
Tensor weights(const Tensor& query, const Tensor& key, const OptionalTensor& attn_mask,
               const OptionalTensor& dropout_key, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
               const OptionalTensor& key_ranges, const OptionalTensor& query_ranges, const Tensor& lse,
               double dropout_p, int64_t left, int64_t right, bool lower_right, double scale, double softcap,
               bool average) {
  const Checked checked(query, key, key, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, query_ranges,
                        dropout_p, left, right, lower_right, scale, softcap);
  const auto& [shape, mask, ranges, random, per_head] = checked;
  check_weights(query, lse, average);
  std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end());
  sizes.back() = shape.keys;
  if (average) sizes.erase(sizes.end() - 3);
  Tensor result = torch::stable::new_empty(query, sizes);
  if (is_empty(shape)) {
    torch::stable::zero_(result);
    return result;
  }
  const Tensor log_sums = torch::stable::contiguous(lse);
  dispatch_floating(kOp, query.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool done = launch::Attention<T>::weights(
        mutable_pointer<T>(result), average, reading<T>(query), reading<T>(key), mask,
        per_head.pointers<accumulate_t<T>>(), pointer<attention_lse_t<T>>(log_sums), shape, current_stream(query));
    PYNN_CHECK(done, kOp, ": out of memory");
  });
  return result;
}

// The dropout mask of the scores of query and key: (..., H, Lq, Lk), true where an element is kept.
Tensor keep(const Tensor& query, const Tensor& key, const Tensor& dropout_key, double dropout_p) {
  AttentionShape shape{};
  check_query_key(shape, query, key);
  const Tensor random = check_dropout(shape, query, dropout_key, dropout_p);
  std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end());
  sizes.back() = shape.keys;
  Tensor mask = torch::stable::new_empty(query, sizes, ScalarType::Bool);
  if (is_empty(shape)) return mask;
  if (shape.dropout_key)
    launch::attention_keep(mutable_pointer<bool>(mask), shape, current_stream(query));
  else
    torch::stable::fill_(mask, 1);
  return mask;
}

}  // namespace

PYNN_LIBRARY(m) {
  m.impl("scaled_dot_product_attention_fwd", TORCH_BOX(&fwd));
  m.impl("scaled_dot_product_attention_bwd", TORCH_BOX(&bwd));
  m.impl("scaled_dot_product_attention_keep", TORCH_BOX(&keep));
  m.impl("attention_weights", TORCH_BOX(&weights));
  m.impl("multi_head_attention_bwd", TORCH_BOX(&packed_bwd));
}

#ifdef PYNN_CHECKS
namespace {

void fwd_check(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
               const OptionalTensor& dropout_key, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
               const OptionalTensor& key_ranges, const OptionalTensor& query_ranges, double dropout_p, int64_t left,
               int64_t right, bool lower_right, double scale, double softcap) {
  Checked(query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, query_ranges, dropout_p, left,
          right, lower_right, scale, softcap);
}

void bwd_check(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
               const Tensor& value, const OptionalTensor& attn_mask, const OptionalTensor& dropout_key,
               const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& key_ranges,
               const OptionalTensor& query_ranges, const Tensor& out, const Tensor& lse, double dropout_p, int64_t left,
               int64_t right, bool lower_right, double scale, double softcap, bool mask_gradient, bool sinks_gradient) {
  const Checked checked(query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, query_ranges,
                        dropout_p, left, right, lower_right, scale, softcap);
  check_backward(checked.shape, grad_out, grad_lse, query, attn_mask, sinks, out, lse, mask_gradient, sinks_gradient);
}

void packed_bwd_check(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
                      const Tensor& value, const OptionalTensor& attn_mask, const OptionalTensor& dropout_key,
                      const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& key_ranges,
                      const OptionalTensor& query_ranges, const Tensor& out, const Tensor& lse, double dropout_p,
                      int64_t left, int64_t right, bool lower_right, double scale, double softcap, bool mask_gradient,
                      bool sinks_gradient, bool with_query, bool) {
  const Checked checked(query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, query_ranges,
                        dropout_p, left, right, lower_right, scale, softcap);
  check_backward(checked.shape, grad_out, grad_lse, query, attn_mask, sinks, out, lse, mask_gradient, sinks_gradient);
  check_packed(checked.shape, query, key, value, with_query);
}

void weights_check(const Tensor& query, const Tensor& key, const OptionalTensor& attn_mask,
                   const OptionalTensor& dropout_key, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                   const OptionalTensor& key_ranges, const OptionalTensor& query_ranges, const Tensor& lse,
                   double dropout_p, int64_t left, int64_t right, bool lower_right, double scale, double softcap,
                   bool average) {
  Checked(query, key, key, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, query_ranges, dropout_p, left,
          right, lower_right, scale, softcap);
  check_weights(query, lse, average);
}

void keep_check(const Tensor& query, const Tensor& key, const Tensor& dropout_key, double dropout_p) {
  AttentionShape shape{};
  check_query_key(shape, query, key);
  check_dropout(shape, query, dropout_key, dropout_p);
}

}  // namespace

PYNN_CHECKS(m) {
  m.impl("scaled_dot_product_attention_fwd_check", TORCH_BOX(&fwd_check));
  m.impl("scaled_dot_product_attention_bwd_check", TORCH_BOX(&bwd_check));
  m.impl("scaled_dot_product_attention_keep_check", TORCH_BOX(&keep_check));
  m.impl("attention_weights_check", TORCH_BOX(&weights_check));
  m.impl("multi_head_attention_bwd_check", TORCH_BOX(&packed_bwd_check));
}
#endif

}  // namespace pynn
