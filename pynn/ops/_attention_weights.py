"""The dispatcher op of the weights of attention, its shape rule and its autograd Function.

query (..., H, Lq, D), key (..., Hk, Lk, D), lse (..., H, Lq) of scaled_dot_product_attention_fwd -> the weights of the
values with dropout, (..., H, Lq, Lk), or (..., Lq, Lk) for their mean over the heads, which is summed head by head: no
tensor has a number for every head, query and key then.
"""

from __future__ import annotations

import torch

from .. import backends
from ._attention_composite import weights_gradients
from ._attention_functions import INPUTS, OPTIONS
from ._function import check_devices, eager, loop_vmap
from ._registry import define

_TENSORS = 9


@define(f"attention_weights({INPUTS.replace('Tensor value, ', '')}, Tensor lse, {OPTIONS}, bool average) -> Tensor")
def _(query, key, *rest):
    average = rest[-1]
    check_devices("attention_weights", query, key, *rest[: _TENSORS - 2])
    return query.new_empty((*query.shape[: -3 if average else -2], query.shape[-2], key.shape[-2]))


@eager
class AttentionWeights(torch.autograd.Function):
    """The tensors and options of attention_weights -> weights; their gradient is made of torch's ops."""

    @staticmethod
    def forward(
        query,
        key,
        attn_mask,
        dropout_key,
        alibi_slopes,
        sinks,
        key_ranges,
        query_ranges,
        lse,
        dropout_p,
        left,
        right,
        lower_right,
        scale,
        softcap,
        average,
    ):
        inputs = query, key, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, query_ranges, lse
        op = backends.op("attention_weights", query)
        return op(*inputs, dropout_p, left, right, lower_right, scale, softcap, average)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: _TENSORS - 1])
        ctx.options = inputs[_TENSORS:]

    @staticmethod
    def backward(ctx, grad):
        # lse has no gradient of its own: the weights are differentiated as a function of everything else.
        wanted = (ctx.needs_input_grad[2], ctx.needs_input_grad[5])
        *options, average = ctx.options
        tensors = ctx.saved_tensors
        query = tensors[0]
        if average:
            grad = (grad / query.shape[-3]).unsqueeze(-3).expand(*query.shape[:-1], grad.shape[-1])
        query, key, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, _ = tensors
        inputs = (query, key, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges)
        to_query, to_key, to_mask, to_sinks = weights_gradients(grad, inputs, options, *wanted)
        return to_query, to_key, to_mask, None, None, to_sinks, *(None,) * (3 + len(ctx.options))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(AttentionWeights, info, in_dims, *inputs)
