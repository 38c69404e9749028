"""What every attention kernel knows: where the rows of a head lie, which scores take part, what dropout keeps.

A kernel owns a tile of rows of one matrix and streams tiles of rows of another past it; scores are (owned rows x
streamed rows). Queries and keys come as index blocks `i` and `j` that broadcast to that shape, so the same functions
serve kernels that own queries, (ROWS, 1) x (1, COLS), and kernels that own keys (KEY_ROWS), (1, COLS) x (ROWS, 1).

Strides are counted in units of PACK elements, that the compiler sees by what they are divisible. 16-bit data: tensor
cores, and powers of 2 for exponentials, so that scores come in units of log 2. Otherwise products and exponentials have
the data's own precision, and long sums are sums of short ones, which keeps their rounding errors small.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .philox import philox4x32
from .recurrent_cells import tanh

BOOL_MASK: tl.constexpr = tl.constexpr(1)  # kinds of MASK; 0 without one
FLOAT_MASK: tl.constexpr = tl.constexpr(2)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634074)
INFINITY: tl.constexpr = tl.constexpr(float("inf"))
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)  # of float32
# Arguments of the kernels that are no reason to compile another one.
_STRIDES = [
    f"{name}_{part}"
    for name in ("o", "q", "k", "v", "g", "m", "dq", "dk", "dv")
    for part in ("inner", "outer", "step", "row")
]
SIZES = [
    *_STRIDES, "m_column", "queries", "keys", "dim", "value_dim", "group", "lower", "upper", "diagonal", "factor",
    "softcap", "threshold", "kept", "scale", "rows_of_all", "sharing", "row_parts", "column_parts",
    "parts", "part_keys",
]  # fmt: skip


@triton.jit
def number(bits):
    """A float64 argument, which comes as the integer of its bits: a Python float would arrive as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def head_of(x, table, head, inner, outer_stride, inner_stride, PACK: tl.constexpr):
    """Where a head begins: its place in two merged dimensions, or in a table where the strides need more of them."""
    if table is None:
        outer, step = (head // inner).to(tl.int64), (head % inner).to(tl.int64)
        return x + (outer * outer_stride + step * inner_stride) * PACK
    else:
        return x + tl.load(table + head)


@triton.jit
def rows_of(x, row, row_stride, PACK: tl.constexpr):
    """Pointers to the rows of index block `row`."""
    return x + row.to(tl.int64) * (row_stride * PACK)


@triton.jit
def load_rows(p_rows, in_rows, column, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """Columns [column, column + COLS) of rows, 0 outside of the matrix."""
    d = (column + tl.arange(0, COLS))[None, :]
    if WIDTH % COLS == 0:
        return tl.load(p_rows + d, mask=in_rows, other=0.0)
    else:
        return tl.load(p_rows + d, mask=in_rows & (d < WIDTH), other=0.0)


@triton.jit
def product(
    own, streamed, p_own, in_own, p_streamed, in_streamed, width,
    WIDTH: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """own streamed.T, (ROWS, COLS): of whole tiles, or with STEP in pieces of so many columns read here.

    width is WIDTH, unknown to the compiler: it would unroll the loop and keep all that it reads. Rows of float32 so
    short that they would be one piece are two: there are no 8 columns for tl.dot but in 16.
    """
    if STEP == 0:
        return tl.dot(own, tl.trans(streamed), out_dtype=COMPUTE)
    else:
        PIECE: tl.constexpr = STEP // 2 if COMPUTE.primitive_bitwidth == 32 and STEP == 16 and WIDTH <= 16 else STEP
        total = tl.zeros([ROWS, COLS], COMPUTE)
        for column in range(0, width, PIECE):
            d = tl.arange(0, STEP)[None, :]
            inside = (d < PIECE) & (column + d < WIDTH)
            a = tl.load(p_own + (column + d), mask=in_own & inside, other=0.0)
            b = tl.load(p_streamed + (column + d), mask=in_streamed & inside, other=0.0)
            total += tl.dot(a, tl.trans(b), input_precision="ieee", out_dtype=COMPUTE)
        return total


@triton.jit
def add_product(total, weights, streamed, BOUNDED: tl.constexpr):
    """total + weights streamed. One rounding of weights to 16 bits would be an error as large as the rounding of the
    result, so they enter the product as a sum of two numbers of that size.

    BOUNDED: weights are finite or NaN. Otherwise the second number is kept finite, that the first says what becomes of
    an infinity.
    """
    if streamed.dtype.primitive_bitwidth == 16:
        large = weights.to(streamed.dtype)
        small = weights - large.to(tl.float32)
        if not BOUNDED:
            most: tl.constexpr = 65504.0 if streamed.dtype == tl.float16 else 1e30
            small = tl.clamp(small, -most, most)
        return tl.dot(small.to(streamed.dtype), streamed, tl.dot(large, streamed, total))
    else:
        return total + tl.dot(weights, streamed, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def set_nan_aside(total):
    """A weight that is two numbers makes NaN of an infinity, where the second is negative or one is 0. Such sums become
    a number that no other sum can be, for nonfinite_sum; and whether there are any. put_nan_back: the others."""
    lost = total != total
    # Raveled: at a sum of sums of rows Triton 3.7 stops with an error on sm_100.
    return tl.where(lost, LARGEST, total), tl.sum(tl.ravel(lost.to(tl.int32)), axis=0) > 0


@triton.jit
def put_nan_back(total):
    return tl.where(total == LARGEST, float("nan"), total)


@triton.jit
def without_nonfinite(x, spoiled):
    """Zeros in place of NaN and infinity: a product with a weight of 0 is to be 0. spoiled, a number per row, becomes
    NaN where there were any."""
    wide = x.to(tl.float32) if x.dtype.primitive_bitwidth == 16 else x
    nothing = wide * 0.0
    return tl.where(nothing == 0.0, x, 0.0), spoiled + tl.sum(nothing, axis=1)


@triton.jit
def nonfinite_sum(seen, x, COMPUTE: tl.constexpr):
    """What a product with positive weights at `seen` makes of the NaN and infinities of x, 0 where it meets none. It is
    rare: their tiles are gone through once more for it.

    One product counts them in digits of base 256: up to 128 times 2^-8 for infinity, 1 for -infinity, 2^8 for NaN.
    """
    wide = x.to(COMPUTE)
    code = tl.where(wide == INFINITY, 0.00390625, tl.where(wide == -INFINITY, 1.0, tl.where(wide == wide, 0.0, 256.0)))
    counts = tl.dot(seen.to(x.dtype), code.to(x.dtype), input_precision="ieee", out_dtype=COMPUTE)
    whole = tl.floor(counts)
    positive, negative = counts != whole, (whole != 0.0) & (whole < 256.0)
    infinity = tl.where(positive, INFINITY, 0.0) - tl.where(negative, INFINITY, 0.0)  # NaN of both
    return tl.where(whole >= 256.0, float("nan"), infinity)


@triton.jit
def exponential(x, BASE2: tl.constexpr):
    return tl.exp2(x) if BASE2 else libdevice.exp(x)


@triton.jit
def weight_of(x, shift, BASE2: tl.constexpr):
    """exp(x - shift). In float32 the rounding of a difference of 8 costs 5e-7 of the result, more than all else, so
    what it takes (Knuth's two-sum) is put back."""
    difference = x - shift
    e = exponential(difference, BASE2)
    if x.dtype == tl.float32 and not BASE2:
        back = difference - x
        lost = (x - (difference - back)) - (shift + back)
        e = tl.where(e == 0.0, 0.0, e + e * lost)  # of -infinity nothing is known to be lost
    return e


@triton.jit
def split_lse(lse, COMPUTE: tl.constexpr, BASE2: tl.constexpr):
    """(shift, norm) of rows: exp(S - lse) = weight_of(S, shift) * norm, where lse has more digits than sums."""
    if BASE2:
        return lse * LOG2_E, tl.full(lse.shape, 1.0, COMPUTE)
    else:
        shift = lse.to(COMPUTE)
        norm = tl.exp(shift.to(tl.float64) - lse).to(COMPUTE)
        return shift, tl.where(tl.abs(shift) != INFINITY, norm, 1.0)


@triton.jit
def span(
    first, last, ranges, low, high, length,
    WINDOW: tl.constexpr, RANGE: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The tiles of BLOCK that rows first .. last see: begin <= middle <= second <= end, whole from middle to second.

    Row r sees [r + low, r + high), or what `ranges`, RANGE numbers per row, says; neither end decreases. With a mask
    no tile is whole, and all are before the middle.
    """
    if ranges is not None:
        low_first, high_first = tl.load(ranges + first * RANGE), tl.load(ranges + first * RANGE + 1)
        low_last, high_last = tl.load(ranges + last * RANGE), tl.load(ranges + last * RANGE + 1)
    elif WINDOW:
        low_first, low_last, high_first, high_last = first + low, last + low, first + high, last + high
    else:
        low_first, low_last, high_first, high_last = first * 0, first * 0, first * 0 + length, first * 0 + length
    begin = tl.minimum(tl.maximum(low_first, 0), length) // BLOCK
    end = tl.maximum((tl.minimum(tl.maximum(high_last, 0), length) + BLOCK - 1) // BLOCK, begin)
    middle = (tl.minimum(tl.maximum(low_last, 0), length) + BLOCK - 1) // BLOCK
    middle = tl.minimum(tl.maximum(middle, begin), end)
    second = tl.minimum(tl.maximum(high_first, 0), length) // BLOCK
    second = tl.minimum(tl.maximum(second, middle), end)
    if MASK != 0:
        middle, second = end, end
    return begin, middle, second, end


@triton.jit
def runs(phase: tl.constexpr, MASK: tl.constexpr, BEFORE: tl.constexpr, BEHIND: tl.constexpr):
    """Whether there may be tiles before the whole ones (phase 0), whole ones (1) and tiles behind them (2)."""
    if MASK != 0:
        return phase == 0
    elif phase == 1:
        return True
    else:
        return BEFORE if phase == 0 else BEHIND


@triton.jit
def tiles_of(phase: tl.constexpr, begin, middle, second, end):
    if phase == 0:
        return begin, middle
    elif phase == 1:
        return middle, second
    else:
        return second, end


@triton.jit
def seen_of(
    i, j, key_ranges, queries, keys, lower, upper, p_mask, mask_row, mask_column,
    MASK: tl.constexpr, MASK_COLUMN: tl.constexpr, WINDOW: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Whether scores take part, and what a float mask adds to them."""
    in_queries = i < queries
    seen = in_queries & (j < keys)
    added = 0.0
    if key_ranges is not None:
        seen = seen & (j >= tl.load(key_ranges + i.to(tl.int64) * 4, mask=in_queries, other=0))
        seen = seen & (j < tl.load(key_ranges + i.to(tl.int64) * 4 + 1, mask=in_queries, other=0))
    elif WINDOW:
        seen = seen & (j <= i + upper) & (j >= i + lower)
    if MASK != 0:
        p = p_mask + i.to(tl.int64) * mask_row
        if MASK_COLUMN == 1:
            p = p + j
        elif MASK_COLUMN == 0:
            p = p + j * 0
        else:
            p = p + j.to(tl.int64) * mask_column
        if MASK == BOOL_MASK:
            seen = seen & (tl.load(p, mask=seen, other=0) != 0)
        else:
            added = tl.load(p, mask=seen, other=-INFINITY).to(COMPUTE)
            seen = seen & (added != -INFINITY)
    return seen, added


@triton.jit
def any_of(seen):
    return tl.max(tl.max(seen.to(tl.int32), axis=1), axis=0) != 0


@triton.jit
def score(
    s, i, j, seen, added, factor, softcap, slope, diagonal, key_ranges, queries, keys, lower, upper, p_mask, mask_row,
    mask_column, MASK: tl.constexpr, MASK_COLUMN: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, CHECKED: tl.constexpr, BASE2: tl.constexpr,
):  # fmt: skip
    """Products become scores: scaled, capped, masked, -inf where they take no part; and the tanh of the cap.

    CHECKED: some may take no part; seen and added of seen_of, or None for both.
    """
    s = s * factor
    capped = s
    if SOFTCAP:
        capped = tanh(s)
        s = capped * softcap
    if ALIBI:
        place = i + diagonal
        if key_ranges is not None:
            place = tl.load(key_ranges + i.to(tl.int64) * 4 + 2, mask=i < queries, other=0)
        s = s - slope * tl.abs(j - place).to(s.dtype)
    if CHECKED:
        if seen is None:
            seen, added = seen_of(
                i, j, key_ranges, queries, keys, lower, upper, p_mask, mask_row, mask_column, MASK, MASK_COLUMN,
                WINDOW, s.dtype,
            )  # fmt: skip
        if MASK == FLOAT_MASK:
            s = s + (added * LOG2_E if BASE2 else added)
        s = tl.where(seen, s, -INFINITY)
    return s, capped


@triton.jit
def kept_of(
    dropout_key, threshold, first_element, i, j, i_first, j_first, keys,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, KEY_ROWS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Whether dropout keeps the scores of a tile. QUADS: rows of scores are made of Philox counters, four keys each."""
    seed = tl.load(dropout_key).to(tl.uint64, bitcast=True)
    offset = tl.load(dropout_key + 1)
    if QUADS:
        rows = (i_first + tl.arange(0, QUERIES)).to(tl.int64)[:, None]
        quads = (first_element + rows * keys + (j_first + 4 * tl.arange(0, KEYS // 4))[None, :]) >> 2
        w0, w1, w2, w3 = philox4x32(seed, (offset + quads).to(tl.uint64, bitcast=True))
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [QUERIES, KEYS])
        if KEY_ROWS:
            words = tl.trans(words)
    else:
        element = first_element + i.to(tl.int64) * keys + j
        w0, w1, w2, w3 = philox4x32(seed, (offset + (element >> 2)).to(tl.uint64, bitcast=True))
        low = tl.where((element & 1) != 0, w1, w0)
        high = tl.where((element & 1) != 0, w3, w2)
        words = tl.where((element & 2) != 0, high, low)
    return words.to(tl.int64) >= threshold
