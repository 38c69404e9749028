"""Attention, backward. With P = exp(S - lse), A = P * keep / (1 - p), G = (dout V^T) * keep / (1 - p):

  delta_i = dout_i . out_i - dlse_i    dS = P * (G - delta)    dQ = scale dX K    dK = scale dX^T Q    dV = A^T dout
  dsink = -sum_i exp(sink - lse_i) delta_i

dX is dS, times the derivative of the soft cap where there is one.

Every sum has one owner, so there are no atomics: a program of queries_kernel owns queries and streams keys (dQ), one of
keys_kernel owns keys and streams the queries of all heads that share them (dK, dV). Either way a tile of scores is
`first own` x `first streamed`, a tile of G is `second own` x `second streamed`:

  owner is    first own   second own   first streamed   second streamed   sums
  queries     Q           dout         K                V                 dQ += dX K
  keys        K           V            Q                dout              dK += dX^T Q, dV += A^T dout

Before, statistics_kernel makes of each row of scores its (shift, norm, delta), P = exp(S - shift) * norm: shift is lse
rounded to the precision of sums, norm the rest.
"""

import triton
import triton.language as tl

from .scaled_dot_product_attention_tile import (
    INFINITY,
    LOG2_E,
    SIZES,
    add_product,
    any_of,
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
    split_lse,
    tiles_of,
    weight_of,
    without_nonfinite,
)

# delta = sum_j P_ij G_ij is dout . out, but out and lse have been rounded: with few keys that error is seen in the
# gradients. Where the queries of a tile see no more keys than this, P and P G are summed for themselves.
SWEPT_KEYS: tl.constexpr = tl.constexpr(512)


