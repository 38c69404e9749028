"""The gradients of a mask, dS summed over the dimensions in which the mask is broadcast, and of sinks.

A program of mask_gradient_kernel owns a tile of scores of one of the mask's own matrices and adds up dS of that tile
over all heads that share the matrix, in their order. Where rows or columns are broadcast the tile is then summed to one
row or column, and sum_mask_gradient_kernel adds those of all tiles: a partial result is laid out like the mask, with a
row (column) for every tile of rows (columns) in place of the broadcast one.
"""

import triton
import triton.language as tl

from .scaled_dot_product_attention_backward import gradient_tile
from .scaled_dot_product_attention_tile import LOG2_E, SIZES, head_of, load_rows, number, rows_of, span, weight_of


@triton.jit(do_not_specialize=SIZES)
def mask_gradient_kernel(
    partial, members, statistics, g, q, k, v, mask, dropout_key, slopes, key_ranges,
    g_table, q_table, k_table, v_table, m_table,
    g_inner, g_outer, g_step, g_row, q_inner, q_outer, q_step, q_row,
    k_inner, k_outer, k_step, k_row, v_inner, v_outer, v_step, v_row, m_inner, m_outer, m_step, m_row, m_column,
    queries, keys, dim, value_dim, group, lower, upper, diagonal, factor, softcap, threshold, kept, rows_of_all,
    sharing, row_parts, column_parts,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PACK: tl.constexpr, COMPUTE: tl.constexpr,
    BASE2: tl.constexpr, MASK: tl.constexpr, MASK_COLUMN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, QUADS: tl.constexpr, ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """partial: (matrices, row_parts, column_parts). members: (matrices, sharing) heads of a matrix."""
    WINDOW: tl.constexpr = LEFT or RIGHT
    ALIBI: tl.constexpr = slopes is not None
    row_tiles, column_tiles = tl.cdiv(queries, ROWS), tl.cdiv(keys, COLS)
    column_tile = tl.program_id(0) % column_tiles
    row_tile = tl.program_id(0) // column_tiles % row_tiles
    matrix = (tl.program_id(0) // column_tiles // row_tiles).to(tl.int64)
    rows_of_all = rows_of_all.to(tl.int64)
    factor, softcap, kept = number(factor).to(COMPUTE), number(softcap).to(COMPUTE), number(kept).to(COMPUTE)
    row, column = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLS + tl.arange(0, COLS)
    i, in_queries = row[:, None], (row < queries)[:, None]
    in_keys = (column < keys)[:, None]
    seen = span(
        row_tile * ROWS, tl.minimum(row_tile * ROWS + ROWS, queries) - 1, key_ranges, lower, upper + 1, keys, WINDOW,
        4, COLS, 0,
    )  # fmt: skip
    inside = (seen[0] <= column_tile) & (column_tile < seen[3])

    sums = tl.zeros([ROWS, COLS], SUM)
    for member in range(tl.where(inside, sharing, 0)):
        head = tl.load(members + matrix * sharing + member)
        p_q = rows_of(head_of(q, q_table, head, q_inner, q_outer, q_step, PACK), i, q_row, PACK)
        p_g = rows_of(head_of(g, g_table, head, g_inner, g_outer, g_step, PACK), i, g_row, PACK)
        k_head = head_of(k, k_table, head // group, k_inner, k_outer, k_step, PACK)
        v_head = head_of(v, v_table, head // group, v_inner, v_outer, v_step, PACK)
        p_k, p_v = rows_of(k_head, column[:, None], k_row, PACK), rows_of(v_head, column[:, None], v_row, PACK)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + head)
            if BASE2:
                slope *= LOG2_E
        place = statistics + (head.to(tl.int64) * queries + i)
        shift = tl.load(place, mask=in_queries, other=0.0)
        norm = tl.load(place + rows_of_all, mask=in_queries, other=0.0)
        delta = tl.load(place + 2 * rows_of_all, mask=in_queries, other=0.0)
        b_q, b_g, b_k, b_v = 0.0, 0.0, 0.0, 0.0
        if STEP == 0:
            b_q, b_g = load_rows(p_q, in_queries, 0, DIM, BLOCK_D), load_rows(p_g, in_queries, 0, VALUE_DIM, BLOCK_V)
            b_k, b_v = load_rows(p_k, in_keys, 0, DIM, BLOCK_D), load_rows(p_v, in_keys, 0, VALUE_DIM, BLOCK_V)
        p_mask = head_of(mask, m_table, head, m_inner, m_outer, m_step, 1)
        _, _, ds, _ = gradient_tile(
            b_q, b_g, p_q, p_g, in_queries, b_k, b_v, p_k, p_v, in_keys, i, column[None, :], None, None,
            row_tile * ROWS, column_tile * COLS, shift, norm, delta, head.to(tl.int64) * queries * keys, factor,
            softcap, slope, diagonal, key_ranges, queries, keys, lower, upper, p_mask, m_row, m_column, dropout_key,
            threshold, kept, dim, value_dim, DIM, VALUE_DIM, STEP, ROWS, COLS, COMPUTE, BASE2, MASK, MASK_COLUMN,
            WINDOW, ALIBI, SOFTCAP, QUADS, False, True,
        )  # fmt: skip
        sums += ds.to(SUM)

    r, c = i, column[None, :]
    if ONE_ROW:
        sums = tl.sum(sums, axis=0)[None, :]
        r = tl.full([1, 1], 0, tl.int32) + row_tile
    if ONE_COLUMN:
        sums = tl.sum(sums, axis=1)[:, None]
        c = tl.full([1, 1], 0, tl.int32) + column_tile
    place = partial + (matrix * row_parts + r) * column_parts + c
    tl.store(place, sums.to(partial.dtype.element_ty), mask=(r < row_parts) & (c < column_parts))


@triton.jit(do_not_specialize=["rows", "columns", "row_parts", "column_parts", "count"])
def sum_mask_gradient_kernel(
    to, partial, rows, columns, row_parts, column_parts, count,
    ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """to[matrix][row][column] = the sum of the partial results in its place."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    column, row, matrix = at % columns, at // columns % rows, at // columns // rows
    p = partial + (matrix * row_parts + row) * column_parts + column
    sums = tl.zeros([BLOCK], tl.float64)
    for i in range(row_parts if ONE_ROW else 1):
        for j in range(column_parts if ONE_COLUMN else 1):
            place = p + (i * column_parts + j).to(tl.int64) if ONE_ROW else p + j
            sums += tl.load(place, mask=inside, other=0.0).to(tl.float64)
    tl.store(to + at, sums.to(to.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["queries", "rows_of_all"])
def sink_gradient_kernel(
    grad_sinks, sinks, statistics, queries, rows_of_all,
    COMPUTE: tl.constexpr, BASE2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per head: minus the sum of the weights of its sink times delta."""
    head = tl.program_id(0)
    sink = tl.load(sinks + head)
    if BASE2:
        sink *= LOG2_E
    rows_of_all = rows_of_all.to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, queries, BLOCK):
        row = first + tl.arange(0, BLOCK)
        place = statistics + (head.to(tl.int64) * queries + row)
        shift = tl.load(place, mask=row < queries, other=0.0)
        norm = tl.load(place + rows_of_all, mask=row < queries, other=0.0)
        delta = tl.load(place + 2 * rows_of_all, mask=row < queries, other=0.0)
        weight = weight_of(tl.zeros([BLOCK], COMPUTE) + sink, shift, BASE2) * norm
        sums -= weight.to(tl.float64) * delta.to(tl.float64)
    tl.store(grad_sinks + head, tl.sum(sums, axis=0).to(COMPUTE))
