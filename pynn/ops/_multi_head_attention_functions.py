"""The dispatcher op of multi_head_attention's backward, its shape rule, and the autograd Function.

Shapes and layouts: _multi_head_attention_layout.py.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .. import backends
from ._attention_functions import INPUTS, OPTIONS
from ._function import check_devices, compute_dtype, eager
from ._multi_head_attention_layout import (
    MASK,
    SINKS,
    TENSORS,
    Layout,
    composed,
    joined_heads,
    projected,
    split_heads,
    to_heads,
    turn,
)
from ._registry import define


@define(
    f"multi_head_attention_bwd(Tensor grad_out, Tensor? grad_lse, {INPUTS}, Tensor out, Tensor lse, {OPTIONS}, "
    "bool mask_gradient, bool sinks_gradient, bool with_query, bool sequence_first) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def _(grad_out, grad_lse, query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, *rest):
    others, (mask_gradient, sinks_gradient, with_query, sequence_first) = rest[:4], rest[-4:]
    tensors = (query, grad_out, grad_lse, key, value, attn_mask, dropout_key, alibi_slopes, sinks, *others)
    check_devices("multi_head_attention", *tensors)
    grad_mask = attn_mask.new_empty(attn_mask.shape) if mask_gradient else query.new_empty(0)
    grad_sinks = query.new_empty(sinks.shape if sinks_gradient else 0, dtype=compute_dtype(query))

    def packed(length, heads):
        sizes = (length, query.shape[0]) if sequence_first else (query.shape[0], length)
        return query.new_empty((*sizes, heads, query.shape[3]))

    heads, key_heads = query.shape[1], key.shape[1]
    grads = packed(key.shape[2], 2 * key_heads + (heads if with_query else 0))
    return grads, query.new_empty(0) if with_query else packed(query.shape[2], heads), grad_mask, grad_sinks


@eager
class MultiHeadAttention(torch.autograd.Function):
    """(output, weights where wanted, attention's own result, its log-sum-exps, projections); the last ones are what the
    backward needs and have no gradient. key is None when it is query, value when it is key.
    """

    @staticmethod
    def forward(
        query,
        key,
        value,
        in_proj_weight,
        in_proj_bias,
        out_proj_weight,
        out_proj_bias,
        attn_mask,
        dropout_key,
        alibi_slopes,
        sinks,
        cos,
        sin,
        heads,
        key_heads,
        batch_first,
        interleaved,
        weights,
        dropout_p,
        left,
        right,
        lower_right,
        scale,
        softcap,
    ):
        layout = Layout(heads, key_heads, batch_first, interleaved, weights)
        options = dropout_p, left, right, lower_right, scale, softcap
        projections = projected((query, key, value), in_proj_weight, in_proj_bias, layout)
        if cos is not None:
            turn(projections, cos, sin, layout, False)
        own = to_heads(projections, layout)
        rest = attn_mask, dropout_key, alibi_slopes, sinks, None, None
        out, lse = backends.op("scaled_dot_product_attention_fwd", query)(*own, *rest, *options)
        output = F.linear(joined_heads(out, layout), out_proj_weight, out_proj_bias)
        if weights == 0:
            return output, out, lse, *projections
        op = backends.op("attention_weights", query)
        return output, op(*own[:2], *rest, lse, *options, weights == 1), out, lse, *projections

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.layout = Layout(*inputs[TENSORS : TENSORS + len(Layout._fields)])
        ctx.options = inputs[TENSORS + len(Layout._fields) :]
        hidden = output[2 if ctx.layout.weights else 1 :]
        ctx.mark_non_differentiable(*hidden)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], *hidden)

    @staticmethod
    def backward(ctx, grad_output, *others):
        grad_weights = others[0] if ctx.layout.weights else None
        options = (*ctx.layout, *ctx.options)
        if grad_output is None and grad_weights is None:
            return (None,) * (TENSORS + len(options))
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if grad_weights is not None or again:  # what has a derivative by parts, any number of times
            grads = _gradients_by_parts(ctx, grad_output, grad_weights)
        else:
            grads = _gradients(ctx, ctx.saved_tensors, grad_output)
        return (*grads, *(None,) * len(options))


def _gradients_by_parts(ctx, grad_output, grad_weights):
    inputs = ctx.saved_tensors[:TENSORS]
    with torch.enable_grad():
        # Each input under a name of its own: one may have been made from another.
        copies = [
            t.view_as(t) if t is not None and w else t for t, w in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        outputs = composed(*copies, *ctx.layout, *ctx.options)
    wanted = [i for i in range(TENSORS) if ctx.needs_input_grad[i]]
    pairs = [(o, g) for o, g in zip(outputs, (grad_output, grad_weights), strict=False) if g is not None]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        [copies[i] for i in wanted],
        [g for _, g in pairs],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    grads: list[torch.Tensor | None] = [None] * TENSORS
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return grads


def _gradients(ctx, saved, grad_output):
    *tokens, weight, _, out_weight, _, mask, dropout_key, alibi, sinks, cos, sin = saved[:TENSORS]
    out, lse, *projections = saved[TENSORS:]
    layout, needs = ctx.layout, ctx.needs_input_grad
    grads: list[torch.Tensor | None] = [None] * TENSORS

    rows = grad_output.flatten(0, 1)  # (N L, E)
    if needs[5]:
        grads[5] = rows.t() @ joined_heads(out, layout).flatten(0, 1)
    if needs[6]:
        grads[6] = rows.sum(0)
    if not (needs[MASK] or needs[SINKS] or any(needs[:5])):
        return grads

    grad_out = split_heads(
        (rows @ out_weight).view(*grad_output.shape[:2], out_weight.shape[1]), layout.heads, layout.batch_first
    )
    query, key, value = to_heads(projections, layout)
    inputs = (grad_out, None, query, key, value, mask, dropout_key, alibi, sinks, None, None, out, lse, *ctx.options)
    inputs = (*inputs, needs[MASK], needs[SINKS])
    if len(projections) == 3:
        *of_heads, grad_mask, grad_sinks = backends.op("scaled_dot_product_attention_bwd", query)(*inputs)
        to_projections = [joined_heads(t, layout) for t in of_heads]
    else:
        op = backends.op("multi_head_attention_bwd", query)
        packed, own, grad_mask, grad_sinks = op(*inputs, len(projections) == 1, not layout.batch_first)
        to_projections = [t.flatten(2) for t in ((own, packed) if len(projections) == 2 else (packed,))]
    if cos is not None:
        turn(to_projections, cos, sin, layout, True)
    if needs[MASK]:
        grads[MASK] = grad_mask
    if needs[SINKS]:
        grads[SINKS] = grad_sinks

    to_projections = [t.flatten(0, 1) for t in to_projections]
    weights = weight.split([t.shape[1] for t in to_projections])
    for i, (t, to_projection, w) in enumerate(zip(tokens, to_projections, weights, strict=False)):
        if needs[i]:
            grads[i] = (to_projection @ w).view(t.shape)
    if needs[3]:
        grads[3] = _stacked([g.t() @ t.flatten(0, 1) for g, t in zip(to_projections, tokens, strict=False)])
    if needs[4]:
        grads[4] = _stacked([g.sum(0) for g in to_projections])
    return grads


def _stacked(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts)