@triton.jit
def gradient_tile(
    own_1, own_2, p_own_1, p_own_2, in_own, b_1, b_2, p_1, p_2, in_streamed, i, j, seen, added, i_first,
    j_first, shift, norm, delta, first_element, factor, softcap, slope, diagonal, key_ranges, queries, keys, lower,
    upper, p_mask, m_row, m_column, dropout_key, threshold, kept, dim, value_dim,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STEP: tl.constexpr, OWN: tl.constexpr, STREAMED: tl.constexpr,
    COMPUTE: tl.constexpr, BASE2: tl.constexpr, MASK: tl.constexpr, MASK_COLUMN: tl.constexpr, WINDOW: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, QUADS: tl.constexpr, KEY_ROWS: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """P, A, the gradient of the scores as a mask has it, and of the products; what takes no part has zeros."""
    s = product(own_1, b_1, p_own_1, in_own, p_1, in_streamed, dim, DIM, STEP, OWN, STREAMED, COMPUTE)
    s, capped = score(
        s, i, j, seen, added, factor, softcap, slope, diagonal, key_ranges, queries, keys, lower, upper, p_mask, m_row,
        m_column, MASK, MASK_COLUMN, WINDOW, ALIBI, SOFTCAP, CHECKED, BASE2,
    )  # fmt: skip
    seen = s != -INFINITY
    p = tl.where(seen, weight_of(s, shift, BASE2) * norm, 0.0)
    g = product(own_2, b_2, p_own_2, in_own, p_2, in_streamed, value_dim, VALUE_DIM, STEP, OWN, STREAMED, COMPUTE)
    a = p
    if dropout_key is not None:
        QUERIES: tl.constexpr = STREAMED if KEY_ROWS else OWN
        KEYS: tl.constexpr = OWN if KEY_ROWS else STREAMED
        keep = kept_of(
            dropout_key, threshold, first_element, i, j, i_first, j_first, keys, QUERIES, KEYS, KEY_ROWS, QUADS
        )
        keep = tl.where(keep, kept, 0.0)
        a, g = p * keep, g * keep
    of_mask = tl.where(seen, p * (g - delta), 0.0)
    of_product = of_mask
    if SOFTCAP:
        of_product = tl.where(seen, of_mask * (1.0 - capped * capped), 0.0)
    return p, a, of_mask, of_product


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    statistics, out, lse, grad_lse, g, q, k, v, mask, dropout_key, slopes, sinks, key_ranges,
    o_table, g_table, q_table, k_table, v_table, m_table,
    o_inner, o_outer, o_step, o_row, g_inner, g_outer, g_step, g_row, q_inner, q_outer, q_step, q_row,
    k_inner, k_outer, k_step, k_row, v_inner, v_outer, v_step, v_row, m_inner, m_outer, m_step, m_row, m_column,
    queries, keys, dim, value_dim, group, lower, upper, diagonal, factor, softcap, threshold, kept, rows_of_all,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PACK: tl.constexpr, OUT_PACK: tl.constexpr, COMPUTE: tl.constexpr,
    BASE2: tl.constexpr, MASK: tl.constexpr, MASK_COLUMN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, QUADS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """statistics: (3, heads, queries), `rows_of_all` numbers each. lse and grad_lse: (heads, queries) contiguous."""
    RANGED: tl.constexpr = key_ranges is not None
    WINDOW: tl.constexpr = LEFT or RIGHT
    ALIBI: tl.constexpr = slopes is not None
    tiles = tl.cdiv(queries, ROWS)
    head = tl.program_id(0) // tiles
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * ROWS
    rows_of_all = rows_of_all.to(tl.int64)
    factor, softcap, kept = number(factor).to(COMPUTE), number(softcap).to(COMPUTE), number(kept).to(COMPUTE)
    row = first_row + tl.arange(0, ROWS)
    i = row[:, None]
    in_queries = i < queries
    p_q = rows_of(head_of(q, q_table, head, q_inner, q_outer, q_step, PACK), i, q_row, PACK)
    p_g = rows_of(head_of(g, g_table, head, g_inner, g_outer, g_step, PACK), i, g_row, PACK)
    p_o = rows_of(head_of(out, o_table, head, o_inner, o_outer, o_step, OUT_PACK), i, o_row, OUT_PACK)
    k_head = head_of(k, k_table, head // group, k_inner, k_outer, k_step, PACK)
    v_head = head_of(v, v_table, head // group, v_inner, v_outer, v_step, PACK)
    p_mask = mask
    if MASK != 0:
        p_mask = head_of(mask, m_table, head, m_inner, m_outer, m_step, 1)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + head)
        if BASE2:
            slope *= LOG2_E
    first_element = head.to(tl.int64) * queries * keys
    place = head.to(tl.int64) * queries + i
    shift, norm = split_lse(tl.load(lse + place, mask=in_queries, other=0.0), COMPUTE, BASE2)

    begin, middle, second, end = span(
        first_row, tl.minimum(first_row + ROWS, queries) - 1, key_ranges, lower, upper + 1, keys, WINDOW, 4, COLS, MASK
    )
    swept = (end - begin) * COLS <= SWEPT_KEYS
    delta = tl.zeros([ROWS, 1], COMPUTE)
    if not swept:
        for column in range(0, VALUE_DIM, BLOCK_V):
            products = load_rows(p_o, in_queries, column, VALUE_DIM, BLOCK_V).to(COMPUTE)
            products *= load_rows(p_g, in_queries, column, VALUE_DIM, BLOCK_V).to(COMPUTE)
            delta += tl.sum(products, axis=1)[:, None]
        middle, second, end = begin, begin, begin
    total = tl.zeros([ROWS, 1], COMPUTE if BASE2 else tl.float64)  # as in the forward
    b_q, b_g = 0.0, 0.0
    if STEP == 0:
        b_q, b_g = load_rows(p_q, in_queries, 0, DIM, BLOCK_D), load_rows(p_g, in_queries, 0, VALUE_DIM, BLOCK_V)
    for phase in tl.static_range(3):
        if runs(phase, MASK, LEFT or RANGED, WINDOW or RANGED or not EVEN):
            first, last = tiles_of(phase, begin, middle, second, end)
            for tile in range(first, last):
                rows = tile * COLS + tl.arange(0, COLS)
                seen, added, some = None, None, True
                if MASK != 0:  # a tile that a mask hides is not read
                    seen, added = seen_of(
                        i, rows[None, :], key_ranges, queries, keys, lower, upper, p_mask, m_row, m_column, MASK,
                        MASK_COLUMN, WINDOW, COMPUTE,
                    )  # fmt: skip
                    some = any_of(seen)
                if some:
                    in_keys = (rows < keys)[:, None]
                    p_k, p_v = rows_of(k_head, rows[:, None], k_row, PACK), rows_of(v_head, rows[:, None], v_row, PACK)
                    b_k, b_v = 0.0, 0.0
                    if STEP == 0:
                        b_k = load_rows(p_k, in_keys, 0, DIM, BLOCK_D)
                        b_v = load_rows(p_v, in_keys, 0, VALUE_DIM, BLOCK_V)
                    p, _, ds, _ = gradient_tile(
                        b_q, b_g, p_q, p_g, in_queries, b_k, b_v, p_k, p_v, in_keys, i, rows[None, :], seen, added,
                        first_row, tile * COLS, shift, norm, 0.0, first_element, factor, softcap, slope, diagonal,
                        key_ranges, queries, keys, lower, upper, p_mask, m_row, m_column, dropout_key, threshold, kept,
                        dim, value_dim, DIM, VALUE_DIM, STEP, ROWS, COLS, COMPUTE, BASE2, MASK, MASK_COLUMN, WINDOW,
                        ALIBI, SOFTCAP, QUADS, False, phase != 1,
                    )  # fmt: skip
                    total += tl.sum(p, axis=1)[:, None]
                    delta += tl.sum(ds, axis=1)[:, None]
    if swept:
        if sinks is not None:
            sink = tl.load(sinks + head)
            total += weight_of(tl.zeros([ROWS, 1], COMPUTE) + (sink * LOG2_E if BASE2 else sink), shift, BASE2) * norm
        total = tl.where(total == 0.0, 1.0, total)
        norm, delta = (norm / total).to(COMPUTE), (delta / total).to(COMPUTE)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + place, mask=in_queries, other=0.0).to(COMPUTE)
    tl.store(statistics + place, shift, mask=in_queries)
    tl.store(statistics + rows_of_all + place, norm, mask=in_queries)
    tl.store(statistics + 2 * rows_of_all + place, delta, mask=in_queries)


@triton.jit(do_not_specialize=SIZES)
def queries_kernel(
    dq, statistics, g, q, k, v, mask, dropout_key, slopes, key_ranges,
    dq_table, g_table, q_table, k_table, v_table, m_table,
    dq_inner, dq_outer, dq_step, dq_row, g_inner, g_outer, g_step, g_row, q_inner, q_outer, q_step, q_row,
    k_inner, k_outer, k_step, k_row, v_inner, v_outer, v_step, v_row, m_inner, m_outer, m_step, m_row, m_column,
    queries, keys, dim, value_dim, group, lower, upper, diagonal, factor, softcap, threshold, kept, scale, rows_of_all,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PACK: tl.constexpr, OUT_PACK: tl.constexpr, COMPUTE: tl.constexpr,
    BASE2: tl.constexpr, MASK: tl.constexpr, MASK_COLUMN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, QUADS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS queries and BLOCK_D columns of dQ."""
    RANGED: tl.constexpr = key_ranges is not None
    WINDOW: tl.constexpr = LEFT or RIGHT
    ALIBI: tl.constexpr = slopes is not None
    tiles = tl.cdiv(queries, ROWS)
    head = tl.program_id(0) // tiles
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * ROWS
    column = tl.program_id(1) * BLOCK_D
    rows_of_all = rows_of_all.to(tl.int64)
    factor, softcap, kept = number(factor).to(COMPUTE), number(softcap).to(COMPUTE), number(kept).to(COMPUTE)
    row = first_row + tl.arange(0, ROWS)
    i = row[:, None]
    in_queries = i < queries
    p_q = rows_of(head_of(q, q_table, head, q_inner, q_outer, q_step, PACK), i, q_row, PACK)
    p_g = rows_of(head_of(g, g_table, head, g_inner, g_outer, g_step, PACK), i, g_row, PACK)
    k_head = head_of(k, k_table, head // group, k_inner, k_outer, k_step, PACK)
    v_head = head_of(v, v_table, head // group, v_inner, v_outer, v_step, PACK)
    p_mask = mask
    if MASK != 0:
        p_mask = head_of(mask, m_table, head, m_inner, m_outer, m_step, 1)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + head)
        if BASE2:
            slope *= LOG2_E
    first_element = head.to(tl.int64) * queries * keys
    place = statistics + (head.to(tl.int64) * queries + i)
    shift = tl.load(place, mask=in_queries, other=0.0)
    norm = tl.load(place + rows_of_all, mask=in_queries, other=0.0)
    delta = tl.load(place + 2 * rows_of_all, mask=in_queries, other=0.0)
    b_q, b_g = 0.0, 0.0
    if STEP == 0:
        b_q, b_g = load_rows(p_q, in_queries, 0, DIM, BLOCK_D), load_rows(p_g, in_queries, 0, VALUE_DIM, BLOCK_V)

    acc = tl.zeros([ROWS, BLOCK_D], COMPUTE)
    begin, middle, second, end = span(
        first_row, tl.minimum(first_row + ROWS, queries) - 1, key_ranges, lower, upper + 1, keys, WINDOW, 4, COLS, MASK
    )
    for phase in tl.static_range(3):
        if runs(phase, MASK, LEFT or RANGED, WINDOW or RANGED or not EVEN):
            first, last = tiles_of(phase, begin, middle, second, end)
            for tile in range(first, last):
                rows = tile * COLS + tl.arange(0, COLS)
                seen, added, some = None, None, True
                if MASK != 0:  # a tile that a mask hides is not read
                    seen, added = seen_of(
                        i, rows[None, :], key_ranges, queries, keys, lower, upper, p_mask, m_row, m_column, MASK,
                        MASK_COLUMN, WINDOW, COMPUTE,
                    )  # fmt: skip
                    some = any_of(seen)
                if some:
                    in_keys = (rows < keys)[:, None]
                    p_k, p_v = rows_of(k_head, rows[:, None], k_row, PACK), rows_of(v_head, rows[:, None], v_row, PACK)
                    b_v = 0.0
                    b_k = load_rows(p_k, in_keys, column, DIM, BLOCK_D)
                    if STEP == 0:
                        b_v = load_rows(p_v, in_keys, 0, VALUE_DIM, BLOCK_V)
                    _, _, _, ds = gradient_tile(
                        b_q, b_g, p_q, p_g, in_queries, b_k, b_v, p_k, p_v, in_keys, i, rows[None, :], seen, added,
                        first_row, tile * COLS, shift, norm, delta, first_element, factor, softcap, slope, diagonal,
                        key_ranges, queries, keys, lower, upper, p_mask, m_row, m_column, dropout_key, threshold, kept,
                        dim, value_dim, DIM, VALUE_DIM, STEP, ROWS, COLS, COMPUTE, BASE2, MASK, MASK_COLUMN, WINDOW,
                        ALIBI, SOFTCAP, QUADS, False, phase != 1,
                    )  # fmt: skip
                    if phase != 1 and (MASK != 0 or WINDOW or RANGED):
                        b_k, _ = without_nonfinite(b_k, tl.zeros([COLS], COMPUTE))
                    acc = add_product(acc, ds, b_k, False)

    d = (column + tl.arange(0, BLOCK_D))[None, :]
    p_dq = rows_of(head_of(dq, dq_table, head, dq_inner, dq_outer, dq_step, OUT_PACK), i, dq_row, OUT_PACK)
    acc *= number(scale).to(COMPUTE)
    tl.store(p_dq + d, acc.to(dq.dtype.element_ty), mask=in_queries & (d < DIM))


@triton.jit(do_not_specialize=SIZES)
def keys_kernel(
    dk, dv, statistics, g, q, k, v, mask, dropout_key, slopes, key_ranges, query_ranges,
    dk_table, dv_table, g_table, q_table, k_table, v_table, m_table,
    dk_inner, dk_outer, dk_step, dk_row, dv_inner, dv_outer, dv_step, dv_row,
    g_inner, g_outer, g_step, g_row, q_inner, q_outer, q_step, q_row,
    k_inner, k_outer, k_step, k_row, v_inner, v_outer, v_step, v_row, m_inner, m_outer, m_step, m_row, m_column,
    queries, keys, dim, value_dim, group, lower, upper, diagonal, factor, softcap, threshold, kept, scale, rows_of_all,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PACK: tl.constexpr, OUT_PACK: tl.constexpr, COMPUTE: tl.constexpr,
    BASE2: tl.constexpr, MASK: tl.constexpr, MASK_COLUMN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, QUADS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS keys and BLOCK_D columns of dK, BLOCK_V of dV; it streams COLS queries at a time."""
    RANGED: tl.constexpr = key_ranges is not None
    WINDOW: tl.constexpr = LEFT or RIGHT
    ALIBI: tl.constexpr = slopes is not None
    tiles = tl.cdiv(keys, ROWS)
    key_head = tl.program_id(0) // tiles
    first_row = tl.program_id(0) % tiles * ROWS
    column, value_column = tl.program_id(1) * BLOCK_D, tl.program_id(1) * BLOCK_V
    rows_of_all = rows_of_all.to(tl.int64)
    factor, softcap, kept = number(factor).to(COMPUTE), number(softcap).to(COMPUTE), number(kept).to(COMPUTE)
    row = first_row + tl.arange(0, ROWS)
    j = row[:, None]
    in_keys = j < keys
    p_k = rows_of(head_of(k, k_table, key_head, k_inner, k_outer, k_step, PACK), j, k_row, PACK)
    p_v = rows_of(head_of(v, v_table, key_head, v_inner, v_outer, v_step, PACK), j, v_row, PACK)
    b_k, b_v = 0.0, 0.0
    if STEP == 0:
        b_k, b_v = load_rows(p_k, in_keys, 0, DIM, BLOCK_D), load_rows(p_v, in_keys, 0, VALUE_DIM, BLOCK_V)

    acc, value_acc = tl.zeros([ROWS, BLOCK_D], COMPUTE), tl.zeros([ROWS, BLOCK_V], COMPUTE)
    spoiled = tl.zeros([COLS], COMPUTE)
    begin, middle, second, end = span(
        first_row, tl.minimum(first_row + ROWS, keys) - 1, query_ranges, -upper, 1 - lower, queries, WINDOW, 2, COLS,
        MASK,
    )  # fmt: skip
    for member in range(group):
        head = key_head * group + member
        q_head = head_of(q, q_table, head, q_inner, q_outer, q_step, PACK)
        g_head = head_of(g, g_table, head, g_inner, g_outer, g_step, PACK)
        p_mask = mask
        if MASK != 0:
            p_mask = head_of(mask, m_table, head, m_inner, m_outer, m_step, 1)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + head)
            if BASE2:
                slope *= LOG2_E
        first_element = head.to(tl.int64) * queries * keys
        for phase in tl.static_range(3):
            if runs(phase, MASK, RIGHT or RANGED, WINDOW or RANGED or not EVEN):
                first, last = tiles_of(phase, begin, middle, second, end)
                for tile in range(first, last):
                    rows = tile * COLS + tl.arange(0, COLS)
                    i = rows[None, :]
                    seen, added, some = None, None, True
                    if MASK != 0:
                        seen, added = seen_of(
                            i, j, key_ranges, queries, keys, lower, upper, p_mask, m_row, m_column, MASK,
                            MASK_COLUMN, WINDOW, COMPUTE,
                        )  # fmt: skip
                        some = any_of(seen)
                    if some:
                        in_queries = (rows < queries)[:, None]
                        p_q = rows_of(q_head, rows[:, None], q_row, PACK)
                        p_g = rows_of(g_head, rows[:, None], g_row, PACK)
                        place = statistics + (head.to(tl.int64) * queries + i)
                        shift = tl.load(place, mask=i < queries, other=0.0)
                        norm = tl.load(place + rows_of_all, mask=i < queries, other=0.0)
                        delta = tl.load(place + 2 * rows_of_all, mask=i < queries, other=0.0)
                        b_q = load_rows(p_q, in_queries, column, DIM, BLOCK_D)
                        b_g = load_rows(p_g, in_queries, value_column, VALUE_DIM, BLOCK_V)
                        _, a, _, ds = gradient_tile(
                            b_k, b_v, p_k, p_v, in_keys, b_q, b_g, p_q, p_g, in_queries, i, j, seen, added, tile * COLS,
                            first_row, shift, norm, delta, first_element, factor, softcap, slope, diagonal, key_ranges,
                            queries, keys, lower, upper, p_mask, m_row, m_column, dropout_key, threshold, kept, dim,
                            value_dim, DIM, VALUE_DIM, STEP, ROWS, COLS, COMPUTE, BASE2, MASK, MASK_COLUMN, WINDOW,
                            ALIBI, SOFTCAP, QUADS, True, phase != 1,
                        )  # fmt: skip
                        if phase != 1 and (MASK != 0 or WINDOW or RANGED):
                            b_q, _ = without_nonfinite(b_q, spoiled)
                            b_g, spoiled = without_nonfinite(b_g, spoiled)
                        value_acc = add_product(value_acc, a, b_g, True)
                        acc = add_product(acc, ds, b_q, False)
    if MASK != 0 or WINDOW or RANGED or BASE2:
        spoiled_sum = tl.sum(spoiled, axis=0)
        incomplete = spoiled_sum != spoiled_sum
        if BASE2:
            value_acc, lost = set_nan_aside(value_acc)
            incomplete = incomplete | lost
        for member in range(tl.where(incomplete, group, 0)):
            head = key_head * group + member
            g_head = head_of(g, g_table, head, g_inner, g_outer, g_step, PACK)
            p_mask = mask
            if MASK != 0:
                p_mask = head_of(mask, m_table, head, m_inner, m_outer, m_step, 1)
            for tile in range(begin, end):
                rows = tile * COLS + tl.arange(0, COLS)
                in_queries = (rows < queries)[:, None]
                b_g = load_rows(
                    rows_of(g_head, rows[:, None], g_row, PACK), in_queries, value_column, VALUE_DIM, BLOCK_V
                )
                shift = tl.load(statistics + (head.to(tl.int64) * queries + rows[:, None]), mask=in_queries, other=0.0)
                b_g += (shift * 0.0).to(b_g.dtype)  # NaN where weights are
                seen, _ = seen_of(
                    rows[None, :], j, key_ranges, queries, keys, lower, upper, p_mask, m_row, m_column, MASK,
                    MASK_COLUMN, WINDOW, COMPUTE,
                )  # fmt: skip
                value_acc += nonfinite_sum(seen, b_g, COMPUTE)
        if BASE2:
            value_acc = put_nan_back(value_acc)

    d, dv_d = (column + tl.arange(0, BLOCK_D))[None, :], (value_column + tl.arange(0, BLOCK_V))[None, :]
    p_dk = rows_of(head_of(dk, dk_table, key_head, dk_inner, dk_outer, dk_step, OUT_PACK), j, dk_row, OUT_PACK)
    p_dv = rows_of(head_of(dv, dv_table, key_head, dv_inner, dv_outer, dv_step, OUT_PACK), j, dv_row, OUT_PACK)
    acc *= number(scale).to(COMPUTE)
    tl.store(p_dk + d, acc.to(dk.dtype.element_ty), mask=in_keys & (d < DIM))
    tl.store(p_dv + dv_d, value_acc.to(dv.dtype.element_ty), mask=in_keys & (dv_d < VALUE_DIM))
