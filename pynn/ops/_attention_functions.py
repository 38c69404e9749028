"""The dispatcher ops of scaled_dot_product_attention, their shape rules and their autograd Functions.

query (..., H, Lq, D), key (..., Hk, Lk, D), value (..., Hk, Lk, Dv) -> out (..., H, Lq, Dv), lse (..., H, Lq);
alibi_slopes and sinks are (..., H) in the precision of sums. left and right count the keys that a query sees on either
side of the diagonal, all of them where they are negative; lower_right says where the diagonal lies. No soft cap: 0.
"""

from __future__ import annotations

import torch

from .. import backends
from ._attention_composite import second_order
from ._function import call, call_in_backward, check_devices, compute_dtype, eager
from ._registry import define

_NAME = "scaled_dot_product_attention"
INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? dropout_key"
INPUTS += ", Tensor? alibi_slopes, Tensor? sinks, Tensor? key_ranges, Tensor? query_ranges"
OPTIONS = "float dropout_p, int left, int right, bool lower_right, float scale, float softcap"


_TENSORS, _RANGES = 9, 7  # of those, and where the ranges begin


def _new_heads(like, width):  # stored as (..., L, H, width)
    sizes = [*like.shape[:-1], width]
    if like.dim() < 4:
        return like.new_empty(sizes)
    sizes[-3], sizes[-2] = sizes[-2], sizes[-3]
    return like.new_empty(sizes).transpose(-3, -2)


def lse_dtype(dtype):
    """Of the log-sum-exps that forward gives and backward takes, for operands of this dtype."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


@define(f"scaled_dot_product_attention_fwd({INPUTS}, {OPTIONS}) -> (Tensor, Tensor)", triton=_NAME)
def _(query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, query_ranges, *options):
    check_devices(_NAME, query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, query_ranges)
    return _new_heads(query, value.shape[-1]), query.new_empty(query.shape[:-1], dtype=lse_dtype(query.dtype))


@define(
    f"scaled_dot_product_attention_bwd(Tensor grad_out, Tensor? grad_lse, {INPUTS}, Tensor out, Tensor lse, "
    f"{OPTIONS}, bool mask_gradient, bool sinks_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton=_NAME,
)
def _(grad_out, grad_lse, query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, *rest):
    others, (mask_gradient, sinks_gradient) = rest[:4], rest[-2:]  # key_ranges, query_ranges, out, lse
    check_devices(_NAME, query, grad_out, grad_lse, key, value, attn_mask, dropout_key, alibi_slopes, sinks, *others)
    grad_mask = attn_mask.new_empty(attn_mask.shape) if mask_gradient else query.new_empty(0)
    grad_sinks = query.new_empty(sinks.shape if sinks_gradient else 0, dtype=compute_dtype(query))
    return (*(_new_heads(t, t.shape[-1]) for t in (query, key, value)), grad_mask, grad_sinks)


@define(
    "scaled_dot_product_attention_keep(Tensor query, Tensor key, Tensor dropout_key, float dropout_p) -> Tensor",
    triton=_NAME,
)
def _(query, key, dropout_key, dropout_p):
    check_devices(_NAME, query, key, dropout_key)
    return query.new_empty((*query.shape[:-1], key.shape[-2]), dtype=torch.bool)


@eager
class ScaledDotProductAttention(torch.autograd.Function):
    """The tensors and options of scaled_dot_product_attention_fwd -> (out, log-sum-exp)."""

    @staticmethod
    def forward(  # Dynamo takes the first of *inputs for a context
        query,
        key,
        value,
        attn_mask,
        dropout_key,
        alibi_slopes,
        sinks,
        key_ranges,
        query_ranges,
        dropout_p,
        left,
        right,
        lower_right,
        scale,
        softcap,
    ):
        inputs = query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, query_ranges
        op = backends.op("scaled_dot_product_attention_fwd", query)
        return op(*inputs, dropout_p, left, right, lower_right, scale, softcap)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:_TENSORS], *output)
        ctx.set_materialize_grads(False)
        ctx.options = inputs[_TENSORS:]

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(tensors[_TENSORS])
        gradients = (ctx.needs_input_grad[3], ctx.needs_input_grad[6])  # of the mask, of the sinks
        inputs = (grad_out, grad_lse, *tensors, *ctx.options, *gradients)
        grads = call_in_backward(ScaledDotProductAttentionBackward, *inputs)
        grad_mask, grad_sinks = (g if wanted else None for g, wanted in zip(grads[3:], gradients, strict=True))
        return (*grads[:3], grad_mask, None, None, grad_sinks, None, None, *(None,) * len(ctx.options))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(ScaledDotProductAttention, info, in_dims, inputs, tensors=_TENSORS, first=0)


@eager
class ScaledDotProductAttentionBackward(torch.autograd.Function):
    """Gradients of query, key, value, mask and sinks; differentiable any number of times through torch ops."""

    @staticmethod
    def forward(grad_out, grad_lse, query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, *rest):
        op = backends.op("scaled_dot_product_attention_bwd", query)
        return op(grad_out, grad_lse, query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: _TENSORS + 2])
        ctx.options = inputs[_TENSORS + 4 :]

    @staticmethod
    def backward(ctx, *cotangents):
        grads = second_order(ctx.saved_tensors, ctx.options, cotangents)
        return (*grads, *(None,) * (4 + len(ctx.options)))  # ranges, out, lse

    @staticmethod
    def vmap(info, in_dims, *inputs):
        function = ScaledDotProductAttentionBackward
        return _vmap(function, info, in_dims, inputs, tensors=_TENSORS + 4, first=2)


def _vmap(function, info, in_dims, inputs, tensors, first):
    """Folds the mapped dimension into a new leading one; with dropout or mapped ranges, each sample is a call.

    `first` is the place of query.
    """
    attn_mask, dropout_key = first + 3, first + 4
    ranges = (first + _RANGES, first + _RANGES + 1)
    if inputs[dropout_key] is not None or any(in_dims[i] is not None for i in ranges):
        samples = []
        for i in range(info.batch_size):
            sample = [x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True)]
            samples.append(call(function, *sample))
        return tuple(torch.stack(outputs) for outputs in zip(*samples, strict=True)), (0,) * len(samples[0])
    rank = max(x.dim() - (d is not None) for x, d in zip(inputs[:tensors], in_dims, strict=False) if x is not None)
    folded = list(inputs)
    for i, (x, d) in enumerate(zip(inputs[:tensors], in_dims, strict=False)):
        if x is None or i in ranges:
            continue
        x = x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
        if i == attn_mask:
            mask_shape = x.shape
            x = x.reshape(info.batch_size, *(1,) * (rank + 1 - x.dim()), *x.shape[1:])
        folded[i] = x
    outputs = call(function, *folded)
    if function is ScaledDotProductAttentionBackward:
        grad_mask, grad_sinks = outputs[3:]
        grad_mask = grad_mask.reshape(mask_shape) if inputs[-2] else grad_mask.new_empty(info.batch_size, 0)
        grad_sinks = grad_sinks if inputs[-1] else grad_sinks.new_empty(info.batch_size, 0)
        outputs = (*outputs[:3], grad_mask, grad_sinks)
    return outputs, (0,) * len(outputs)
