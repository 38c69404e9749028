// Every launcher of csrc/include/scaled_dot_product_attention.h: both widths of engine and head dimensions beyond them,
// every kind of mask, windows, alibi, sinks, dropout, shared heads, parts of the keys, packs and single elements, NaN
// behind a mask; forward results are compared with the formula in float64.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include "launchers.h"
#include "philox.h"
#include "scaled_dot_product_attention.h"

namespace {

using launchers::Run;
using pynn::AttentionMask;
using pynn::AttentionMaskOperand;
using pynn::AttentionOperand;
using pynn::AttentionShape;

// kWindow: each query sees three keys before its diagonal, which ends at the last key, and one behind; with a soft cap,
// alibi and sinks. kPacked: two sequences, with alibi. kOwn: a mask in the dtype of the data.
enum class Kind { kNone, kCausal, kWindow, kPacked, kBool, kFloat, kOwn };

constexpr int64_t kSecondQuery = 40;  // where the second of the packed sequences begins

struct Case {
  int64_t batch, heads, group, queries, keys, dim, value_dim;
  Kind kind = Kind::kNone;
  bool dropout = false, nonfinite = false, transposed = false;
  int64_t mask_heads = 1, mask_rows = 1, mask_columns = 1;  // 0: as many as the scores have
};
constexpr Case kSmall[] = {
    {1, 2, 2, 5, 70, 8, 8},
    {1, 2, 1, 70, 66, 16, 5, Kind::kCausal, true},
    {1, 1, 1, 9, 70, 9, 16, Kind::kBool, false, true, false, 1, 0, 0},
    {2, 2, 1, 7, 9, 8, 8, Kind::kFloat, false, false, true, 0, 1, 0},
    {1, 2, 1, 70, 70, 8, 8, Kind::kOwn, false, false, false, 1, 1, 1},
    {1, 2, 1, 9, 5, 8, 8, Kind::kOwn, false, false, false, 0, 0, 0},
    {1, 1, 1, 6, 7, 4, 4, Kind::kOwn, false, false, false, 0, 0, 1},
    {1, 1, 1, 5, 6, 8, 8, Kind::kCausal, false, true},
    {1, 2, 1, 70, 72, 8, 8, Kind::kWindow, true},
    {1, 2, 2, 9, 6, 8, 8, Kind::kWindow, false, true},
    {1, 2, 1, 150, 151, 8, 8, Kind::kPacked},
};
constexpr Case kWide[] = {
    {1, 1, 1, 5, 9, 72, 136, Kind::kCausal},
    {1, 1, 1, 5, 9, 136, 72, Kind::kBool, false, true, false, 1, 0, 0},
    {1, 1, 1, 3, 600, 8, 8},
    {1, 2, 1, 600, 600, 8, 8, Kind::kWindow},
    {1, 4, 2, 3, 530, 8, 8, Kind::kWindow, true},
    {1, 4, 2, 5, 300, 72, 136, Kind::kFloat, false, true, false, 0, 0, 0},
    {1, 20, 10, 2, 257, 8, 5, Kind::kBool, false, false, false, 0, 0, 0},
};

[[noreturn]] void fail(const char* result, double got, double expected, int64_t head, int64_t row, int64_t column) {
  std::printf("scaled_dot_product_attention: %s[%lld, %lld, %lld] is %g, expected %g\n", result, (long long)head,
              (long long)row, (long long)column, got, expected);
  std::exit(1);
}

template <class T>
struct Call {
  using Launcher = launch::Attention<T>;
  using F = pynn::accumulate_t<T>;
  using Lse = typename Launcher::Lse;

  Run& run;
  const Case& c;
  AttentionShape shape{};
  AttentionMaskOperand mask{};
  pynn::AttentionPerHead<F> per_head{};

