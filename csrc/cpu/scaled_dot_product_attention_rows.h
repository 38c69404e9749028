// What the attention kernels do to one row of a score tile: mask, softmax, dropout, and the gradient of all three.
#pragma once
#include <algorithm>
#include <cmath>

#include "normal.h"
#include "recurrent_activation.h"
#include "scaled_dot_product_attention_products.h"
#include "scaled_dot_product_attention_score.h"
#include "vec_math.h"

namespace pynn::cpu::attention {

inline constexpr int64_t kTogether = 8;  // rows that do each step together, so that none waits for its own results

// v in its first `count` lanes, `other` in the rest.
template <class F>
PYNN_HD Vec<F> keep_first(Vec<F> v, int64_t count, F other) {
  return lane_numbers<Vec<F>>(LaneIndices<F>()) < F(count) ? v : broadcast(other);
}

// The larger of top and x, top where x is NaN.
template <class F>
PYNN_HD Vec<F> larger(Vec<F> top, Vec<F> x) {
  if constexpr (std::is_same_v<F, float>)
    return at_least(top, x);
  else
    return x > top ? x : top;
}

template <class F, class Combine, int step = kLanes<F> / 2>
PYNN_HD F reduce(Vec<F> v, const Combine& combine) {
  v = combine(v, exchange<step>(v, LaneIndices<F>()));
  if constexpr (step > 1)
    return reduce<F, Combine, step / 2>(v, combine);
  else
    return v[0];
}
template <class F>
PYNN_HD F sum_lanes(Vec<F> v) {
  return reduce<F>(v, [](Vec<F> a, Vec<F> b) { return a + b; });
}
template <class F>
PYNN_HD F max_lanes(Vec<F> v) {
  return reduce<F>(v, larger<F>);
}

// What scores are multiplied by before they are exponents: weights of data of 16 bits are powers of two.
template <class T>
inline constexpr accumulate_t<T> kUnit = sizeof(T) == 2 ? accumulate_t<T>(0x1.715476p0) : accumulate_t<T>(1);
// An exponent as a score.
template <class T, class F = accumulate_t<T>>
PYNN_HD F score_of(F exponent) {
  return sizeof(T) == 2 ? exponent * F(0x1.62e43p-1) : exponent;
}
// The weight of an exponent, at most 0.
template <class T>
PYNN_HD Vec<accumulate_t<T>> weight_of(Vec<accumulate_t<T>> exponent) {
  if constexpr (sizeof(T) == 2)
    return coarse_exp2(exponent);
  else
    return exp(exponent);
}
// The weights of scores that make exponents times `factor`.
template <class T, class F>
PYNN_HD Vec<F> weight_of(Vec<F> score, F factor, F shift) {
  if constexpr (sizeof(T) == 2)
    return weight_of<T>(score * factor - shift);
  else
    return weight_of<T>(score - shift);
}

// Scales and masks one row of `count` scores, fills its last vector with -inf; returns the largest score.
template <bool kMasked, class F>
F finish_scores(F* s, int64_t count, F scale, const F* mask) {
  Vec<F> top = broadcast(-kInfinity<F>);
  for (int64_t j = 0; j < count; j += kLanes<F>) {
    Vec<F> x = load(s + j);
    if constexpr (kMasked) {
      const Vec<F> m = load(mask + j);
      x = m == -kInfinity<F> ? m : fma(x, broadcast(scale), m);
    } else {
      x *= scale;
    }
    if (count - j < kLanes<F>) x = keep_first<F>(x, count - j, -kInfinity<F>);
    store(s + j, x);
    top = larger<F>(top, x);
  }
  return max_lanes<F>(top);
}

// The largest of `count` scores; fills their last vector with -inf.
template <class F>
F largest_score(F* s, int64_t count) {
  constexpr int L = kLanes<F>;
  Vec<F> top[kChains];
  for (int c = 0; c < kChains; ++c) top[c] = broadcast(-kInfinity<F>);
  int64_t j = 0;
  for (; j + kChains * L <= count; j += kChains * L)
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) top[c] = larger<F>(top[c], load(s + j + c * L));
  for (; j < count; j += L) {
    if (count - j < L) store(s + j, keep_first<F>(load(s + j), count - j, -kInfinity<F>));
    top[0] = larger<F>(top[0], load(s + j));
  }
  return max_lanes<F>(larger<F>(larger<F>(top[0], top[1]), larger<F>(top[2], top[3])));
}

