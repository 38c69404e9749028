"""hard_attention: every query takes the value of the key with its highest score; gradients as of soft attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends
from ._attention_composite import broadcast_leading
from ._attention_functions import ScaledDotProductAttentionBackward
from ._function import autocast, call, call_in_backward, check_devices, compute_dtype, eager, loop_vmap, recorded

_NAME = "hard_attention"
_SCORES = 2**22  # formed at a time, at most: keys are gone through in pieces


def _best_keys(query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float) -> Tensor:
    """(..., H, Lq): the first key with the highest score, -1 where none takes part."""
    group = query.shape[-3] // key.shape[-3] if query.dim() > 2 and key.shape[-3] else 1
    query = query.to(compute_dtype(query)) * scale
    best = query.new_full(query.shape[:-1], -math.inf)
    index = torch.full(query.shape[:-1], -1, dtype=torch.int64, device=query.device)
    piece = max(16, _SCORES // max(1, best.numel()))
    for first in range(0, key.shape[-2], piece):
        keys = key[..., first : first + piece, :].to(query.dtype)
        scores = query @ (keys.repeat_interleave(group, -3) if group > 1 else keys).mT
        if attn_mask is not None:
            mask = attn_mask if attn_mask.shape[-1] == 1 else attn_mask[..., first : first + piece]
            hidden = mask.logical_not() if mask.dtype == torch.bool else mask == -math.inf
            if mask.dtype != torch.bool:
                scores = scores + mask
            scores = scores.masked_fill(hidden, -math.inf)
        top, place = scores.max(-1)
        better = (top > best) | (top.isnan() & ~best.isnan())  # NaN is the highest, as for argmax
        best, index = torch.where(better, top, best), torch.where(better, place + first, index)
    return index


def _taken(value: Tensor, index: Tensor) -> Tensor:
    """The rows of value that index names, 0 for -1; heads of value are shared by groups of neighbours."""
    if value.shape[-2] == 0:
        return value.new_zeros((*index.shape, value.shape[-1]))
    group = index.shape[-2] // value.shape[-3] if value.dim() > 2 and value.shape[-3] else 1
    flat = index.unflatten(-2, (-1, group)).flatten(-2) if group > 1 else index  # (..., Hk, G Lq)
    taken = value.gather(-2, flat.clamp_min(0)[..., None].expand(*flat.shape, value.shape[-1]))
    taken = taken.unflatten(-2, (group, -1)).flatten(-4, -3) if group > 1 else taken
    return taken.masked_fill((index < 0)[..., None], 0)


def _given_back(grad: Tensor, value: Tensor, index: Tensor, spare: Tensor | None) -> Tensor:
    """The gradient of `_taken`: sums in float32 (float64), in one order on every device. spare: may become it."""
    if value.numel() == 0 or grad.numel() == 0:
        return torch.zeros_like(value)
    group = index.shape[-2] // value.shape[-3] if value.dim() > 2 and value.shape[-3] else 1
    rows = grad.masked_fill((index < 0)[..., None], 0).to(compute_dtype(value)).reshape(-1, grad.shape[-1])
    heads = torch.arange(math.prod(index.shape[:-1]), device=index.device) // group
    place = (heads[:, None] * value.shape[-2] + index.reshape(-1, index.shape[-1]).clamp_min(0)).flatten()
    if value.device.type == "cpu":
        if spare is not None and spare.dtype == rows.dtype and spare.is_contiguous():
            sums = spare.zero_().view(-1, rows.shape[-1])
        else:
            sums = rows.new_zeros((math.prod(value.shape[:-1]), rows.shape[-1]))
        return sums.index_add_(0, place, rows).to(value.dtype).view(value.shape)
    order = place.sort(stable=True).indices  # a segment per key: index_add would add in any order on a GPU
    lengths = torch.bincount(place, minlength=math.prod(value.shape[:-1]))
    sums = torch.segment_reduce(rows[order], "sum", lengths=lengths, unsafe=True, initial=0)
    return sums.to(value.dtype).view(value.shape)


@eager
class HardAttention(torch.autograd.Function):
    """(query, key, value, attn_mask, scale) -> (out, best keys)."""

    @staticmethod
    def forward(query, key, value, attn_mask, scale):
        index = _best_keys(query, key, attn_mask, scale)
        return _taken(value, index), index

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx, grad, _):
        query, key, value, attn_mask, index = ctx.saved_tensors
        inputs, options = (query, key, value, attn_mask, *(None,) * 5), (0.0, -1, -1, False, ctx.scale, 0.0)
        with torch.no_grad():  # what soft attention gives: the gradients of scores are relative to it
            soft = backends.op("scaled_dot_product_attention_fwd", query)(*inputs, *options)
        of_mask = ctx.needs_input_grad[3]
        function, arguments = ScaledDotProductAttentionBackward, (grad, None, *inputs, *soft, *options, of_mask, False)
        grads = call_in_backward(function, *arguments)
        spare = None if torch.compiler.is_compiling() or recorded((grad, *inputs)) else grads[2]  # memory at hand
        to_value = _given_back(grad, value, index, spare) if ctx.needs_input_grad[2] else None
        return grads[0], grads[1], to_value, grads[3] if of_mask else None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(HardAttention, info, in_dims, *inputs)


def hard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_i = value_j for the key j with the highest score scale q_i . k_j + mask_ij.

    The choice has no gradient. Passed back is that of weights which are 1 for the chosen key in the forward and the
    softmax of the scores in the backward (straight-through, Bengio et al. 2013, arXiv 1308.3432; hard attention of Xu
    et al. 2015, arXiv 1502.03044): query, key and mask get the gradients of scaled_dot_product_attention, value that of
    the choice. The search goes through the keys in pieces with torch's matrix products; the backward runs
    scaled_dot_product_attention's kernels. No tensor of Lq x Lk numbers is made beyond 4 million.

    Args:
        query: (..., H, Lq, D) float64, float32, float16 or bfloat16.
        key: (..., H, Lk, D), or (..., Hk, Lk, D) with H a multiple of Hk when enable_gqa.
        value: (..., H, Lk, Dv), or (..., Hk, Lk, Dv).
        attn_mask: broadcastable to (..., H, Lq, Lk): bool (True takes part) or float (added to the scores).
        scale: factor of the scores, 1 / sqrt(D) by default: of no consequence for the choice without a float mask, but
            for the gradient.
        return_indices: also return the keys chosen.
    Returns:
        (..., H, Lq, Dv), 0 where no key takes part; with return_indices also (..., H, Lq) int64, -1 there. Of keys with
        the same score the first is chosen.
    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    query, key, value = autocast(query, key, value)
    check_devices(_NAME, query, key, value, attn_mask)
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        query, key, value = broadcast_leading(query, key, value, enable_gqa)
    _check(query, key, value, attn_mask)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1))
    out, index = call(HardAttention, query, key, value, attn_mask, float(scale))
    return (out, index) if return_indices else out


def _check(query, key, value, attn_mask):
    shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
    if min(query.dim(), key.dim(), value.dim()) < 2 or not query.dim() == key.dim() == value.dim():
        raise RuntimeError(f"{_NAME}: expected query, key and value of the same two dimensions or more, got {shapes}")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        dtypes = ", ".join(str(t.dtype) for t in (query, key, value))
        raise RuntimeError(f"{_NAME}: expected query, key and value of the same floating dtype, got {dtypes}")
    if query.shape[-1] != key.shape[-1] or key.shape[:-1] != value.shape[:-1]:
        raise RuntimeError(f"{_NAME}: expected key (..., Lk, D) and value (..., Lk, Dv) for query, got {shapes}")
    if attn_mask is None:
        return
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(f"{_NAME}: expected attn_mask of bool, float or query's dtype, got {attn_mask.dtype}")
    scores = (*query.shape[:-1], key.shape[-2])
    lead = len(scores) - attn_mask.dim()
    if lead < 0 or any(size not in (1, n) for size, n in zip(attn_mask.shape, scores[lead:], strict=True)):
        raise RuntimeError(f"{_NAME}: expected attn_mask that broadcasts to {scores}, got {tuple(attn_mask.shape)}")