  Call(Run& run, const Case& c) : run(run), c(c) {
    shape.batch_dims = 2, shape.batch[0] = c.batch, shape.batch[1] = c.heads;
    shape.heads = c.batch * c.heads, shape.group = c.group;
    shape.queries = c.queries, shape.keys = c.keys, shape.dim = c.dim, shape.value_dim = c.value_dim;
    shape.lower = -c.queries, shape.upper = c.kind == Kind::kCausal ? 0 : c.keys, shape.scale = 0.3;
    if (c.kind == Kind::kWindow) {
      shape.diagonal = c.keys - c.queries, shape.lower = shape.diagonal - 3, shape.upper = shape.diagonal + 1;
      shape.softcap = 0.75;
      per_head.alibi_slopes = run.input<F>(size_t(shape.heads), [](size_t i) { return F(0.25 + 0.5 * double(i)); });
      per_head.sinks = run.input<F>(size_t(shape.heads), [](size_t i) { return F(0.5 - double(i)); });
    }
    if (c.dropout) {
      shape.dropout_p = 0.25;
      shape.dropout_key = run.input<int64_t>(2, [](size_t i) { return int64_t(5 + i); });
    }
    if (c.kind == Kind::kPacked) {
      per_head.alibi_slopes = run.input<F>(size_t(shape.heads), [](size_t i) { return F(0.25 + 0.5 * double(i)); });
      auto* keys = run.scratch<pynn::AttentionKeyRange>(size_t(c.queries));
      auto* queries = run.scratch<pynn::AttentionQueryRange>(size_t(c.keys));
      for (int64_t i = 0; i < c.queries; ++i) {
        const int32_t second = i >= kSecondQuery, half = int32_t(c.keys / 2);
        keys[i] = {second * half, second ? int32_t(c.keys) : half, int32_t(i + second * (half - kSecondQuery)), 0};
      }
      for (int64_t j = 0; j < c.keys; ++j) {
        const bool second = j >= c.keys / 2;
        queries[j] = {second ? int32_t(kSecondQuery) : 0, second ? int32_t(c.queries) : int32_t(kSecondQuery)};
      }
      shape.key_ranges = keys, shape.query_ranges = queries;
    }
    make_mask();
  }

  // (batch, heads, rows, width), or with rows and columns exchanged in memory.
  template <class Pointer>
  AttentionOperand<Pointer> operand(Pointer data, int64_t heads, int64_t rows, int64_t width) const {
    AttentionOperand<Pointer> at{data, {heads * rows * width, rows * width}, width, 1};
    if (c.transposed) at.row = 1, at.column = rows;
    return at;
  }
  AttentionOperand<const T*> normals(int64_t heads, int64_t rows, int64_t width) const {
    return operand(run.normals<T>(size_t(c.batch * heads * rows * width)), heads, rows, width);
  }
  AttentionOperand<T*> output(int64_t heads, int64_t rows, int64_t width) const {
    return operand(run.output<T>(size_t(c.batch * heads * rows * width)), heads, rows, width);
  }

  int64_t mask_size(int64_t chosen, int64_t whole) const { return chosen == 0 ? whole : chosen; }
  void make_mask() {
    if (c.kind < Kind::kBool) return;
    mask.batch[0] = 1, mask.batch[1] = mask_size(c.mask_heads, c.heads);
    mask.rows = mask_size(c.mask_rows, c.queries), mask.columns = mask_size(c.mask_columns, c.keys);
    mask.operand.column = mask.columns == 1 ? 0 : 1;
    mask.operand.row = mask.rows == 1 ? 0 : mask.columns;
    mask.operand.batch[1] = mask.batch[1] == 1 ? 0 : mask.rows * mask.columns;
    const size_t count = size_t(mask.batch[1] * mask.rows * mask.columns);
    // Key 3 is hidden from all, and query 2 sees nothing.
    const auto hidden = [this](size_t i) {
      return mask.columns > 1 && (int64_t(i) % mask.columns == 3 || int64_t(i) / mask.columns % mask.rows == 2);
    };
    constexpr double kHidden = -std::numeric_limits<double>::infinity();
    if (c.kind == Kind::kBool) {
      mask.kind = AttentionMask::kBool;
      mask.operand.data = run.input<uint8_t>(count, [&](size_t i) { return uint8_t(!hidden(i)); });
    } else if (c.kind == Kind::kFloat || sizeof(T) == 4) {
      mask.kind = AttentionMask::kFloat;
      mask.operand.data = run.input<float>(count, [&](size_t i) { return float(hidden(i) ? kHidden : 0.5); });
    } else {
      mask.kind = std::is_same_v<T, double>       ? AttentionMask::kDouble
                  : std::is_same_v<T, pynn::Half> ? AttentionMask::kHalf
                                                  : AttentionMask::kBFloat16;
      mask.operand.data =
          run.input<T>(count, [&](size_t i) { return pynn::from_float<T>(F(hidden(i) ? kHidden : 0.5)); });
    }
  }