// One row of the mask as numbers to add to the scores.
template <class F>
void read_mask(const AttentionMaskOperand& mask, const void* start, int64_t row, int64_t key, int64_t count, F* to) {
  const int64_t step = mask.operand.column, offset = row * mask.operand.row + key * step;
  const auto convert = [&]<class E>(const E* data) {
    if constexpr (std::is_same_v<accumulate_t<E>, F>)
      if (step == 1) return widen(data + offset, to, count);
    for (int64_t j = 0; j < count; ++j) to[j] = F(to_float(data[offset + j * step]));
  };
  switch (mask.kind) {
    case AttentionMask::kNone:
      break;
    case AttentionMask::kBool: {
      const uint8_t* data = static_cast<const uint8_t*>(start) + offset;
      if (step == 1)
        for (int64_t j = 0; j < count; ++j) to[j] = data[j] ? F(0) : -kInfinity<F>;
      else
        for (int64_t j = 0; j < count; ++j) to[j] = data[j * step] ? F(0) : -kInfinity<F>;
      break;
    }
    case AttentionMask::kDouble:
      convert(static_cast<const double*>(start));
      break;
    case AttentionMask::kFloat:
      convert(static_cast<const float*>(start));
      break;
    case AttentionMask::kHalf:
      convert(static_cast<const Half*>(start));
      break;
    case AttentionMask::kBFloat16:
      convert(static_cast<const BFloat16*>(start));
      break;
  }
}

// The same where it lies, if that is whole vectors of such numbers, or read into `buffer`.
template <class F>
const F* mask_row(const AttentionMaskOperand& mask, const void* start, int64_t row, int64_t key, int64_t count,
                  F* buffer) {
  constexpr AttentionMask kSame = std::is_same_v<F, double> ? AttentionMask::kDouble : AttentionMask::kFloat;
  if (mask.kind == kSame && mask.operand.column == 1 && count % kLanes<F> == 0)
    return static_cast<const F*>(start) + row * mask.operand.row + key;
  read_mask(mask, start, row, key, count, buffer);
  return buffer;
}

inline int64_t mask_bytes(AttentionMask kind) {
  switch (kind) {
    case AttentionMask::kDouble:
      return 8;
    case AttentionMask::kFloat:
      return 4;
    case AttentionMask::kHalf:
    case AttentionMask::kBFloat16:
      return 2;
    default:
      return 1;
  }
}

inline const void* mask_start(const AttentionMaskOperand& mask, const AttentionShape& shape, int64_t head) {
  AttentionOperand<const char*> bytes{static_cast<const char*>(mask.operand.data), {}, 0, 0};
  for (int d = 0; d < shape.batch_dims; ++d) bytes.batch[d] = mask.operand.batch[d] * mask_bytes(mask.kind);
  return head_start(bytes, shape, head, 1);
}

// Which of the mask's own matrices belongs to a head.
inline int64_t mask_matrix(const AttentionMaskOperand& mask, const AttentionShape& shape, int64_t head) {
  int64_t matrix = 0, step = 1;
  for (int d = shape.batch_dims - 1; d >= 0; step *= mask.batch[d], head /= shape.batch[d], --d)
    if (mask.batch[d] != 1) matrix += head % shape.batch[d] * step;
  return matrix;
}

// What becomes of the scores of a head.
template <class F>
struct HeadScores {
  const AttentionShape& shape;
  const AttentionMaskOperand& mask;
  const void* mask_start;
  F slope;       // of alibi
  F* tile_mask;  // the mask of a tile, the same for all of its rows, where masks have no rows of their own
  F* row_mask;   // room for a row of numbers to add
};

template <class F>
HeadScores<F> scores_of(const AttentionShape& shape, const AttentionMaskOperand& mask,
                        const AttentionPerHead<F>& per_head, int64_t head, F* tile_mask, F* row_mask) {
  return {shape,     mask,    mask_start(mask, shape, head), per_head.alibi_slopes ? per_head.alibi_slopes[head] : F(0),
          tile_mask, row_mask};
}

// A row of scores: those from `valid` on take no part, and are 0; the others take none where they are -inf, and such
// there are only if `masked`.
template <class F>
struct FinishedRow {
  int64_t valid;
  F top;     // the largest exponent
  F factor;  // exponents are scores times this
  bool masked;
};

