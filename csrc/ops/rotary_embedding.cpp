// rotary_embedding: validation, allocation, launch. See csrc/include/rotary_embedding.h.
#include "rotary_embedding.h"

#include "library.h"

namespace pynn {
namespace {

constexpr const char* kOp = "rotary_embedding";

// Strides of (batch, heads, length): x has the last, the first and last, or all of these before its channels.
RotaryStrides strides_of(const Tensor& x) {
  const int64_t rank = x.dim();
  return {rank > 2 ? x.stride(0) : 0, rank > 3 ? x.stride(1) : 0, x.stride(-2)};
}

void check_table(const char* name, const Tensor& table, const Tensor& x) {
  check_same_device(kOp, name, table, "x", x);
  const ScalarType expected = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  PYNN_CHECK(table.scalar_type() == expected, kOp, ": expected ", name, " to be ", name_of(expected), ", got ",
             name_of(table.scalar_type()));
  const bool of_each = table.dim() == 3;
  PYNN_CHECK((table.dim() == 2 || (of_each && x.dim() > 2 && table.size(0) == x.size(0))) &&
                 table.size(-2) == x.size(-2) && table.size(-1) <= x.size(-1) / 2,
             kOp, ": expected ", name,
             " (length, pairs) or (batch, length, pairs) with at most half as many pairs as x ", shape_of(x),
             " has channels, got ", shape_of(table));
}

void check(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  check_floating(kOp, "x", x);
  PYNN_CHECK(x.dim() >= 2 && x.dim() <= 4, kOp,
             ": expected x (length, width), (batch, length, width) or (batch, heads, length, width), got ",
             shape_of(x));
  check_table("cos", cos, x);
  check_table("sin", sin, x);
  check_same_shape(kOp, "sin", sin, "cos", cos);
  int64_t count = 8;
  for (int64_t d = 0; d < x.dim(); ++d) count = checked_multiply(kOp, count, std::max<int64_t>(x.size(d), 1));
}

void launch_on(const Tensor& x, Tensor& y, const Tensor& cos_, const Tensor& sin_, bool interleaved, bool inverse) {
  if (x.numel() == 0) return;
  const Tensor cos = torch::stable::contiguous(cos_), sin = torch::stable::contiguous(sin_);
  const int64_t rank = x.dim(), pairs = cos.size(-1);
  dispatch_floating(kOp, x.scalar_type(), [&]<class T>(Tag<T>) {
    using F = accumulate_t<T>;
    RotaryEmbeddingCall<T> call{pointer<T>(x), mutable_pointer<T>(y), pointer<F>(cos), pointer<F>(sin)};
    call.x_strides = strides_of(x), call.y_strides = strides_of(y);
    call.batch = rank > 2 ? x.size(0) : 1, call.heads = rank > 3 ? x.size(1) : 1;
    call.length = x.size(-2), call.width = x.size(-1), call.pairs = pairs;
    call.table_row = pairs, call.table_batch = cos.dim() == 3 ? call.length * pairs : 0;
    call.interleaved = interleaved, call.inverse = inverse;
    launch::RotaryEmbedding<T>::run(call, current_stream(x));
  });
}

Tensor fwd(const Tensor& x_, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  check(x_, cos, sin);
  // Channels one after the other.
  const Tensor x = x_.size(-1) == 1 || x_.stride(-1) == 1 ? x_ : torch::stable::contiguous(x_);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  launch_on(x, y, cos, sin, interleaved, inverse);
  return y;
}

// In place no two elements of x may share memory.
void check_in_place(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  check(x, cos, sin);
  PYNN_CHECK(x.size(-1) < 2 || x.stride(-1) == 1, kOp,
             ": expected x whose channels lie one after the other, got stride ", x.stride(-1));
  for (int64_t d = 0; d < x.dim() - 1; ++d)
    PYNN_CHECK(x.size(d) < 2 || x.stride(d) >= x.size(-1), kOp, ": expected x that is not expanded, got stride ",
               x.stride(d), " in dimension ", d);
}

void in_place(Tensor x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  check_in_place(x, cos, sin);
  launch_on(x, x, cos, sin, interleaved, inverse);
}

}  // namespace

PYNN_LIBRARY(m) {
  m.impl("rotary_embedding_fwd", TORCH_BOX(&fwd));
  m.impl("rotary_embedding_in_place", TORCH_BOX(&in_place));
}

#ifdef PYNN_CHECKS
namespace {

void fwd_check(const Tensor& x, const Tensor& cos, const Tensor& sin, bool, bool) { check(x, cos, sin); }
void in_place_check(Tensor x, const Tensor& cos, const Tensor& sin, bool, bool) { check_in_place(x, cos, sin); }

}  // namespace

PYNN_CHECKS(m) {
  m.impl("rotary_embedding_fwd_check", TORCH_BOX(&fwd_check));
  m.impl("rotary_embedding_in_place_check", TORCH_BOX(&in_place_check));
}
#endif

}  // namespace pynn