  double number(const AttentionOperand<const T*>& m, int64_t head, int64_t group, int64_t row, int64_t column) const {
    const int64_t b = head / c.heads, h = head % c.heads / group;
    return double(pynn::to_float(m.data[b * m.batch[0] + h * m.batch[1] + row * m.row + column * m.column]));
  }
  double mask_value(int64_t head, int64_t query, int64_t key) const {
    if (key < query + shape.lower || key > query + shape.upper) return -INFINITY;
    if (shape.key_ranges) {
      const pynn::AttentionKeyRange& seen = shape.key_ranges[query];
      if (key < seen.begin || key >= seen.end) return -INFINITY;
      return -double(per_head.alibi_slopes[head]) * double(std::abs(key - seen.diagonal));
    }
    if (per_head.alibi_slopes)
      return -double(per_head.alibi_slopes[head]) * double(std::abs(key - query - shape.diagonal));
    const auto& m = mask.operand;
    const int64_t at = head % c.heads * m.batch[1] + query * m.row + key * m.column;
    switch (mask.kind) {
      case AttentionMask::kNone:
        return 0;
      case AttentionMask::kBool:
        return static_cast<const uint8_t*>(m.data)[at] ? 0.0 : -INFINITY;
      case AttentionMask::kFloat:
        return double(static_cast<const float*>(m.data)[at]);
      default:
        return double(pynn::to_float(static_cast<const T*>(m.data)[at]));
    }
  }

  static constexpr double kTolerance = sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 1e-5 : 3e-2;

  // The weights of the values in a row, by the formula.
  std::vector<double> weigh(const AttentionOperand<const T*>& query, const AttentionOperand<const T*>& key,
                            int64_t head, int64_t i, const bool* keep) const {
    std::vector<double> weights(size_t(c.keys));
    double total = per_head.sinks ? std::exp(double(per_head.sinks[head])) : 0;
    for (int64_t j = 0; j < c.keys; ++j) {
      double score = mask_value(head, i, j);
      if (score == -INFINITY) continue;
      double product = 0;
      for (int64_t d = 0; d < c.dim; ++d)
        product += 0.3 * number(query, head, 1, i, d) * number(key, head, c.group, j, d);
      score += shape.softcap != 0 ? shape.softcap * std::tanh(product / shape.softcap) : product;
      total += weights[size_t(j)] = std::exp(score);
    }
    for (int64_t j = 0; j < c.keys; ++j) {
      const double kept = !keep ? 1 : keep[(head * c.queries + i) * c.keys + j] ? 1 / 0.75 : 0;
      if (total != 0) weights[size_t(j)] *= kept / total;
    }
    return weights;
  }

  // One output row at a time. NaN behind a mask is no part of it.
  void check(const AttentionOperand<const T*>& query, const AttentionOperand<const T*>& key,
             const AttentionOperand<const T*>& value, const AttentionOperand<T*>& out, const bool* keep) const {
    const AttentionOperand<const T*> results = {out.data, {out.batch[0], out.batch[1]}, out.row, out.column};
    for (int64_t head = 0; head < shape.heads; ++head)
      for (int64_t i = 0; i < c.queries; ++i) {
        const std::vector<double> weights = weigh(query, key, head, i, keep);
        for (int64_t d = 0; d < c.value_dim; ++d) {
          double expected = 0;
          for (int64_t j = 0; j < c.keys; ++j)
            if (weights[size_t(j)] != 0) expected += weights[size_t(j)] * number(value, head, c.group, j, d);
          const double got = number(results, head, 1, i, d);
          if (std::isnan(expected) ? !std::isnan(got)
                                   : !(std::fabs(got - expected) <= kTolerance * (1 + std::fabs(expected))))
            fail("out", got, expected, head, i, d);
        }
      }
  }