// Products become capped scores; `slopes`, where wanted, the derivatives of these with respect to scaled products.
template <class F>
void cap_scores(const AttentionShape& shape, F* s, int64_t count, F* slopes) {
  const F cap = F(shape.softcap), factor = F(shape.scale / shape.softcap);
  for (int64_t j = 0; j < count; j += kLanes<F>) {
    const Vec<F> t = tanh(Vec<F>(load(s + j) * factor));
    store(s + j, t * cap);
    if (slopes) store(slopes + j, fma(-t, t, broadcast(F(1))));
  }
}

// dS becomes the gradient of scaled products. What takes no part stays 0, whatever its slope. Returns the sum of the
// slopes times weights.
template <class F>
F cap_gradients(F* g, int64_t count, const F* slopes, const F* weights) {
  Vec<F> sum{};
  for (int64_t j = 0; j < count; j += kLanes<F>) {
    const Vec<F> d = load(g + j), weight = load(weights + j), slope = load(slopes + j), zero{};
    sum = weight == zero ? sum : fma(weight, slope, sum);
    store(g + j, d == zero ? zero : d * slope);
  }
  return sum_lanes<F>(sum);
}

// Turns the products of query `query` with keys [key, key + count) into scores: scaled, capped, masked, with alibi.
// Those of 16-bit data that are only scaled are left as they are; nobody looks for the largest of them where the
// exponent `known` takes its place, finite or not.
template <class T, class F = accumulate_t<T>>
FinishedRow<F> finish_row(const HeadScores<F>& head, F* s, int64_t query, int64_t key, int64_t count,
                          F* slopes = nullptr, const F* known = nullptr) {
  const AttentionShape& shape = head.shape;
  const KeyRange seen = keys_of(shape, query, 1);
  int64_t valid = std::clamp<int64_t>(seen.end - key, 0, count);
  const int64_t hidden = std::clamp<int64_t>(seen.begin - key, 0, valid);
  if (hidden == valid) valid = 0;
  for (int64_t j = valid > 0 ? padded<F>(valid) : 0; j < count; ++j) s[j] = 0;
  if (valid == 0) return {0, -kInfinity<F>, F(1), false};
  const F* added = nullptr;
  if (head.mask.kind != AttentionMask::kNone) {
    added = head.tile_mask;
    if (head.mask.operand.row != 0) {
      added = mask_row(head.mask, head.mask_start, query, key, valid, head.row_mask);
    }
  }
  if (hidden > 0 || head.slope != F(0)) {
    F* const to = head.row_mask;
    if (!added)
      std::fill_n(to, valid, F(0));
    else if (added != to)
      std::copy_n(added, valid, to);
    if (head.slope != F(0)) {
      const int64_t diagonal = shape.key_ranges ? shape.key_ranges[query].diagonal : query + shape.diagonal;
      const F slope = head.slope, distance = F(diagonal - key);
      for (int64_t j = 0; j < valid; ++j) to[j] -= slope * std::fabs(distance - F(j));
    }
    std::fill_n(to, hidden, -kInfinity<F>);
    added = to;
  }
  F scale = F(shape.scale);
  if (shape.softcap != 0) {
    cap_scores(shape, s, valid, slopes);
    scale = 1;
  }
  if (sizeof(T) == 2 && !added && scale > F(0)) {
    const F factor = scale * kUnit<T>;
    if (!known) return {valid, largest_score(s, valid) * factor, factor, false};
    if (const int64_t last = valid / kLanes<F> * kLanes<F>; last < valid)
      store(s + last, keep_first<F>(load(s + last), valid - last, -kInfinity<F>));
    return {valid, *known, factor, false};
  }
  const F top = added ? finish_scores<true>(s, valid, scale, added) : finish_scores<false>(s, valid, scale, added);
  return {valid, top * kUnit<T>, kUnit<T>, added != nullptr};
}

// Reads the mask of a tile whose rows share it; returns how many of its keys are left without those at its end that it
// hides.
template <class F>
int64_t read_tile_mask(const HeadScores<F>& head, int64_t key, int64_t count) {
  if (count <= 0 || head.mask.kind == AttentionMask::kNone || head.mask.operand.row != 0) return count;
  read_mask(head.mask, head.mask_start, 0, key, count, head.tile_mask);
  while (count > 0 && head.tile_mask[count - 1] == -kInfinity<F>) --count;
  return count;
}

