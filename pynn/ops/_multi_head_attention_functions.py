"""The dispatcher op of multi_head_attention, its shape rule and its autograd Function.

Tokens are (N, L, E), or (L, N, E) unless batch_first. A projection (N, L, W) holds the heads of query, then of key and
of value next to each other; heads are views (N, H, L, D) of it. Matrix products are torch's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .. import backends
from ._attention_functions import INPUTS, OPTIONS, ScaledDotProductAttention
from ._attention_weights import AttentionWeights
from ._function import call, check_devices, compute_dtype, eager
from ._registry import define
from .rotary_embedding import RotaryEmbedding, turn_in_place

_TENSORS = 13  # of the inputs
_MASK, _SINKS = 7, 10  # their places


class Layout(NamedTuple):
    """How tokens become heads, and what is returned beside the output."""

    heads: int
    key_heads: int
    batch_first: bool
    interleaved: bool  # pairs of channels that rotary embedding turns
    weights: int  # none, averaged over the heads, of each head


@define(
    f"multi_head_attention_bwd(Tensor grad_out, Tensor? grad_lse, {INPUTS}, Tensor out, Tensor lse, {OPTIONS}, "
    "bool mask_gradient, bool sinks_gradient, bool with_query, bool sequence_first) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def _(grad_out, grad_lse, query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, *rest):
    *others, _, _, _, _, _, mask_gradient, sinks_gradient, with_query, sequence_first = rest
    check_devices("multi_head_attention", query, grad_out, grad_lse, key, value, attn_mask, dropout_key, *others)
    grad_mask = attn_mask.new_empty(attn_mask.shape) if mask_gradient else query.new_empty(0)
    grad_sinks = query.new_empty(sinks.shape if sinks_gradient else 0, dtype=compute_dtype(query))

    def packed(length, heads):
        sizes = (length, query.shape[0]) if sequence_first else (query.shape[0], length)
        return query.new_empty((*sizes, heads, query.shape[3]))

    heads, key_heads = query.shape[1], key.shape[1]
    grads = packed(key.shape[2], 2 * key_heads + (heads if with_query else 0))
    return grads, query.new_empty(0) if with_query else packed(query.shape[2], heads), grad_mask, grad_sinks


def _projected(tokens, weight, bias, layout):
    """Query, key and value of the tokens, with one product for those that share them."""
    if tokens[1] is None:
        return (F.linear(tokens[0], weight, bias),)
    width = weight.shape[0] // (layout.heads + 2 * layout.key_heads)
    sizes = [layout.heads * width, *[layout.key_heads * width] * 2]
    if tokens[2] is None:
        sizes = [sizes[0], 2 * sizes[1]]
    biases = (None,) * 3 if bias is None else bias.split(sizes)
    return tuple(F.linear(t, w, b) for t, w, b in zip(tokens, weight.split(sizes), biases, strict=False))


def _split(joined, count, batch_first):
    """Tokens of width H D as heads (N, H, L, D), a view."""
    heads = joined.unflatten(-1, (count, -1))
    return heads.transpose(1, 2) if batch_first else heads.permute(1, 2, 0, 3)


def _counts(projections, layout):
    """The numbers of heads in each projection: of query, key and value, or those of them that it holds."""
    heads, key_heads = layout.heads, layout.key_heads
    if len(projections) == 1:
        return ((heads, key_heads, key_heads),)
    return ((heads,), (key_heads, key_heads)) if len(projections) == 2 else ((heads,), (key_heads,), (key_heads,))


def _to_heads(projections, layout):
    """Query, key and value (N, H, L, D) as views of their projections."""
    found = []
    for projection, counts in zip(projections, _counts(projections, layout), strict=True):
        found += _split(projection, sum(counts), layout.batch_first).split(counts, 1)
    return found


def _joined(out, layout):
    """(N, H, L, D) as tokens of width H D; a view for batch_first, as attention stores its result."""
    return (out.transpose(1, 2) if layout.batch_first else out.permute(2, 0, 1, 3)).flatten(2)


def composed(*inputs):
    """The output, and the weights where wanted, by way of a Function for each of the parts."""
    *tokens, weight, bias, out_weight, out_bias, mask, dropout_key, alibi, sinks, cos, sin = inputs[:_TENSORS]
    layout, options = Layout(*inputs[_TENSORS : _TENSORS + len(Layout._fields)]), inputs[_TENSORS + len(Layout._fields) :]
    query, key, value = _to_heads(_projected(tokens, weight, bias, layout), layout)
    if cos is not None:
        query, key = (call(RotaryEmbedding, t, cos, sin, layout.interleaved, False) for t in (query, key))
    rest = (mask, dropout_key, alibi, sinks, None, None)
    out, lse = call(ScaledDotProductAttention, query, key, value, *rest, *options)
    output = F.linear(_joined(out, layout), out_weight, out_bias)
    if layout.weights == 0:
        return (output,)
    return output, call(AttentionWeights, query, key, *rest, lse.detach(), *options, layout.weights == 1)


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
    ):
        layout = Layout(heads, key_heads, batch_first, interleaved, weights)
        options = dropout_p, left, right, lower_right, scale
        projections = _projected((query, key, value), in_proj_weight, in_proj_bias, layout)
        if cos is not None:
            _turn(projections, cos, sin, layout, False)
        own = _to_heads(projections, layout)
        rest = attn_mask, dropout_key, alibi_slopes, sinks, None, None
        out, lse = backends.op("scaled_dot_product_attention_fwd", query)(*own, *rest, *options)
        output = F.linear(_joined(out, layout), out_proj_weight, out_proj_bias)
        if weights == 0:
            return output, out, lse, *projections
        op = backends.op("attention_weights", query)
        return output, op(*own[:2], *rest, lse, *options, weights == 1), out, lse, *projections

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.layout = Layout(*inputs[_TENSORS : _TENSORS + len(Layout._fields)])
        ctx.options = inputs[_TENSORS + len(Layout._fields) :]
        hidden = output[2 if ctx.layout.weights else 1 :]
        ctx.mark_non_differentiable(*hidden)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:_TENSORS], *hidden)

    @staticmethod
    def backward(ctx, grad_output, *others):
        grad_weights = others[0] if ctx.layout.weights else None
        options = (*ctx.layout, *ctx.options)
        if grad_output is None and grad_weights is None:
            return (None,) * (_TENSORS + len(options))
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if grad_weights is not None or again:  # what has a derivative by parts, any number of times
            grads = _gradients_by_parts(ctx, grad_output, grad_weights)
        else:
            grads = _gradients(ctx, grad_output)
        return (*grads, *(None,) * len(options))


def _turn(projections, cos, sin, layout, inverse):
    """Turns the heads of query and key by rotary embedding, in place: the projections are nobody else's yet."""
    for i, (projection, counts) in enumerate(zip(projections, _counts(projections, layout), strict=True)):
        if i < 2:
            turned = sum(counts[:2]) if i == 0 else counts[0]
            heads = _split(projection, sum(counts), layout.batch_first).narrow(1, 0, turned)
            turn_in_place(heads, cos, sin, layout.interleaved, inverse)


