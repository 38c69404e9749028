"""scaled_dot_product_attention in Triton: forward, backward and the dropout mask. Kernels: _forward.py, _gluon.py (a
forward for sm_90), _backward.py, _mask_gradient.py; csrc/include/scaled_dot_product_attention.h has the formulas.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import scaled_dot_product_attention_configs as configs
from . import scaled_dot_product_attention_gluon as gluon
from . import scaled_dot_product_attention_launch as launches
from .philox import philox4x32
from .scaled_dot_product_attention_backward import (
    keys_kernel,
    queries_kernel,
    statistics_kernel,
)
from .scaled_dot_product_attention_forward import forward_kernel, merge_kernel
from .scaled_dot_product_attention_launch import Problem, bits, new_heads, operand, pack_of, readable
from .scaled_dot_product_attention_mask_gradient import (
    mask_gradient_kernel,
    sink_gradient_kernel,
    sum_mask_gradient_kernel,
)

_BLOCK = 256  # of the kernels that go through a list of numbers


def scaled_dot_product_attention_fwd(*arguments):
    """scaled_dot_product_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? dropout_key,
    Tensor? alibi_slopes, Tensor? sinks, Tensor? key_ranges, Tensor? query_ranges, float dropout_p, int left, int right,
    bool lower_right, float scale) -> (Tensor out, Tensor lse)"""
    p = Problem(*arguments)
    out = new_heads(p.query, p.value.shape[-1])
    lse = p.query.new_empty(p.query.shape[:-1], dtype=launches.lse_dtype(p.query.dtype))
    if p.is_empty:
        return out.zero_(), lse.fill_(-math.inf)
    wanted = None
    if not p.is_split and configs.runs_gluon() and gluon.covers(p):
        wanted = gluon.forward(p, out, lse)
    pack, parts, width = pack_of(out), triton.cdiv(p.keys, p.part_keys), p.value.shape[-1]
    tile = p.tile("split" if p.is_split else "plain" if p.is_plain else "forward")
    arguments = p.arguments() | _renamed(operand("o", out, pack), o="out")
    arguments |= {
        "lse": lse, "sinks": None if p.sinks is None else p.sinks.contiguous(), "OUT_PACK": pack,
        "EVEN": p.keys % tile.columns == 0, "tops": None, "totals": None, "sums": None, "parts": parts,
        "part_keys": p.part_keys, "wanted": wanted, "WANTED_ROWS": gluon.HALF,
    }  # fmt: skip
    if not p.is_split:
        p.launch(forward_kernel, p.heads * triton.cdiv(p.queries, tile.rows), (0, width), tile, arguments)
        return out, lse
    arguments["tops"] = p.query.new_empty((*lse.shape, parts), dtype=p.compute)
    arguments["totals"] = lse.new_empty((*lse.shape, parts))
    arguments["sums"] = p.query.new_empty((*lse.shape, parts, width), dtype=p.compute)
    programs = p.heads // p.group * parts * triton.cdiv(p.group * p.queries, tile.rows)
    p.launch(forward_kernel, programs, (0, width), tile, arguments | {"sinks": None})
    p.launch(merge_kernel, p.heads * p.queries, (0, width), tile, arguments)
    return out, lse


def scaled_dot_product_attention_bwd(grad_out, grad_lse, *rest):
    """scaled_dot_product_attention_bwd(Tensor grad_out, Tensor? grad_lse, <tensors of fwd>, Tensor out, Tensor lse,
    <options of fwd>, bool mask_gradient, bool sinks_gradient)
    -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_sinks)"""
    p = Problem(*rest[:9], *rest[11:-2])
    grads = [new_heads(t, t.shape[-1]) for t in (p.query, p.key, p.value)]
    return (*grads, *_backward(p, grads, grad_out, grad_lse, *rest[9:11], *rest[-2:]))


def multi_head_attention_bwd(grad_out, grad_lse, *rest):
    """multi_head_attention_bwd(<arguments of scaled_dot_product_attention_bwd>, bool with_query, bool sequence_first)
    -> (Tensor grads, Tensor grad_query, Tensor grad_mask, Tensor grad_sinks)

    grads: (N, length, heads, D) of value behind key, behind query with_query; the first two dimensions exchanged with
    sequence_first."""
    *rest, with_query, sequence_first = rest
    p = Problem(*rest[:9], *rest[11:-2])
    batch, heads, _, dim = p.query.shape
    key_heads, begin = p.key.shape[1], p.query.shape[1] if with_query else 0

    def packed(length, count):
        return p.query.new_empty((length, batch, count, dim) if sequence_first else (batch, length, count, dim))

    together = packed(p.keys, begin + 2 * key_heads)
    own = p.query.new_empty(0) if with_query else packed(p.queries, heads)
    places = ((together if with_query else own, 0, heads), (together, begin, key_heads))
    places += ((together, begin + key_heads, key_heads),)
    order = (1, 2, 0, 3) if sequence_first else (0, 2, 1, 3)  # as (N, heads, length, D)
    grads = [t.narrow(2, first, count).permute(order) for t, first, count in places]
    return (together, own, *_backward(p, grads, grad_out, grad_lse, *rest[9:11], *rest[-2:]))


def _backward(p: Problem, grads, grad_out, grad_lse, out, lse, mask_gradient, sinks_gradient):
    """Writes the gradients of query, key and value; returns those of the mask and of the sinks."""
    grad_mask = p.attn_mask.new_empty(p.attn_mask.shape) if mask_gradient else p.query.new_empty(0, dtype=p.compute)
    grad_sinks = p.query.new_empty(p.sinks.shape if sinks_gradient else 0, dtype=p.compute)
    if p.is_empty:
        for t in (*grads, grad_mask, grad_sinks):
            t.zero_()
        return grad_mask, grad_sinks
    sinks = None if p.sinks is None else p.sinks.contiguous()
    rows = p.heads * p.queries
    statistics = p.query.new_empty((3, rows), dtype=p.compute)
    out, pack = readable(out), pack_of(*grads)
    common = p.arguments(readable(grad_out)) | {
        "statistics": statistics, "rows_of_all": rows, "scale": bits(p.scale),
        "query_ranges": None if p.query_ranges is None else p.query_ranges.contiguous(),
    }  # fmt: skip

    tile = p.tile("queries")
    programs = p.heads * triton.cdiv(p.queries, tile.rows)
    even = {"EVEN": p.keys % tile.columns == 0}
    of_rows = {"lse": lse.contiguous(), "grad_lse": None if grad_lse is None else grad_lse.contiguous()}
    of_rows |= {"sinks": sinks, "OUT_PACK": pack_of(out)} | _renamed(operand("o", out, pack_of(out)), o="out")
    p.launch(statistics_kernel, programs, (0, 0), tile, common | even | of_rows)
    common |= {"OUT_PACK": pack}
    p.launch(queries_kernel, programs, (p.query.shape[-1], 0), tile, common | even | operand("dq", grads[0], pack))

    tile = p.tile("keys")
    of_keys = operand("dk", grads[1], pack) | operand("dv", grads[2], pack) | {"EVEN": p.queries % tile.columns == 0}
    programs = p.heads // p.group * triton.cdiv(p.keys, tile.rows)
    p.launch(keys_kernel, programs, (p.query.shape[-1], p.value.shape[-1]), tile, common | of_keys)

    if sinks_gradient:
        with torch.cuda.device_of(p.query):
            sink_gradient_kernel[(p.heads,)](
                grad_sinks, sinks, statistics, p.queries, rows,
                COMPUTE=common["COMPUTE"], BASE2=common["BASE2"], BLOCK=_BLOCK,
            )  # fmt: skip
    if mask_gradient:
        _mask_gradient(p, grad_mask, common)
    return grad_mask, grad_sinks


def _renamed(arguments: dict[str, object], **names: str) -> dict[str, object]:
    return {names.get(name, name): x for name, x in arguments.items()}


def _mask_gradient(p: Problem, grad_mask: torch.Tensor, common: dict[str, object]) -> None:
    """dS, summed over the heads that share a matrix of the mask, and over its rows or columns where it has one."""
    tile, sizes, axes = p.tile("mask"), p.mask.shape, range(len(p.batch))
    own, shared = ([d for d in axes if (sizes[d] > 1) == mine] for mine in (True, False))
    sharing = math.prod(p.batch[d] for d in shared)
    members = (
        torch.arange(p.heads, device=p.query.device)
        .view(p.batch)
        .permute(*own, *shared)
        .reshape(-1, sharing)
        .contiguous()
    )
    one_row, one_column = sizes[-2] == 1 and p.queries > 1, sizes[-1] == 1 and p.keys > 1
    row_tiles, column_tiles = triton.cdiv(p.queries, tile.rows), triton.cdiv(p.keys, tile.columns)
    parts = row_tiles if one_row else p.queries, column_tiles if one_column else p.keys
    partial = grad_mask
    if one_row or one_column:  # 16-bit tiles need the registers that fp64 sums would take
        sums = torch.float32 if p.kind == "half" else torch.float64
        partial = p.query.new_empty((members.shape[0], *parts), dtype=sums)
    more = {
        "partial": partial, "members": members, "sharing": sharing, "row_parts": parts[0], "column_parts": parts[1],
        "ONE_ROW": one_row, "ONE_COLUMN": one_column, "SUM": tl.float32 if p.kind == "half" else tl.float64,
    }  # fmt: skip
    p.launch(mask_gradient_kernel, members.shape[0] * row_tiles * column_tiles, (0, 0), tile, common | more)
    if one_row or one_column:
        with torch.cuda.device_of(p.query):
            sum_mask_gradient_kernel[(triton.cdiv(grad_mask.numel(), _BLOCK),)](
                grad_mask, partial, sizes[-2], sizes[-1], *parts, grad_mask.numel(),
                ONE_ROW=one_row, ONE_COLUMN=one_column, BLOCK=_BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["threshold", "count"])
def keep_kernel(keep, dropout_key, threshold, count, BLOCK: tl.constexpr):
    """keep[e] = whether dropout keeps element e of P."""
    quad = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(dropout_key).to(tl.uint64, bitcast=True)
    w0, w1, w2, w3 = philox4x32(seed, (tl.load(dropout_key + 1) + quad).to(tl.uint64, bitcast=True))
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [4 * BLOCK])
    place = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(keep + place, (words.to(tl.int64) >= threshold).to(tl.uint8), mask=place < count)


def scaled_dot_product_attention_keep(query, key, dropout_key, dropout_p):
    """scaled_dot_product_attention_keep(Tensor query, Tensor key, Tensor dropout_key, float dropout_p) -> Tensor"""
    keep = query.new_empty((*query.shape[:-1], key.shape[-2]), dtype=torch.bool)
    if dropout_p == 0:
        return keep.fill_(True)
    if keep.numel() > 0:
        with torch.cuda.device_of(query):
            keep_kernel[(triton.cdiv(keep.numel(), 4 * _BLOCK),)](
                keep.view(torch.uint8), dropout_key.contiguous(), int(dropout_p * 2**32), keep.numel(), BLOCK=_BLOCK
            )
    return keep
