"""scaled_dot_product_attention: softmax(scale Q K^T + mask) V with a fused backward, dropout and mask gradient.

Shapes: query (..., H, Lq, D), key (..., Hk, Lk, D), value (..., Hk, Lk, Dv) -> (..., H, Lq, Dv); H a multiple of Hk.
"""

from __future__ import annotations

import math

import torch

from .. import backends
from ._attention_composite import broadcast_leading, second_order
from ._function import autocast, call, check_devices, eager
from ._registry import define
from .random import make_key

_NAME = "scaled_dot_product_attention"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? dropout_key"
_OPTIONS = "float dropout_p, bool is_causal, float scale"


def _new_heads(like, width):  # stored as (..., L, H, width)
    sizes = [*like.shape[:-1], width]
    if like.dim() < 4:
        return like.new_empty(sizes)
    sizes[-3], sizes[-2] = sizes[-2], sizes[-3]
    return like.new_empty(sizes).transpose(-3, -2)


def lse_dtype(dtype):
    """Of the log-sum-exps that forward gives and backward takes, for operands of this dtype."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


@define(f"scaled_dot_product_attention_fwd({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
def _(query, key, value, attn_mask, dropout_key, dropout_p, is_causal, scale):
    check_devices(_NAME, query, key, value, attn_mask, dropout_key)
    return _new_heads(query, value.shape[-1]), query.new_empty(query.shape[:-1], dtype=lse_dtype(query.dtype))


@define(
    f"scaled_dot_product_attention_bwd(Tensor grad_out, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool mask_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _(grad_out, query, key, value, attn_mask, dropout_key, out, lse, dropout_p, is_causal, scale, mask_gradient):
    check_devices(_NAME, query, grad_out, key, value, attn_mask, dropout_key, out, lse)
    grad_mask = attn_mask.new_empty(attn_mask.shape) if mask_gradient else query.new_empty(0)
    return (*(_new_heads(t, t.shape[-1]) for t in (query, key, value)), grad_mask)


@define("scaled_dot_product_attention_keep(Tensor query, Tensor key, Tensor dropout_key, float dropout_p) -> Tensor")
def _(query, key, dropout_key, dropout_p):
    check_devices(_NAME, query, key, dropout_key)
    return query.new_empty((*query.shape[:-1], key.shape[-2]), dtype=torch.bool)


@eager
class ScaledDotProductAttention(torch.autograd.Function):
    """(query, key, value, attn_mask, dropout_key, dropout_p, is_causal, scale) -> (out, log-sum-exp)."""

    @staticmethod
    def forward(query, key, value, attn_mask, dropout_key, dropout_p, is_causal, scale):
        op = backends.op("scaled_dot_product_attention_fwd", query)
        return op(query, key, value, attn_mask, dropout_key, dropout_p, is_causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5], *output)
        ctx.mark_non_differentiable(output[1])
        ctx.options = inputs[5:]

    @staticmethod
    def backward(ctx, grad_out, _):
        mask_gradient = ctx.needs_input_grad[3]
        inputs = (grad_out, *ctx.saved_tensors, *ctx.options, mask_gradient)
        function = ScaledDotProductAttentionBackward
        # A compiled backward has no backward of its own.
        grads = function.forward(*inputs) if torch.compiler.is_compiling() else call(function, *inputs)
        return (*grads[:3], grads[3] if mask_gradient else None, None, None, None, None)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(ScaledDotProductAttention, info, in_dims, inputs, tensors=5, attn_mask=3, dropout_key=4)


@eager
class ScaledDotProductAttentionBackward(torch.autograd.Function):
    """Gradients of query, key, value and attn_mask; differentiable any number of times through torch ops."""

    @staticmethod
    def forward(grad_out, query, key, value, attn_mask, dropout_key, out, lse, *options):
        op = backends.op("scaled_dot_product_attention_bwd", query)
        return op(grad_out, query, key, value, attn_mask, dropout_key, out, lse, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.options = inputs[8:]

    @staticmethod
    def backward(ctx, *cotangents):
        grads = second_order(*ctx.saved_tensors, *ctx.options, *cotangents)
        return (*grads, None, None, None, None, None, None, None)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(ScaledDotProductAttentionBackward, info, in_dims, inputs, tensors=8, attn_mask=4, dropout_key=5)


def _vmap(function, info, in_dims, inputs, tensors, attn_mask, dropout_key):
    """Folds the mapped dimension into a new leading one; with dropout, each sample is a call of its own."""
    if inputs[dropout_key] is not None:
        samples = []
        for i in range(info.batch_size):
            sample = [x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True)]
            samples.append(call(function, *sample))
        return tuple(torch.stack(outputs) for outputs in zip(*samples, strict=True)), (0,) * len(samples[0])
    rank = max(x.dim() - (d is not None) for x, d in zip(inputs[:tensors], in_dims, strict=False) if x is not None)
    folded = list(inputs)
    for i, (x, d) in enumerate(zip(inputs[:tensors], in_dims, strict=False)):
        if x is None:
            continue
        x = x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
        if i == attn_mask:
            mask_shape = x.shape
            x = x.reshape(info.batch_size, *(1,) * (rank + 1 - x.dim()), *x.shape[1:])
        folded[i] = x
    outputs = call(function, *folded)
    if len(outputs) == 4:
        grad_mask = outputs[3].reshape(mask_shape) if inputs[-1] else outputs[3].new_empty(info.batch_size, 0)
        outputs = (*outputs[:3], grad_mask)
    return outputs, (0,) * len(outputs)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """Attention of every query over the keys: softmax(scale Q K^T + mask) V, with dropout on the softmax.

    A key that is masked (False, -inf or in the future) has no influence at all, NaN included; a query whose keys are
    all masked gets 0 and gives no gradient. The gradient of a float mask is summed over its broadcast dimensions.

    Args:
        query: (..., H, Lq, D) float64, float32, float16 or bfloat16; at least 2 dimensions.
        key: (..., H, Lk, D), or (..., Hk, Lk, D) with H a multiple of Hk when enable_gqa.
        value: (..., H, Lk, Dv), or (..., Hk, Lk, Dv).
        attn_mask: broadcastable to (..., H, Lq, Lk): bool (True takes part) or float (added to the scores).
        dropout_p: probability of dropping a weight. The draw follows torch.manual_seed.
        is_causal: query i sees keys 0 .. i. Not together with attn_mask.
        scale: factor of the scores; 1 / sqrt(D) by default.
        enable_gqa: heads of key and value are shared by groups of query heads.
        generator: where the dropout key is drawn from instead of torch's default CPU generator.
        seed: the dropout key itself; the same seed drops the same weights.
    Returns:
        (..., H, Lq, Dv), dtype of query.
    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; dropout_p is not in [0, 1]; attn_mask with is_causal.
    """
    query, key, value = autocast(query, key, value)
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        query, key, value = broadcast_leading(query, key, value, enable_gqa)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1)) if query.dim() else 1.0
    dropout_key = make_key(query.device, generator=generator, seed=seed) if dropout_p > 0 else None
    return attend(query, key, value, attn_mask, dropout_key, float(dropout_p), bool(is_causal), float(scale))


def attend(query, key, value, attn_mask, dropout_key, dropout_p, is_causal, scale):
    """scaled_dot_product_attention on operands whose leading dimensions agree, with the dropout key given."""
    inputs = (query, key, value, attn_mask, dropout_key, dropout_p, is_causal, scale)
    return call(ScaledDotProductAttention, *inputs)[0]
