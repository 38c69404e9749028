"""Attention, forward: one pass over the keys with an online softmax.

A program owns ROWS queries of a head and BLOCK_V columns of their outputs; tiles of COLS keys and values stream past.
Tiles outside of what all its queries see, and those that a mask hides from all of them, are never read; those in which
every score takes part are told from the others by their place, and pay nothing for masks.

Few queries over many keys, as in decoding with a cache, would leave most of a GPU idle: their keys are split into
parts. A program then owns a part of the keys of a key head and ROWS of the queries of all heads that share it, so that
keys and values are read once for a group; merge_kernel adds up what the parts give for a row, in their order.
"""

import triton
import triton.language as tl

from .scaled_dot_product_attention_tile import (
    INFINITY,
    LOG2_E,
    SIZES,
    add_product,
    any_of,
    exponential,
    head_of,
    kept_of,
    load_rows,
    nonfinite_sum,
    number,
    product,
    put_nan_back,
    rows_of,
    runs,
    score,
    seen_of,
    set_nan_aside,
    span,
    tiles_of,
    without_nonfinite,
)


@triton.jit
def forward_tile(
    out, top, total, spoiled, own, p_own, in_own, row, k_head, k_row, v_head, v_row, i, seen, added, j_first,
    out_column, first_row, first_element, factor, softcap, slope, diagonal, key_ranges, queries, keys, lower, upper,
    p_mask, m_row, m_column, dropout_key, threshold, kept, dim, value_dim,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PACK: tl.constexpr, COMPUTE: tl.constexpr, BASE2: tl.constexpr,
    MASK: tl.constexpr, MASK_COLUMN: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    QUADS: tl.constexpr, CHECKED: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """The running sums (ROWS, BLOCK_V), maxima (ROWS, 1) and totals with one more tile of keys.

    HIDES: what is not seen may be NaN or infinite; spoiled, (COLS,), becomes NaN where a value was and is left out.
    """
    rows = j_first + tl.arange(0, COLS)
    in_keys = (rows < keys)[:, None]
    p_k = rows_of(k_head, rows[:, None], k_row, PACK)
    b_k = 0.0
    if STEP == 0:
        b_k = load_rows(p_k, in_keys, 0, DIM, BLOCK_D)
    s = product(own, b_k, p_own, in_own, p_k, in_keys, dim, DIM, STEP, ROWS, COLS, COMPUTE)
    j = rows[None, :]
    s, _ = score(
        s, i, j, seen, added, factor, softcap, slope, diagonal, key_ranges, queries, keys, lower, upper, p_mask, m_row,
        m_column, MASK, MASK_COLUMN, WINDOW, ALIBI, SOFTCAP, CHECKED, BASE2,
    )  # fmt: skip
    most = tl.maximum(top, tl.max(s, axis=1)[:, None])
    shift = tl.where(most == -INFINITY, 0.0, most)
    p = exponential(s - shift, BASE2)
    correction = exponential(top - shift, BASE2)
    total = total * correction + tl.sum(p, axis=1)[:, None]
    if dropout_key is not None:
        keep = kept_of(
            dropout_key, threshold, first_element, row, j, first_row, j_first, keys, ROWS, COLS, False, QUADS
        )
        p = tl.where(keep, p * kept, 0.0)
    b_v = load_rows(rows_of(v_head, rows[:, None], v_row, PACK), in_keys, out_column, VALUE_DIM, BLOCK_V)
    out = out * correction
    if HIDES:
        b_v, spoiled = without_nonfinite(b_v, spoiled)
    return add_product(out, p, b_v, True), most, total, spoiled


@triton.jit
def within(tile, first, count):
    """The nearest of `count` tiles from `first` on, or their end."""
    return tl.minimum(tl.maximum(tile, first), first + count)


@triton.jit
def log_sum(top, total, BASE2: tl.constexpr):
    """log of a sum of weights against `top`, -inf of none."""
    if BASE2:
        sums = (top + tl.log2(total)) / LOG2_E
    else:
        sums = top.to(tl.float64) + tl.log(total.to(tl.float64))
    return tl.where(total == 0.0, -INFINITY, sums)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    out, lse, q, k, v, mask, dropout_key, slopes, sinks, key_ranges, tops, totals, sums, wanted,
    o_table, q_table, k_table, v_table, m_table,
    o_inner, o_outer, o_step, o_row, q_inner, q_outer, q_step, q_row,
    k_inner, k_outer, k_step, k_row, v_inner, v_outer, v_step, v_row, m_inner, m_outer, m_step, m_row, m_column,
    queries, keys, dim, value_dim, group, lower, upper, diagonal, factor, softcap, threshold, kept, parts, part_keys,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PACK: tl.constexpr, OUT_PACK: tl.constexpr, COMPUTE: tl.constexpr,
    BASE2: tl.constexpr, MASK: tl.constexpr, MASK_COLUMN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, QUADS: tl.constexpr, EVEN: tl.constexpr, WANTED_ROWS: tl.constexpr,
):  # fmt: skip
    """out (heads, queries, VALUE_DIM), lse (heads, queries) contiguous. See scaled_dot_product_attention_launch.py.

    With sums, (heads, queries, parts, VALUE_DIM), the keys are split: the other results are tops and totals, (heads,
    queries, parts), in place of out and lse. Where a total is 0 there may be no sums.
    wanted (heads, an even number of tiles of WANTED_ROWS queries), or None for all: which tiles are to be computed.
    """
    SPLIT: tl.constexpr = sums is not None
    RANGED: tl.constexpr = key_ranges is not None
    WINDOW: tl.constexpr = LEFT or RIGHT
    ALIBI: tl.constexpr = slopes is not None
    all_rows = queries * group if SPLIT else queries
    tiles = tl.cdiv(all_rows, ROWS)
    block = tl.program_id(0) // tiles
    # The last queries see the most keys of a causal head: their programs begin first.
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * ROWS
    out_column = tl.program_id(1) * BLOCK_V
    if wanted is not None:
        halves = tl.cdiv(queries, 2 * WANTED_ROWS) * 2
        half = first_row // WANTED_ROWS + tl.arange(0, (ROWS + WANTED_ROWS - 1) // WANTED_ROWS)
        if tl.sum(tl.load(wanted + block * halves + half, mask=half < halves, other=0), axis=0) == 0:
            return
    factor, softcap, kept = number(factor).to(COMPUTE), number(softcap).to(COMPUTE), number(kept).to(COMPUTE)
    row = (first_row + tl.arange(0, ROWS))[:, None]
    in_rows = row < all_rows
    if SPLIT:  # rows of one head come after those of the other
        key_head, i = block // parts, row % queries
        first_head = key_head * group
        head = first_head + tl.minimum(row, all_rows - 1) // queries  # of each row
    else:
        head, i = block, row
        key_head, first_head = head // group, head
    p_q = rows_of(head_of(q, q_table, head, q_inner, q_outer, q_step, PACK), i, q_row, PACK)
    k_head = head_of(k, k_table, key_head, k_inner, k_outer, k_step, PACK)
    v_head = head_of(v, v_table, key_head, v_inner, v_outer, v_step, PACK)
    p_mask = mask
    if MASK != 0:
        p_mask = head_of(mask, m_table, head, m_inner, m_outer, m_step, 1)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + head)
        if BASE2:
            slope *= LOG2_E
    first_element = first_head.to(tl.int64) * queries * keys
    own = 0.0
    if STEP == 0:
        own = load_rows(p_q, in_rows, 0, DIM, BLOCK_D)

    acc = tl.zeros([ROWS, BLOCK_V], COMPUTE)
    top = tl.full([ROWS, 1], -INFINITY, COMPUTE)
    # Of float32 tiles there are many, and their rounding errors would be one of a whole row of weights.
    total = tl.zeros([ROWS, 1], COMPUTE if BASE2 else tl.float64)
    spoiled = tl.zeros([COLS], COMPUTE)
    if sinks is not None:
        sink = tl.load(sinks + head)
        top = tl.zeros([ROWS, 1], COMPUTE) + (sink * LOG2_E if BASE2 else sink)
        total += 1.0

    first_place, last_place = first_row, tl.minimum(first_row + ROWS, queries) - 1
    if SPLIT:
        first_place, last_place = first_row * 0, queries - 1
    begin, middle, second, end = span(
        first_place, last_place, key_ranges, lower, upper + 1, keys, WINDOW, 4, COLS, MASK
    )
    if SPLIT:
        first_tile = block % parts * (part_keys // COLS)
        begin, middle = within(begin, first_tile, part_keys // COLS), within(middle, first_tile, part_keys // COLS)
        second, end = within(second, first_tile, part_keys // COLS), within(end, first_tile, part_keys // COLS)
    for phase in tl.static_range(3):
        if runs(phase, MASK, LEFT or RANGED, WINDOW or RANGED or not EVEN):
            first, last = tiles_of(phase, begin, middle, second, end)
            for tile in range(first, last):
                seen, added, some = None, None, True
                if MASK != 0:  # a tile that a mask hides is not read
                    j = (tile * COLS + tl.arange(0, COLS))[None, :]
                    seen, added = seen_of(
                        i, j, key_ranges, queries, keys, lower, upper, p_mask, m_row, m_column, MASK, MASK_COLUMN,
                        WINDOW, COMPUTE,
                    )  # fmt: skip
                    some = any_of(seen)
                if some:
                    acc, top, total, spoiled = forward_tile(
                        acc, top, total, spoiled, own, p_q, in_rows, row, k_head, k_row, v_head, v_row, i, seen, added,
                        tile * COLS, out_column, first_row, first_element, factor, softcap, slope, diagonal, key_ranges,
                        queries, keys, lower, upper, p_mask, m_row, m_column, dropout_key, threshold, kept, dim,
                        value_dim, DIM, VALUE_DIM, STEP, BLOCK_D, BLOCK_V, ROWS, COLS, PACK, COMPUTE, BASE2, MASK,
                        MASK_COLUMN, WINDOW, ALIBI, SOFTCAP, QUADS, phase != 1,
                        phase != 1 and (MASK != 0 or WINDOW or RANGED),
                    )  # fmt: skip

    if MASK != 0 or WINDOW or RANGED or BASE2:
        spoiled_sum = tl.sum(spoiled, axis=0)
        incomplete = spoiled_sum != spoiled_sum
        if BASE2:  # where weights are NaN, so is their total
            acc, lost = set_nan_aside(acc)
            incomplete = incomplete | lost
        for tile in range(begin, tl.where(incomplete, end, begin)):
            rows = tile * COLS + tl.arange(0, COLS)
            p_v = rows_of(v_head, rows[:, None], v_row, PACK)
            b_v = load_rows(p_v, (rows < keys)[:, None], out_column, VALUE_DIM, BLOCK_V)
            seen, _ = seen_of(
                i, rows[None, :], key_ranges, queries, keys, lower, upper, p_mask, m_row, m_column, MASK, MASK_COLUMN,
                WINDOW, COMPUTE,
            )  # fmt: skip
            acc += nonfinite_sum(seen, b_v, COMPUTE)
        if BASE2:
            acc = put_nan_back(acc)

    d = (out_column + tl.arange(0, BLOCK_V))[None, :]
    if SPLIT:
        place = (first_head.to(tl.int64) * queries + row) * parts + block % parts
        tl.store(tops + place, top, mask=in_rows & (tl.program_id(1) == 0))
        tl.store(totals + place, total, mask=in_rows & (tl.program_id(1) == 0))
        tl.store(sums + place * VALUE_DIM + d, acc, mask=in_rows & (d < VALUE_DIM) & (begin < end))
    else:
        if tl.program_id(1) == 0:
            p_lse = lse + head.to(tl.int64) * queries + i
            tl.store(p_lse, log_sum(top, total, BASE2).to(lse.dtype.element_ty), mask=in_rows)
        total = tl.where(total == 0.0, 1.0, total).to(COMPUTE)
        result = acc / total if COMPUTE.primitive_bitwidth == 64 else tl.div_rn(acc, total + tl.zeros_like(acc))
        p_out = rows_of(head_of(out, o_table, head, o_inner, o_outer, o_step, OUT_PACK), i, o_row, OUT_PACK)
        tl.store(p_out + d, result.to(out.dtype.element_ty), mask=in_rows & (d < VALUE_DIM))


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    out, lse, tops, totals, sums, sinks, o_table, o_inner, o_outer, o_step, o_row, queries, parts,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, OUT_PACK: tl.constexpr, COMPUTE: tl.constexpr, BASE2: tl.constexpr,
):  # fmt: skip
    """out and lse of a row from tops, totals and sums of its parts. Sinks come in here, once."""
    head, i = tl.program_id(0) // queries, tl.program_id(0) % queries
    d = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    first = tl.program_id(0).to(tl.int64) * parts + tl.zeros([1], tl.int64)
    top = tl.full([1], -INFINITY, COMPUTE)
    if sinks is not None:
        sink = tl.load(sinks + head + tl.zeros([1], tl.int32))
        sink = sink * LOG2_E if BASE2 else sink
        top = sink
    for part in range(parts):
        top = tl.maximum(top, tl.load(tops + first + part))
    shift = tl.where(top == -INFINITY, 0.0, top)

    total = tl.zeros([1], totals.dtype.element_ty)
    acc = tl.zeros([BLOCK_V], totals.dtype.element_ty)
    if sinks is not None:
        total += exponential(sink - shift, BASE2)
    for part in range(parts):
        factor, of_part = exponential(tl.load(tops + first + part) - shift, BASE2), tl.load(totals + first + part)
        total += of_part * factor
        acc += (
            tl.load(sums + (first + part) * VALUE_DIM + d, mask=(of_part != 0.0) & (d < VALUE_DIM), other=0.0) * factor
        )

    if tl.program_id(1) == 0:
        p_lse = lse + tl.program_id(0) + tl.zeros([1], tl.int64)
        tl.store(p_lse, log_sum(top, total, BASE2).to(lse.dtype.element_ty))
    total = tl.where(total == 0.0, 1.0, total) + tl.zeros_like(acc)
    result = tl.div_rn(acc, total) if BASE2 else acc / total
    p_out = rows_of(head_of(out, o_table, head, o_inner, o_outer, o_step, OUT_PACK), i, o_row, OUT_PACK)
    tl.store(p_out + d, result.to(out.dtype.element_ty), mask=d < VALUE_DIM)
