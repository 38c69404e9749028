"""Additive attention in Triton. See csrc/include/additive_attention.h.

A program owns a query (forward, gradients of the query, of the scores and of its part of the weight) or a key
(gradients of the key and its value) and walks the others in tiles of TILE rows, whole rows at a time: the tangents of a
tile, [TILE, DIM], are in registers until both its scores and what they are needed for have been made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .products import compute_dtype
from .recurrent_cells import tanh

# Bytes of a tile in the compute type: more do not fit the registers of its warps, which are twice as wide on AMD; the
# interpreter pays for operations, not for elements.
BYTES = {"cuda": 8192, "hip": 2048, "interpret": 65536}
COLUMNS = 1024  # of the values that a program of the forward sums


@triton.jit
def offset_of_head(i_head, inner, outer_stride, inner_stride):
    """Where the mask of a head begins; heads are (outer, inner), either of which may be broadcast."""
    return i_head // inner * outer_stride + i_head % inner * inner_stride


@triton.jit
def mask_tile(p_mask, o_mask, seen, A: tl.constexpr, BOOL: tl.constexpr):
    """Which scores take part, of those `seen` so far, and what is added to them."""
    b_added = tl.zeros(seen.shape, A)
    if p_mask is not None:
        if BOOL:
            seen = seen & (tl.load(p_mask + o_mask, seen, 0) != 0)
        else:
            b_added = tl.load(p_mask + o_mask, seen, 0.0).to(A)
            seen = seen & (b_added != float("-inf"))
    return seen, b_added


@triton.jit
def tangents(p_rows, o_row, seen, b_other, columns, DIM: tl.constexpr, A: tl.constexpr, S: tl.constexpr):
    """tanh(row + other), [TILE, DIM]: of rows that are not seen, tanh(other)."""
    o_column = tl.arange(0, DIM)
    inside = seen[:, None] & (o_column < columns)[None, :]
    b_rows = tl.load(p_rows + o_row[:, None] * columns + o_column[None, :], inside, 0.0).to(A)
    if tl.float64 == S:  # to one unit in the last place: its error is most of that of float32 scores
        return libdevice.tanh(b_rows + b_other[None, :])
    else:
        return tanh(b_rows + b_other[None, :])


@triton.jit
def score_of(b_t, b_weight, b_added, S: tl.constexpr):
    """Summed in the precision of lse, float64 for float32: an error of a score is one of its whole row."""
    return tl.sum(b_t.to(S) * b_weight.to(S)[None, :], 1) + b_added.to(S)


@triton.jit
def row_of(p_rows, i_row, columns, WIDTH: tl.constexpr, A: tl.constexpr):
    o_column = tl.arange(0, WIDTH)
    return tl.load(p_rows + i_row * columns + o_column, o_column < columns, 0.0).to(A)


@triton.jit
def forward_kernel(
    p_out, p_lse, p_weights, p_query, p_key, p_value, p_weight, p_mask, outer_stride, inner_stride, row_stride,
    column_stride, inner, queries, keys, dim, value_dim,
    TILE: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, A: tl.constexpr, S: tl.constexpr,
    BOOL: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of a row of out; the first program of a row writes its lse and weights too."""
    i_row = tl.program_id(0).to(tl.int64)
    i_head, i_query = i_row // queries, i_row % queries
    o_mask = offset_of_head(i_head, inner, outer_stride, inner_stride) + i_query * row_stride
    o_value = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b_query = row_of(p_query, i_row, dim, DIM, A)
    b_weight = row_of(p_weight, 0, dim, DIM, A)
    top = tl.full([], float("-inf"), S)
    total = tl.zeros([], S)
    b_out = tl.zeros([COLUMNS], A)
    for first in range(0, keys, TILE):
        o_key = first + tl.arange(0, TILE).to(tl.int64)
        seen, b_added = mask_tile(p_mask, o_mask + o_key * column_stride, o_key < keys, A, BOOL)
        b_t = tangents(p_key, i_head * keys + o_key, seen, b_query, dim, DIM, A, S)  # [TILE, DIM]
        b_score = tl.where(seen, score_of(b_t, b_weight, b_added, S), float("-inf"))
        new_top = tl.maximum(top, tl.max(b_score, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        rescale = tl.exp((top - shift).to(A))
        b_share = tl.where(seen, tl.exp((b_score - shift).to(A)), 0.0)
        total = total * rescale.to(S) + tl.sum(b_share.to(S), 0)
        inside = seen[:, None] & (o_value < value_dim)[None, :]
        p_tile = p_value + (i_head * keys + o_key)[:, None] * value_dim + o_value[None, :]
        b_value = tl.load(p_tile, inside, 0.0).to(A)  # [TILE, COLUMNS]
        b_out = b_out * rescale + tl.sum(tl.where(seen[:, None], b_share[:, None] * b_value, 0.0), 0)
        top = new_top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(p_out + i_row * value_dim + o_value, (b_out / total.to(A)).to(p_out.dtype.element_ty), o_value < value_dim)
    if tl.program_id(1) == 0:
        lse = tl.where(empty, float("-inf"), top + tl.log(total))
        tl.store(p_lse + i_row, lse.to(p_lse.dtype.element_ty))
        if p_weights is not None:
            for first in range(0, keys, TILE):
                o_key = first + tl.arange(0, TILE).to(tl.int64)
                seen, b_added = mask_tile(p_mask, o_mask + o_key * column_stride, o_key < keys, A, BOOL)
                b_t = tangents(p_key, i_head * keys + o_key, seen, b_query, dim, DIM, A, S)
                b_score = score_of(b_t, b_weight, b_added, S)
                b_share = tl.where(seen, tl.exp((b_score - top).to(A)) / total.to(A), 0.0)
                tl.store(p_weights + i_row * keys + o_key, b_share.to(p_weights.dtype.element_ty), o_key < keys)


@triton.jit
def shares_and_slopes(
    p_rows, o_row, p_grad_weights, o_weight, seen, b_score, b_other, lse, value_dim,
    VALUE: tl.constexpr, A: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """P, [TILE], and its gradient, from rows of values or of grad_out and the one `other`; those rows."""
    b_share = tl.where(seen, tl.exp((b_score - lse).to(A)), 0.0)
    o_value = tl.arange(0, VALUE)
    inside = seen[:, None] & (o_value < value_dim)[None, :]
    b_rows = tl.load(p_rows + o_row[:, None] * value_dim + o_value[None, :], inside, 0.0).to(A)  # [TILE, VALUE]
    b_slope = tl.sum(b_rows * b_other[None, :], 1).to(S)
    if p_grad_weights is not None:
        b_slope += tl.load(p_grad_weights + o_weight, seen, 0.0).to(S)
    return b_share, tl.where(seen, b_slope, 0.0), b_rows


@triton.jit
def query_kernel(
    p_grad_query, p_weight_parts, p_grad_scores, p_deltas, p_grad_out, p_grad_weights, p_lse, p_query, p_key, p_value,
    p_weight, p_mask, outer_stride, inner_stride, row_stride, column_stride, inner, queries, keys, dim, value_dim,
    TILE: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr, A: tl.constexpr, S: tl.constexpr,
    BOOL: tl.constexpr,
):  # fmt: skip
    """delta of a query; then its gradient, that of its scores, and its part of the weight's."""
    i_row = tl.program_id(0).to(tl.int64)
    i_head, i_query = i_row // queries, i_row % queries
    o_mask = offset_of_head(i_head, inner, outer_stride, inner_stride) + i_query * row_stride
    b_query = row_of(p_query, i_row, dim, DIM, A)
    b_weight = row_of(p_weight, 0, dim, DIM, A)
    b_grad_out = row_of(p_grad_out, i_row, value_dim, VALUE, A)
    lse = tl.load(p_lse + i_row).to(S)
    delta = tl.zeros([], S)
    for first in range(0, keys, TILE):
        o_key = first + tl.arange(0, TILE).to(tl.int64)
        o_row = i_head * keys + o_key
        seen, b_added = mask_tile(p_mask, o_mask + o_key * column_stride, o_key < keys, A, BOOL)
        b_t = tangents(p_key, o_row, seen, b_query, dim, DIM, A, S)
        b_score = score_of(b_t, b_weight, b_added, S)
        b_share, b_slope, _ = shares_and_slopes(
            p_value, o_row, p_grad_weights, i_row * keys + o_key, seen, b_score, b_grad_out, lse, value_dim, VALUE, A, S
        )
        delta += tl.sum(b_share.to(S) * b_slope, 0)
    tl.store(p_deltas + i_row, delta)
    b_to_query = tl.zeros([DIM], A)
    b_to_weight = tl.zeros([DIM], A)
    for first in range(0, keys, TILE):
        o_key = first + tl.arange(0, TILE).to(tl.int64)
        o_row = i_head * keys + o_key
        seen, b_added = mask_tile(p_mask, o_mask + o_key * column_stride, o_key < keys, A, BOOL)
        b_t = tangents(p_key, o_row, seen, b_query, dim, DIM, A, S)
        b_score = score_of(b_t, b_weight, b_added, S)
        b_share, b_slope, _ = shares_and_slopes(
            p_value, o_row, p_grad_weights, i_row * keys + o_key, seen, b_score, b_grad_out, lse, value_dim, VALUE, A, S
        )
        b_slope = tl.where(seen, b_share.to(S) * (b_slope - delta), 0.0).to(A)
        if p_grad_scores is not None:
            tl.store(p_grad_scores + i_row * keys + o_key, b_slope, o_key < keys)
        # A query without keys may hold anything.
        b_t = tl.where(seen[:, None], b_t, 0.0)
        b_to_query += tl.sum(b_slope[:, None] * (1.0 - b_t * b_t), 0)
        b_to_weight += tl.sum(b_slope[:, None] * b_t, 0)
    o_column = tl.arange(0, DIM)
    inside = o_column < dim
    tl.store(p_grad_query + i_row * dim + o_column, (b_to_query * b_weight).to(p_grad_query.dtype.element_ty), inside)
    tl.store(p_weight_parts + i_row * dim + o_column, b_to_weight, inside)


@triton.jit
def key_kernel(
    p_grad_key, p_grad_value, p_deltas, p_grad_out, p_grad_weights, p_lse, p_query, p_key, p_value, p_weight, p_mask,
    outer_stride, inner_stride, row_stride, column_stride, inner, queries, keys, dim, value_dim,
    TILE: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr, A: tl.constexpr, S: tl.constexpr,
    BOOL: tl.constexpr,
):  # fmt: skip
    """Gradients of a key and of its value."""
    i_row = tl.program_id(0).to(tl.int64)
    i_head, i_key = i_row // keys, i_row % keys
    o_mask = offset_of_head(i_head, inner, outer_stride, inner_stride) + i_key * column_stride
    b_key = row_of(p_key, i_row, dim, DIM, A)
    b_weight = row_of(p_weight, 0, dim, DIM, A)
    b_value = row_of(p_value, i_row, value_dim, VALUE, A)
    b_to_key = tl.zeros([DIM], A)
    b_to_value = tl.zeros([VALUE], A)
    for first in range(0, queries, TILE):
        o_query = first + tl.arange(0, TILE).to(tl.int64)
        o_row = i_head * queries + o_query
        seen, b_added = mask_tile(p_mask, o_mask + o_query * row_stride, o_query < queries, A, BOOL)
        b_t = tangents(p_query, o_row, seen, b_key, dim, DIM, A, S)
        b_score = score_of(b_t, b_weight, b_added, S)
        b_lse = tl.load(p_lse + o_row, seen, 0.0).to(S)
        b_share, b_slope, b_grad_out = shares_and_slopes(
            p_grad_out,
            o_row,
            p_grad_weights,
            o_row * keys + i_key,
            seen,
            b_score,
            b_value,
            b_lse,
            value_dim,
            VALUE,
            A,
            S,
        )
        b_delta = tl.load(p_deltas + o_row, seen, 0.0)
        b_slope = tl.where(seen, b_share.to(S) * (b_slope - b_delta), 0.0).to(A)
        b_t = tl.where(seen[:, None], b_t, 0.0)  # a key that no query sees may hold anything
        b_to_key += tl.sum(b_slope[:, None] * (1.0 - b_t * b_t), 0)
        b_to_value += tl.sum(b_share[:, None] * b_grad_out, 0)
    o_column, o_value = tl.arange(0, DIM), tl.arange(0, VALUE)
    b_to_key = (b_to_key * b_weight).to(p_grad_key.dtype.element_ty)
    tl.store(p_grad_key + i_row * dim + o_column, b_to_key, o_column < dim)
    b_to_value = b_to_value.to(p_grad_value.dtype.element_ty)
    tl.store(p_grad_value + i_row * value_dim + o_value, b_to_value, o_value < value_dim)


def _heads_of(strides: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, stride) of leading dimensions with neighbours joined where one stride serves both."""
    joined: list[tuple[int, int]] = []
    for size, stride in strides:
        if size == 1:
            continue
        if joined and joined[-1][1] == size * stride:
            joined[-1] = (joined[-1][0] * size, stride)
        else:
            joined.append((size, stride))
    return joined


def _mask_arguments(mask: torch.Tensor | None, scores: tuple[int, ...]) -> tuple:
    """The mask, its strides (outer and inner heads, rows, columns), and how many inner heads there are."""
    if mask is None:
        return None, 0, 0, 0, 0, 1
    mask = mask.expand(scores)
    mask = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
    heads = _heads_of(list(zip(mask.shape[:-2], mask.stride()[:-2], strict=True)))
    if len(heads) > 2:
        mask = mask.contiguous()
        heads = _heads_of(list(zip(mask.shape[:-2], mask.stride()[:-2], strict=True)))
    (_, outer), (inner, stride) = [(1, 0), (1, 0), *heads][-2:]
    return mask, outer, stride, *mask.stride()[-2:], inner


def _bytes_of_tile() -> int:
    if triton.knobs.runtime.interpret:
        return BYTES["interpret"]
    return BYTES[triton.runtime.driver.active.get_current_target().backend]


class _Call:
    """What the kernels of a call have in common."""

    def __init__(self, query, key, value, weight, attn_mask):
        self.operands = tuple(t.contiguous() for t in (query, key, value, weight))
        self.queries, self.keys = query.shape[-2], key.shape[-2]
        self.dim, self.value_dim = query.shape[-1], value.shape[-1]
        self.heads = query.shape[:-2].numel()
        mask = _mask_arguments(attn_mask, (*query.shape[:-1], self.keys))
        self.arguments = (*self.operands, *mask, self.queries, self.keys, self.dim, self.value_dim)
        self.is_bool = attn_mask is not None and attn_mask.dtype is torch.bool

    def launch(self, kernel, rows: int, count: int, columns: int, *args, **widths) -> None:
        """Runs a kernel for each of `rows` rows, which walks `count` others."""
        query = self.operands[0]
        width = max(16, triton.next_power_of_2(self.dim))
        compute = tl.float64 if query.dtype is torch.float64 else tl.float32
        rows_of_tile = _bytes_of_tile() // (compute.primitive_bitwidth // 8) // max(width, *widths.values())
        tile = max(1, min(triton.next_power_of_2(count), rows_of_tile))
        scores = tl.float32 if query.element_size() == 2 else tl.float64
        with torch.cuda.device_of(query):
            kernel[(rows, columns)](
                *args,
                *self.arguments,
                TILE=tile,
                DIM=width,
                **widths,
                A=compute,
                S=scores,
                BOOL=self.is_bool,
                num_warps=4,
            )


def additive_attention_fwd(query, key, value, weight, attn_mask, return_weights):
    """additive_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? attn_mask,
    bool return_weights) -> (Tensor out, Tensor lse, Tensor weights)"""
    call = _Call(query, key, value, weight, attn_mask)
    rows = query.shape[:-1]
    out = query.new_empty((*rows, call.value_dim))
    lse = query.new_empty(rows, dtype=torch.float32 if query.element_size() == 2 else torch.float64)
    weights = query.new_empty((*rows, call.keys) if return_weights else 0)
    if call.heads * call.queries * call.keys == 0:
        return out.zero_(), lse.fill_(float("-inf")), weights
    columns = min(COLUMNS, max(16, triton.next_power_of_2(call.value_dim)))
    call.launch(
        forward_kernel, call.heads * call.queries, call.keys, max(1, triton.cdiv(call.value_dim, columns)),
        out, lse, weights if return_weights else None, COLUMNS=columns,
    )  # fmt: skip
    return out, lse, weights


def additive_attention_bwd(grad_out, grad_weights, query, key, value, weight, attn_mask, lse, mask_gradient):
    """additive_attention_bwd(Tensor grad_out, Tensor? grad_weights, Tensor query, Tensor key, Tensor value,
    Tensor weight, Tensor? attn_mask, Tensor lse, bool mask_gradient)
    -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weight, Tensor grad_scores)"""
    call = _Call(query, key, value, weight, attn_mask)
    grads = tuple(torch.empty_like(t) for t in call.operands)
    sums = compute_dtype(query)
    scores = query.new_empty((*query.shape[:-1], call.keys) if mask_gradient else 0, dtype=sums)
    if call.heads * call.queries * call.keys == 0:
        return (*(g.zero_() for g in grads), scores)
    grad_out, lse = grad_out.contiguous(), lse.contiguous()
    grad_weights = None if grad_weights is None else grad_weights.contiguous()
    rows = call.heads * call.queries
    parts = query.new_empty((rows, call.dim), dtype=sums)
    deltas = torch.empty_like(lse)
    saved = (deltas, grad_out, grad_weights, lse)
    width = max(16, triton.next_power_of_2(call.value_dim))
    to_scores = scores if mask_gradient else None
    call.launch(query_kernel, rows, call.keys, 1, grads[0], parts, to_scores, *saved, VALUE=width)
    call.launch(key_kernel, call.heads * call.keys, call.queries, 1, grads[1], grads[2], *saved, VALUE=width)
    grads[3].copy_(parts.sum(0, dtype=torch.float64))
    return *grads, scores
