"""additive_attention: softmax(weight . tanh(query + key) + mask) value, without a tensor of all the tangents.

Shapes: query (..., Lq, D), key (..., Lk, D), value (..., Lk, Dv), weight (D,) -> (..., Lq, Dv).
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from .. import backends
from ._attention_composite import additive_composite, broadcast_leading
from ._attention_functions import lse_dtype
from ._function import (
    autocast,
    call,
    call_in_backward,
    check_devices,
    compute_dtype,
    double_backward,
    eager,
    fold_leading,
    loop_vmap,
)
from ._registry import define

_NAME = "additive_attention"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? attn_mask"


@define(f"additive_attention_fwd({_INPUTS}, bool return_weights) -> (Tensor, Tensor, Tensor)", triton=_NAME)
def _(query, key, value, weight, attn_mask, return_weights):
    check_devices(_NAME, query, key, value, weight, attn_mask)
    rows = query.shape[:-1]
    return (
        query.new_empty((*rows, value.shape[-1])),
        query.new_empty(rows, dtype=lse_dtype(query.dtype)),
        query.new_empty((*rows, key.shape[-2]) if return_weights else 0),
    )


@define(
    f"additive_attention_bwd(Tensor grad_out, Tensor? grad_weights, {_INPUTS}, Tensor lse, "
    "bool mask_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton=_NAME,
)
def _(grad_out, grad_weights, query, key, value, weight, attn_mask, lse, mask_gradient):
    check_devices(_NAME, query, grad_out, grad_weights, key, value, weight, attn_mask, lse)
    scores = (*query.shape[:-1], key.shape[-2]) if mask_gradient else 0
    grads = (t.new_empty(t.shape) for t in (query, key, value, weight))
    return (*grads, query.new_empty(scores, dtype=compute_dtype(query)))


@eager
class AdditiveAttentionBackward(torch.autograd.Function):
    """Gradients of query, key, value, weight (if it is used: kernels sum it over all) and scores; its own: torch's."""

    @staticmethod
    def forward(grad_out, grad_weights, query, key, value, weight, attn_mask, lse, mask_gradient, weight_gradient):
        op = backends.op("additive_attention_bwd", query)
        return op(grad_out, grad_weights, query, key, value, weight, attn_mask, lse, mask_gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7])
        ctx.mask_gradient = inputs[8]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grad_grads):
        grad_out, grad_weights, query, key, value, weight, attn_mask = ctx.saved_tensors
        scores = (*query.shape[:-1], key.shape[-2])
        seen = added = None
        if attn_mask is not None:
            mask = attn_mask.expand(scores)
            seen = mask if mask.dtype == torch.bool else mask != -math.inf
            added = None if mask.dtype == torch.bool else mask.to(compute_dtype(query))
        dy = (grad_out, query.new_zeros(scores) if grad_weights is None else grad_weights)
        wanted = [*grad_grads[:4], grad_grads[4] if ctx.mask_gradient else None]
        inputs = (query, key, value, weight, added)
        (to_out, to_weights), to_inputs = double_backward(
            lambda *xs: additive_composite(*xs, seen=seen), dy, inputs, wanted
        )
        to_mask = _mask_gradient(to_inputs[4], attn_mask) if ctx.mask_gradient else None
        return to_out, None if grad_weights is None else to_weights, *to_inputs[:4], to_mask, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        *_, mask_gradient, weight_gradient = inputs
        if weight_gradient or in_dims[5] is not None:
            return loop_vmap(AdditiveAttentionBackward, info, in_dims, *inputs)
        grads = call(AdditiveAttentionBackward, *fold_leading(info, in_dims, inputs, shared=5, mask=6))
        return grads, (0, 0, 0, None, 0 if mask_gradient else None)


def _mask_gradient(grad_scores, attn_mask):
    return grad_scores.sum_to_size(attn_mask.shape).to(attn_mask.dtype)


@eager
class AdditiveAttention(torch.autograd.Function):
    """(out, lse, weights); lse is not differentiable, weights are empty unless wanted."""

    @staticmethod
    def forward(query, key, value, weight, attn_mask, return_weights):
        op = backends.op("additive_attention_fwd", query)
        return op(query, key, value, weight, attn_mask, return_weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], output[1])
        ctx.return_weights = inputs[5]

    @staticmethod
    def backward(ctx, grad_out, _lse, grad_weights):
        if grad_out is None and grad_weights is None:
            return (None,) * 6
        tensors = ctx.saved_tensors
        query, _, value, _, attn_mask, _ = tensors
        if grad_out is None:
            grad_out = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        grad_weights = grad_weights if ctx.return_weights else None
        inputs = (grad_out, grad_weights, *tensors, ctx.needs_input_grad[4], ctx.needs_input_grad[3])
        grads = call_in_backward(AdditiveAttentionBackward, *inputs)
        return *grads[:4], _mask_gradient(grads[4], attn_mask) if ctx.needs_input_grad[4] else None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if in_dims[3] is not None:
            return loop_vmap(AdditiveAttention, info, in_dims, *inputs)
        results = call(AdditiveAttention, *fold_leading(info, in_dims, inputs, shared=3, mask=4))
        return results, (0, 0, 0 if inputs[5] else None)


@overload
def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None = None,
    *,
    return_weights: Literal[False] = False,
) -> Tensor: ...
@overload
def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None = None,
    *,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None = None,
    *,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Additive attention (Bahdanau, Cho, Bengio 2015, arXiv 1409.0473): P value with P = softmax(S + mask) and
    S_ij = sum_d weight_d tanh(query_id + key_jd).

    query and key come projected, with a bias in either of them. The Lq Lk D tangents are made in the kernels, in
    forward and again in backward, and never stored: memory is that of the operands, and that of the scores (Lq Lk) only
    for return_weights and for the gradient of attn_mask. A second derivative goes through torch's ops and stores them.

    A key that is masked (False or -inf) has no influence at all, NaN included; a query whose keys are all masked gets 0
    and gives no gradient.

    Args:
        query: (..., Lq, D) float64, float32, float16 or bfloat16; at least 2 dimensions, leading ones broadcast.
        key: (..., Lk, D). value: (..., Lk, Dv).
        weight: (D,).
        attn_mask: broadcastable to (..., Lq, Lk): bool (True takes part), or float32 or query's dtype (added to the
            scores). The gradient of a float mask is summed over its broadcast dimensions.
        return_weights: also return the weights of the values, with their gradient.
    Returns:
        (..., Lq, Dv), dtype of query. With return_weights also (..., Lq, Lk), dtype of query.
    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    query, key, value, weight = autocast(query, key, value, weight)
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        query, key, value = broadcast_leading(query, key, value, False)
    out, _, weights = call(AdditiveAttention, query, key, value, weight, attn_mask, return_weights)
    return (out, weights) if return_weights else out
