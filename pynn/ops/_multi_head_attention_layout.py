"""How tokens become the heads of multi_head_attention, and multi_head_attention made of Functions for its parts.

Tokens are (N, L, E), or (L, N, E) unless batch_first. A projection (N, L, W) holds the heads of query, then of key and
of value next to each other; heads are views (N, H, L, D) of it. Matrix products are torch's.
"""

from __future__ import annotations

from typing import NamedTuple

from torch.nn import functional as F

from ._attention_functions import ScaledDotProductAttention
from ._attention_weights import AttentionWeights
from ._function import call
from .rotary_embedding import RotaryEmbedding, turn_in_place

TENSORS = 13  # of the inputs of the Function
MASK, SINKS = 7, 10  # their places


class Layout(NamedTuple):
    """How tokens become heads, and what is returned beside the output."""

    heads: int
    key_heads: int
    batch_first: bool
    interleaved: bool  # pairs of channels that rotary embedding turns
    weights: int  # none, averaged over the heads, of each head


def projected(tokens, weight, bias, layout):
    """Query, key and value of the tokens, with one product for those that share them."""
    if tokens[1] is None:
        return (F.linear(tokens[0], weight, bias),)
    width = weight.shape[0] // (layout.heads + 2 * layout.key_heads)
    sizes = [layout.heads * width, *[layout.key_heads * width] * 2]
    if tokens[2] is None:
        sizes = [sizes[0], 2 * sizes[1]]
    biases = (None,) * 3 if bias is None else bias.split(sizes)
    return tuple(F.linear(t, w, b) for t, w, b in zip(tokens, weight.split(sizes), biases, strict=False))


def split_heads(joined, count, batch_first):
    """Tokens of width H D as heads (N, H, L, D), a view."""
    heads = joined.unflatten(-1, (count, -1))
    return heads.transpose(1, 2) if batch_first else heads.permute(1, 2, 0, 3)


def _counts(projections, layout):
    """The numbers of heads in each projection: of query, key and value, or those of them that it holds."""
    heads, key_heads = layout.heads, layout.key_heads
    if len(projections) == 1:
        return ((heads, key_heads, key_heads),)
    return ((heads,), (key_heads, key_heads)) if len(projections) == 2 else ((heads,), (key_heads,), (key_heads,))


def to_heads(projections, layout):
    """Query, key and value (N, H, L, D) as views of their projections."""
    found = []
    for projection, counts in zip(projections, _counts(projections, layout), strict=True):
        found += split_heads(projection, sum(counts), layout.batch_first).split(counts, 1)
    return found


def joined_heads(out, layout):
    """(N, H, L, D) as tokens of width H D; a view for batch_first, as attention stores its result."""
    return (out.transpose(1, 2) if layout.batch_first else out.permute(2, 0, 1, 3)).flatten(2)


def composed(*inputs):
    """The output, and the weights where wanted, by way of a Function for each of the parts."""
    *tokens, weight, bias, out_weight, out_bias, mask, dropout_key, alibi, sinks, cos, sin = inputs[:TENSORS]
    layout, options = Layout(*inputs[TENSORS : TENSORS + len(Layout._fields)]), inputs[TENSORS + len(Layout._fields) :]
    query, key, value = to_heads(projected(tokens, weight, bias, layout), layout)
    if cos is not None:
        query, key = (call(RotaryEmbedding, t, cos, sin, layout.interleaved, False) for t in (query, key))
    rest = (mask, dropout_key, alibi, sinks, None, None)
    out, lse = call(ScaledDotProductAttention, query, key, value, *rest, *options)
    output = F.linear(joined_heads(out, layout), out_weight, out_bias)
    if layout.weights == 0:
        return (output,)
    return output, call(AttentionWeights, query, key, *rest, lse.detach(), *options, layout.weights == 1)


def turn(projections, cos, sin, layout, inverse):
    """Turns the heads of query and key by rotary embedding, in place: the projections are nobody else's yet."""
    for i, (projection, counts) in enumerate(zip(projections, _counts(projections, layout), strict=True)):
        if i < 2:
            turned = sum(counts[:2]) if i == 0 else counts[0]
            heads = split_heads(projection, sum(counts), layout.batch_first).narrow(1, 0, turned)
            turn_in_place(heads, cos, sin, layout.interleaved, inverse)