def _gradients_by_parts(ctx, grad_output, grad_weights):
    inputs = ctx.saved_tensors[:_TENSORS]
    with torch.enable_grad():
        # Each input under a name of its own: one may have been made from another.
        copies = [t.view_as(t) if t is not None and w else t for t, w in zip(inputs, ctx.needs_input_grad, strict=False)]
        outputs = composed(*copies, *ctx.layout, *ctx.options)
    wanted = [i for i in range(_TENSORS) if ctx.needs_input_grad[i]]
    pairs = [(o, g) for o, g in zip(outputs, (grad_output, grad_weights), strict=False) if g is not None]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        [copies[i] for i in wanted],
        [g for _, g in pairs],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    grads = [None] * _TENSORS
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return grads


def _gradients(ctx, grad_output):
    *tokens, weight, bias, out_weight, out_bias, mask, dropout_key, alibi, sinks, cos, sin = ctx.saved_tensors[:_TENSORS]
    out, lse, *projections = ctx.saved_tensors[_TENSORS:]
    layout, needs = ctx.layout, ctx.needs_input_grad
    grads = [None] * _TENSORS

    rows = grad_output.reshape(-1, grad_output.shape[-1])  # (N L, E)
    joined = _joined(out, layout)
    if needs[5]:
        grads[5] = rows.t() @ joined.reshape(rows.shape[0], -1)
    if needs[6]:
        grads[6] = rows.sum(0)
    if not (needs[_MASK] or needs[_SINKS] or any(needs[:5])):
        return grads

    grad_out = _split((rows @ out_weight).view(joined.shape), layout.heads, layout.batch_first)
    query, key, value = _to_heads(projections, layout)
    inputs = (grad_out, None, query, key, value, mask, dropout_key, alibi, sinks, None, None, out, lse, *ctx.options)
    inputs = (*inputs, needs[_MASK], needs[_SINKS])
    if len(projections) == 3:
        *to_heads, grad_mask, grad_sinks = backends.op("scaled_dot_product_attention_bwd", query)(*inputs)
        to_projections = [_joined(t, layout) for t in to_heads]
    else:
        op = backends.op("multi_head_attention_bwd", query)
        packed, own, grad_mask, grad_sinks = op(*inputs, len(projections) == 1, not layout.batch_first)
        to_projections = [t.flatten(2) for t in ((own, packed) if len(projections) == 2 else (packed,))]
    if cos is not None:
        _turn(to_projections, cos, sin, layout, True)
    if needs[_MASK]:
        grads[_MASK] = grad_mask
    if needs[_SINKS]:
        grads[_SINKS] = grad_sinks

    to_projections = [t.reshape(-1, t.shape[-1]) for t in to_projections]
    weights = weight.split([t.shape[1] for t in to_projections])
    for i, (t, to_projection, w) in enumerate(zip(tokens, to_projections, weights, strict=False)):
        if needs[i]:
            grads[i] = (to_projection @ w).view(t.shape)
    if needs[3]:
        grads[3] = _stacked([g.t() @ t.reshape(-1, t.shape[-1]) for g, t in zip(to_projections, tokens, strict=False)])
    if needs[4]:
        grads[4] = _stacked([g.sum(0) for g in to_projections])
    return grads


def _stacked(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts)
