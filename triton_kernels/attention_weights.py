"""The weights of attention themselves, P with dropout, formed once more from query, key and lse.

A program owns a tile of one matrix of the result and adds up the weights of all heads that the matrix is the mean of,
in their order: there is never a matrix per head.
"""

import triton
import triton.language as tl

from .scaled_dot_product_attention_launch import Problem
from .scaled_dot_product_attention_tile import (
    INFINITY,
    LOG2_E,
    SIZES,
    head_of,
    kept_of,
    load_rows,
    number,
    product,
    rows_of,
    score,
    span,
    split_lse,
    weight_of,
)


def attention_weights(query, key, *rest):
    """attention_weights(Tensor query, Tensor key, Tensor? attn_mask, Tensor? dropout_key, Tensor? alibi_slopes,
    Tensor? sinks, Tensor? key_ranges, Tensor? query_ranges, Tensor lse, float dropout_p, int left, int right,
    bool lower_right, float scale, float softcap, bool average) -> Tensor"""
    *tensors, lse = rest[:7]
    *options, average = rest[7:]
    p = Problem(query, key, key, *tensors, *options)
    weights = query.new_empty((*query.shape[: -3 if average else -2], p.queries, p.keys))
    if p.is_empty:
        return weights.zero_()
    tile, together = p.tile("mask"), query.shape[-3] if average else 1
    tiles = triton.cdiv(p.queries, tile.rows) * triton.cdiv(p.keys, tile.columns)
    more = {"weights": weights, "lse": lse.contiguous(), "sharing": together}
    p.launch(weights_kernel, p.heads // together * tiles, (0, 0), tile, p.arguments() | more)
    return weights


@triton.jit(do_not_specialize=SIZES)
def weights_kernel(
    weights, lse, q, k, mask, dropout_key, slopes, key_ranges, q_table, k_table, m_table,
    q_inner, q_outer, q_step, q_row, k_inner, k_outer, k_step, k_row, m_inner, m_outer, m_step, m_row, m_column,
    queries, keys, dim, group, lower, upper, diagonal, factor, softcap, threshold, kept, sharing,
    DIM: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PACK: tl.constexpr, COMPUTE: tl.constexpr, BASE2: tl.constexpr, MASK: tl.constexpr, MASK_COLUMN: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """weights: (matrices, queries, keys), each the mean over `sharing` heads. lse: (heads, queries)."""
    WINDOW: tl.constexpr = LEFT or RIGHT
    ALIBI: tl.constexpr = slopes is not None
    row_tiles, column_tiles = tl.cdiv(queries, ROWS), tl.cdiv(keys, COLS)
    column_tile = tl.program_id(0) % column_tiles
    row_tile = tl.program_id(0) // column_tiles % row_tiles
    matrix = tl.program_id(0) // column_tiles // row_tiles
    factor, softcap, kept = number(factor).to(COMPUTE), number(softcap).to(COMPUTE), number(kept).to(COMPUTE)
    row, column = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLS + tl.arange(0, COLS)
    i, j = row[:, None], column[None, :]
    in_queries, in_keys = i < queries, (column < keys)[:, None]
    seen = span(
        row_tile * ROWS, tl.minimum(row_tile * ROWS + ROWS, queries) - 1, key_ranges, lower, upper + 1, keys, WINDOW,
        4, COLS, 0,
    )  # fmt: skip
    inside = (seen[0] <= column_tile) & (column_tile < seen[3])

    sums = tl.zeros([ROWS, COLS], COMPUTE)
    for member in range(tl.where(inside, sharing, 0)):
        head = matrix * sharing + member
        p_q = rows_of(head_of(q, q_table, head, q_inner, q_outer, q_step, PACK), i, q_row, PACK)
        k_head = head_of(k, k_table, head // group, k_inner, k_outer, k_step, PACK)
        p_k = rows_of(k_head, column[:, None], k_row, PACK)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + head)
            if BASE2:
                slope *= LOG2_E
        log_sums = tl.load(lse + (head.to(tl.int64) * queries + i), mask=in_queries, other=0.0)
        shift, norm = split_lse(log_sums, COMPUTE, BASE2)
        b_q, b_k = 0.0, 0.0
        if STEP == 0:
            b_q, b_k = load_rows(p_q, in_queries, 0, DIM, BLOCK_D), load_rows(p_k, in_keys, 0, DIM, BLOCK_D)
        s = product(b_q, b_k, p_q, in_queries, p_k, in_keys, dim, DIM, STEP, ROWS, COLS, COMPUTE)
        p_mask = mask
        if MASK != 0:
            p_mask = head_of(mask, m_table, head, m_inner, m_outer, m_step, 1)
        s, _ = score(
            s, i, j, None, None, factor, softcap, slope, diagonal, key_ranges, queries, keys, lower, upper, p_mask,
            m_row, m_column, MASK, MASK_COLUMN, WINDOW, ALIBI, SOFTCAP, True, BASE2,
        )  # fmt: skip
        weight = tl.where(s != -INFINITY, weight_of(s, shift, BASE2) * norm, 0.0)
        if dropout_key is not None:
            keep = kept_of(
                dropout_key, threshold, head.to(tl.int64) * queries * keys, i, j, row_tile * ROWS, column_tile * COLS,
                keys, ROWS, COLS, False, QUADS,
            )  # fmt: skip
            weight = tl.where(keep, weight * kept, 0.0)
        sums += weight
    place = weights + ((matrix.to(tl.int64) * queries + i) * keys + j)
    tl.store(place, (sums / sharing).to(weights.dtype.element_ty), mask=in_queries & (j < keys))