  // The weights of each head, or their mean over the heads of a sample.
  void check_weights(const AttentionOperand<const T*>& query, const AttentionOperand<const T*>& key, const Lse* lse,
                     bool average, const bool* keep) const {
    const int64_t together = average ? c.heads : 1, matrices = shape.heads / together;
    T* got = run.output<T>(size_t(matrices * c.queries * c.keys));
    Launcher::weights(got, average, query, key, mask, per_head, lse, shape, nullptr);
    for (int64_t matrix = 0; matrix < matrices; ++matrix)
      for (int64_t i = 0; i < c.queries; ++i) {
        std::vector<double> expected(size_t(c.keys));
        for (int64_t head = matrix * together; head < (matrix + 1) * together; ++head) {
          const std::vector<double> weights = weigh(query, key, head, i, keep);
          for (size_t j = 0; j < weights.size(); ++j) expected[j] += weights[j] / double(together);
        }
        for (int64_t j = 0; j < c.keys; ++j) {
          const double weight = double(pynn::to_float(got[(matrix * c.queries + i) * c.keys + j]));
          if (!(std::fabs(weight - expected[size_t(j)]) <= kTolerance))
            fail("weights", weight, expected[size_t(j)], matrix, i, j);
        }
      }
  }

  void operator()() {
    const int64_t key_heads = c.heads / c.group;
    const auto query = normals(c.heads, c.queries, c.dim), key = normals(key_heads, c.keys, c.dim),
               grad_out = normals(c.heads, c.queries, c.value_dim);
    auto value = normals(key_heads, c.keys, c.value_dim);
    if (c.nonfinite) {  // in a key that is hidden from all, or from the first of a causal sequence
      T* data = const_cast<T*>(value.data);
      data[3 * value.row] = pynn::from_float<T>(std::numeric_limits<F>::quiet_NaN());
    }
    bool* keep = nullptr;
    if (c.dropout) {
      keep = run.output<bool>(size_t(shape.heads * c.queries * c.keys));
      launch::attention_keep(keep, shape, nullptr);
    }
    const auto out = output(c.heads, c.queries, c.value_dim);
    Lse* lse = run.output<Lse>(size_t(shape.heads * c.queries));
    void* parts = run.scratch<double>(size_t(Launcher::fwd_scratch(shape) / 8 + 1));
    Launcher::fwd(out, lse, query, key, value, mask, per_head, shape, parts, nullptr);
    check(query, key, value, out, keep);
    for (bool average : {false, true}) check_weights(query, key, lse, average, keep);

    if (c.nonfinite) const_cast<T*>(grad_out.data)[0] = pynn::from_float<T>(std::numeric_limits<F>::infinity());
    const bool wanted = c.kind == Kind::kFloat || c.kind == Kind::kOwn;
    F* grad_mask = wanted ? run.output<F>(size_t(mask.batch[1] * mask.rows * mask.columns)) : nullptr;
    const AttentionOperand<const T*> saved = {out.data, {out.batch[0], out.batch[1]}, out.row, out.column};
    void* scratch = run.scratch<double>(size_t(Launcher::bwd_scratch(mask, shape, wanted) / 8 + 1));
    F* grad_sinks = per_head.sinks ? run.output<F>(size_t(shape.heads)) : nullptr;
    const Lse* grad_lse = per_head.sinks ? run.input<Lse>(size_t(shape.heads * c.queries),
                                                          [](size_t i) { return Lse(0.1 * double(i % 7)); })
                                         : nullptr;
    Launcher::bwd(output(c.heads, c.queries, c.dim), output(key_heads, c.keys, c.dim),
                  output(key_heads, c.keys, c.value_dim), grad_mask, grad_sinks, grad_out, grad_lse, query, key, value,
                  mask, per_head, saved, lse, shape, scratch, nullptr);
  }
};

void launch_all(Run& run) {
  launchers::for_each_type(run, [&]<class T>(T) {
    for (const Case& c : kSmall) Call<T>(run, c)();
  });
  for (const Case& c : kWide) {
    if (!run.once()) Call<double>(run, c)();  // the kernels of float, with smaller tiles: more barriers
    Call<float>(run, c)();
    Call<pynn::BFloat16>(run, c)();
  }
}

const launchers::Op op{"scaled_dot_product_attention", &launch_all};

}  // namespace