// Puts lane k of parts[w] at to[4 k + w].
template <class V>
PYNN_HD void store_interleaved(const V (&parts)[4], float* to) {
  constexpr auto lanes = LaneIndices<float>();
  const V even[2] = {interleave_low(parts[0], parts[2], lanes), interleave_high(parts[0], parts[2], lanes)};
  const V odd[2] = {interleave_low(parts[1], parts[3], lanes), interleave_high(parts[1], parts[3], lanes)};
  for (int half = 0; half < 2; ++half) {
    store(to + 2 * half * kLanes<float>, interleave_low(even[half], odd[half], lanes));
    store(to + (2 * half + 1) * kLanes<float>, interleave_high(even[half], odd[half], lanes));
  }
}

// to[j] = 1 / (1 - p) where dropout keeps element first + j, otherwise 0.
template <class F>
void dropout_factors(const AttentionShape& shape, uint64_t first, int64_t count, F* to) {
  const uint64_t seed = uint64_t(shape.dropout_key[0]), offset = uint64_t(shape.dropout_key[1]);
  const uint64_t threshold = uint64_t(shape.dropout_p * 4294967296.0);
  if (threshold > UINT32_MAX) {
    std::fill_n(to, count, F(0));
    return;
  }
  const F kept = F(1 / (1 - shape.dropout_p));
  constexpr int64_t batch = 4 * kCounters;
  for (int64_t j = -int64_t(first % 4); j < count; j += batch) {
    VecUint words[4];
    philox(seed, offset + uint64_t(int64_t(first) + j) / 4, words);
    VecFloat keep[4];
    for (int w = 0; w < 4; ++w) keep[w] = (VecFloat)((words[w] >= uint32_t(threshold)) & (VecInt)broadcast(1.0f));
    float values[batch];
    store_interleaved(keep, values);
    if (j >= 0 && j + batch <= count)
      for (int64_t k = 0; k < batch; ++k) to[j + k] = F(values[k]) * kept;
    else
      for (int64_t k = std::max<int64_t>(0, -j); k < std::min(batch, count - j); ++k) to[j + k] = F(values[k]) * kept;
  }
}

// s becomes weights against the exponent `shift`, times the dropout factor; returns the sums of their lanes before
// dropout. T is the type of the data.
template <class T, class F>
Vec<F> exponentials(F* s, int64_t count, F factor, F shift, const F* factors) {
  Vec<F> sum{};
  for (int64_t j = 0; j < count; j += kLanes<F>) {
    const Vec<F> p = weight_of<T>(load(s + j), factor, shift);
    sum += p;
    store(s + j, factors ? p * load(factors + j) : p);
  }
  return sum;
}

// Weights of one row against the exponent `shift`, and G: s becomes weights, g becomes G. Masked entries become 0
// whatever they held. Returns the sums of the lanes of s and of s G.
template <class T, bool kMasked, class F>
std::pair<Vec<F>, Vec<F>> weigh_row(F* s, F* g, int64_t count, F factor, F shift, const F* factors) {
  Vec<F> sum{}, dot{};
  for (int64_t j = 0; j < count; j += kLanes<F>) {
    const Vec<F> x = load(s + j);
    Vec<F> d = load(g + j), p = weight_of<T>(x, factor, shift);
    if (factors) d *= load(factors + j);
    if constexpr (kMasked) p = x == -kInfinity<F> ? Vec<F>{} : p;
    if (count - j < kLanes<F>) {
      p = keep_first<F>(p, count - j, F(0));
      d = keep_first<F>(d, count - j, F(0));
    }
    if constexpr (kMasked) d = p == F(0) ? Vec<F>{} : d;
    sum += p;
    dot = fma(p, d, dot);
    store(s + j, p);
    if (kMasked || factors) store(g + j, d);
  }
  return {sum, dot};
}

// With P = s * norm: g = P (G - delta), s = P times the dropout factor. Returns the sums of the lanes of |g|, or zeros.
template <bool kMeasured, class F>
Vec<F> score_gradients(F* s, F* g, int64_t count, F norm, F delta, bool masked, const F* factors) {
  Vec<F> size{};
  for (int64_t j = 0; j < count; j += kLanes<F>) {
    const Vec<F> weight = load(s + j), zero{};
    Vec<F> p = weight * norm, d = p * (load(g + j) - delta);
    if (masked) p = weight == zero ? zero : p, d = weight == zero ? zero : d;
    if constexpr (kMeasured && std::is_same_v<F, float>) size += absolute(d);
    store(g + j, d);
    store(s + j, factors ? p * load(factors + j) : p);
  }
  return size;
}

}  // namespace pynn::cpu::attention
