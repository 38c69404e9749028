"""Rotary embedding in Triton. See csrc/include/rotary_embedding.h.

A program turns HEADS heads of one position: PAIRS pairs of channels at a time, with cos and sin read once for all of
them. Channels behind the pairs are copied, unless the result is x itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .products import compute_dtype

PAIRS = 128  # at a time, at most
ELEMENTS = 4096  # of a program


@triton.jit
def rotary_kernel(
    p_x, p_y, p_cos, p_sin, heads, length, width, pairs,
    x_batch, x_head, x_row, y_batch, y_head, y_row, table_batch, table_row,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, COPY: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """y = x turned by cos and sin, for HEADS heads of one position."""
    head_blocks = tl.cdiv(heads, HEADS)
    i_position = tl.program_id(0).to(tl.int64) // head_blocks
    i_batch, i_row = i_position // length, i_position % length
    o_head = (tl.program_id(0) % head_blocks).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    p_x += i_batch * x_batch + i_row * x_row + o_head[:, None] * x_head  # [HEADS, 1]
    p_y += i_batch * y_batch + i_row * y_row + o_head[:, None] * y_head
    p_cos += i_batch * table_batch + i_row * table_row
    p_sin += i_batch * table_batch + i_row * table_row
    some = o_head[:, None] < heads
    for first in range(0, pairs, PAIRS):
        o_pair = first + tl.arange(0, PAIRS)
        b_cos = tl.load(p_cos + o_pair, o_pair < pairs, 0.0)[None, :]
        b_sin = tl.load(p_sin + o_pair, o_pair < pairs, 0.0)[None, :]
        if INVERSE:
            b_sin = -b_sin
        valid = some & (o_pair < pairs)[None, :]
        o_a = o_pair[None, :] * 2 if INTERLEAVED else o_pair[None, :]
        o_b = o_a + 1 if INTERLEAVED else o_a + pairs
        b_a = tl.load(p_x + o_a, valid, 0.0).to(A)  # [HEADS, PAIRS]
        b_b = tl.load(p_x + o_b, valid, 0.0).to(A)
        b_first = tl.fma(b_a, b_cos.broadcast_to(b_a.shape), -(b_b * b_sin))
        b_second = tl.fma(b_b, b_cos.broadcast_to(b_b.shape), b_a * b_sin)
        tl.store(p_y + o_a, b_first.to(p_y.dtype.element_ty), valid)
        tl.store(p_y + o_b, b_second.to(p_y.dtype.element_ty), valid)
    if COPY:
        for first in range(2 * pairs, width, PAIRS):
            o_channel = (first + tl.arange(0, PAIRS))[None, :]
            valid = some & (o_channel < width)
            tl.store(p_y + o_channel, tl.load(p_x + o_channel, valid, 0.0), valid)


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of (batch, heads, length)."""
    return x.stride(0) if x.dim() > 2 else 0, x.stride(1) if x.dim() > 3 else 0, x.stride(-2)


def _launch(x, y, cos, sin, interleaved, inverse):
    cos, sin = cos.contiguous(), sin.contiguous()
    length, width, pairs = *x.shape[-2:], cos.shape[-1]
    batch, heads = x.shape[0] if x.dim() > 2 else 1, x.shape[1] if x.dim() > 3 else 1
    if x.numel() == 0:
        return
    block = min(PAIRS, triton.next_power_of_2(max(pairs, 16)))
    together = min(triton.next_power_of_2(heads), max(1, ELEMENTS // (2 * block)))
    tables = length * pairs if cos.dim() == 3 else 0, pairs
    with torch.cuda.device_of(x):
        rotary_kernel[(batch * length * triton.cdiv(heads, together),)](
            x, y, cos, sin, heads, length, width, pairs, *_strides(x), *_strides(y), *tables,
            INTERLEAVED=interleaved, INVERSE=inverse, COPY=x is not y, HEADS=together, PAIRS=block,
            A=tl.float64 if compute_dtype(x) is torch.float64 else tl.float32,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def rotary_embedding_fwd(x, cos, sin, interleaved, inverse):
    """rotary_embedding_fwd(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor"""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = x.new_empty(x.shape)
    _launch(x, y, cos, sin, interleaved, inverse)
    return y


def rotary_embedding_in_place(x, cos, sin, interleaved, inverse):
    """rotary_embedding_in_place(Tensor(a!) x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> ()"""
    _launch(x, x, cos, sin, interleaved, inverse)
