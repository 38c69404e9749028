// Attention, backward: which worker owns what. See scaled_dot_product_attention_backward.h.
#include "scaled_dot_product_attention_backward.h"

#include <atomic>
#include <vector>

#include "parallel.h"

namespace pynn::cpu {
namespace {
using namespace attention;

// From so many terms of an element on, its sum is formed in double.
constexpr int64_t kManyTerms = 9;

// Matrices (rows, columns) of the mask, each shared by some heads.
int64_t matrices_of(const AttentionMaskOperand& mask, const AttentionShape& shape) {
  int64_t count = 1;
  for (int d = 0; d < shape.batch_dims; ++d) count *= mask.batch[d];
  return count;
}

// Gradient of the mask. A task owns one of the mask's own matrices (a block of its rows, unless there is only one) and
// sums over the heads that share it in order.
template <class T, class Sum, class Worker>
void mask_gradient(accumulate_t<T>* grad_mask, const AttentionMaskOperand& mask, const AttentionShape& shape,
                   const Worker& for_items) {
  std::vector<int64_t> sharing{0};  // heads that share a matrix, relative to the first of them
  for (int64_t d = shape.batch_dims - 1, step = 1; d >= 0; step *= shape.batch[d], --d) {
    if (mask.batch[d] != 1) continue;
    std::vector<int64_t> more;
    for (int64_t index = 0; index < shape.batch[d]; ++index)
      for (int64_t head : sharing) more.push_back(index * step + head);
    sharing = std::move(more);
  }
  const int64_t height = block_rows(shape), blocks = divide_up(shape.queries, height),
                row_blocks = mask.rows == 1 ? 1 : blocks;
  for_items(matrices_of(mask, shape) * row_blocks, [&](Backward<T>& backward, int64_t item) {
    int64_t matrix = item / row_blocks, first_head = 0;
    for (int64_t d = shape.batch_dims - 1, step = 1; d >= 0; step *= shape.batch[d], --d) {
      first_head += matrix % mask.batch[d] * step;
      matrix /= mask.batch[d];
    }
    const int64_t begin = mask.rows == 1 ? 0 : item % row_blocks, end = mask.rows == 1 ? blocks : begin + 1;
    const int64_t rows = mask.rows == 1 ? 1 : std::min(height, shape.queries - begin * height);
    Scratch scratch;
    Sum* sums = scratch.take<Sum>(rows * mask.columns);
    if (scratch.failed) return false;
    std::fill(sums, sums + rows * mask.columns, Sum(0));
    for (int64_t head : sharing) {
      backward.load_keys(first_head + head, 0, shape.keys);
      for (int64_t b = begin; b < end; ++b) {
        backward.load_queries(first_head + head, b * height, std::min(height, shape.queries - b * height));
        backward.add_mask_gradient(sums);
      }
    }
    accumulate_t<T>* to =
        grad_mask + ((item / row_blocks) * mask.rows + (mask.rows == 1 ? 0 : begin * height)) * mask.columns;
    for (int64_t j = 0; j < rows * mask.columns; ++j) to[j] = accumulate_t<T>(sums[j]);
    return true;
  });
}

}  // namespace

template <class T>
int64_t Attention<T>::bwd_scratch(const AttentionMaskOperand&, const AttentionShape&, bool) {
  return 0;  // workers allocate what they need
}

template <class T>
bool Attention<T>::bwd(Output grad_query, Output grad_key, Output grad_value, F* grad_mask, F* grad_sinks,
                       Input grad_out, const Lse* grad_lse, Input query, Input key, Input value,
                       AttentionMaskOperand mask, PerHead per_head, Input out, const Lse* lse, AttentionShape shape,
                       void*, void*) {
  const int64_t key_heads = shape.heads / shape.group;
  const int64_t height = block_rows(shape), block = block_keys(shape);
  const int64_t query_blocks = divide_up(shape.queries, height), key_blocks = divide_up(shape.keys, block);
  const int64_t blocks = query_blocks * shape.group;  // of queries, per key head
  const int64_t threads = thread_count();
  // A mask with a number for every score gets its gradient on the way, and so does any other where one thread meets all
  // heads in their order. Otherwise the scores are formed once more, for sums in that order.
  const int64_t matrices = matrices_of(mask, shape);
  const bool full = grad_mask && mask.rows == shape.queries && mask.columns == shape.keys;
  const bool whole = full && matrices == shape.heads, few_terms = full && shape.heads < kManyTerms * matrices;
  const bool in_place = whole || (few_terms && threads == 1);
  if (in_place && (!whole || shape.windowed() || mask.operand.row == 0))  // added to, or tiles are left out
    std::fill_n(grad_mask, matrices * shape.queries * shape.keys, F(0));
  Scratch scratch;
  double* mask_sums = nullptr;
  const int64_t mask_size = matrices * mask.rows * mask.columns;
  if (grad_mask && !in_place && threads == 1) {
    mask_sums = scratch.take<double>(mask_size);
    if (scratch.failed) return false;
    std::fill_n(mask_sums, mask_size, 0.0);
  }
  const Gradients<T> gradients{grad_query, grad_key, grad_value, in_place ? grad_mask : nullptr, !whole, mask_sums};
  std::vector<F> delta(size_t(key_blocks > 1 || grad_sinks ? shape.heads * shape.queries : 0));
  if (grad_lse)  // of queries that see no key
    for (size_t i = 0; i < delta.size(); ++i) delta[i] = F(-grad_lse[i]);
  std::vector<F> missing(size_t(sizeof(T) == 2 && key_blocks > 1 ? shape.heads * shape.queries : 0));
  std::vector<uint8_t> lacks(missing.size());
  const auto data = [](auto& of) { return of.empty() ? nullptr : of.data(); };
  const Inputs<T> in{grad_out, query,       key,           value,       out,     lse,
                     grad_lse, data(delta), data(missing), data(lacks), per_head};

  std::atomic<bool> failed{false};
  const auto for_items = [&](int64_t count, const auto& body) {
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      Backward<T> backward(gradients, in, mask, shape);
      bool good = !backward.failed();
      for (int64_t item = begin; good && item < end; ++item) good = body(backward, item);
      if (!good) failed = true;
    });
  };
  // Runs body on every block of queries of key head `index`, from block `begin` to `end`.
  const auto all = [](int64_t, int64_t) { return true; };
  const auto for_blocks = [&](Backward<T>& backward, int64_t key_head, int64_t begin, int64_t end, const auto& needed,
                              const auto& body) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b % query_blocks * height, rows = std::min(height, shape.queries - first);
      if (!needed(first, rows)) continue;
      backward.load_queries(key_head * shape.group + b / query_blocks, first, rows);
      body();
    }
  };

  if (key_blocks > 1)
    for_items(key_heads * blocks, [&](Backward<T>& backward, int64_t item) {
      const int64_t head = item / blocks;
      for_blocks(backward, head, item % blocks, item % blocks + 1, all, [&] { backward.find_delta(); });
      return true;
    });
  const bool split = key_heads < threads;
  if (!split)
    for_items(key_heads, [&](Backward<T>& backward, int64_t head) {
      backward.load_keys(head * shape.group, 0, shape.keys);
      backward.clear_key_sums();
      for_blocks(backward, head, 0, blocks, all, [&] { backward.block(true, true); });
      backward.write_keys(head * shape.group);
      return true;
    });
  else {
    for_items(key_heads * blocks, [&](Backward<T>& backward, int64_t item) {
      const int64_t head = item / blocks;
      backward.load_keys(head * shape.group, 0, shape.keys);
      for_blocks(backward, head, item % blocks, item % blocks + 1, all, [&] { backward.block(true, false); });
      return true;
    });
    for_items(key_heads * key_blocks, [&](Backward<T>& backward, int64_t item) {
      const int64_t head = item / key_blocks, k = item % key_blocks * block, key_end = std::min(k + block, shape.keys);
      backward.load_keys(head * shape.group, k, key_end);
      backward.clear_key_sums();
      const auto see = [&](int64_t first, int64_t rows) { return backward.sees(first, rows, k, key_end); };
      for_blocks(backward, head, 0, blocks, see, [&] { backward.block(false, true); });
      backward.write_keys(head * shape.group);
      return true;
    });
  }
  if (mask_sums)
    for (int64_t j = 0; j < mask_size; ++j) grad_mask[j] = F(mask_sums[j]);
  else if (grad_mask && !in_place && few_terms)
    mask_gradient<T, F>(grad_mask, mask, shape, for_items);
  else if (grad_mask && !in_place)
    mask_gradient<T, double>(grad_mask, mask, shape, for_items);
  for (int64_t head = 0; head < (grad_sinks ? shape.heads : 0); ++head) {
    double sum = 0;
    for (int64_t i = head * shape.queries; i < (head + 1) * shape.queries; ++i)
      sum -= std::exp(double(per_head.sinks[head]) - double(lse[i])) *
             (double(delta[size_t(i)]) + (missing.empty() ? 0.0 : double(missing[size_t(i)])));
    grad_sinks[head] = F(sum);
  }
  return !failed;
}

#define PYNN_INSTANTIATE(T)                                                                               \
  template int64_t Attention<T>::bwd_scratch(const AttentionMaskOperand&, const AttentionShape&, bool);   \
  template bool Attention<T>::bwd(Output, Output, Output, F*, F*, Input, const Lse*, Input, Input, Input, \
                                  AttentionMaskOperand, PerHead, Input, const Lse*, AttentionShape, void*, void*);
PYNN_INSTANTIATE(double)
PYNN_INSTANTIATE(float)
PYNN_INSTANTIATE(Half)
PYNN_INSTANTIATE(BFloat16)

}  // namespace pynn::cpu
