"""Attention in torch ops: broadcasting, the weights themselves, and the backward of the backward."""

from __future__ import annotations

import math

import torch

from .. import backends


def broadcast_leading(query, key, value, enable_gqa):
    """Leading dimensions broadcast against each other, as torch.matmul does; heads only without grouped queries."""
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return query, key, value  # the op says what is wrong
    keep = 3 if enable_gqa else 2
    if enable_gqa:
        heads = [t.shape[-3] if t.dim() > 2 else 0 for t in (query, key, value)]
        if heads[1] != heads[2] or min(heads) < 1 or heads[0] % heads[1]:
            raise RuntimeError(
                "Number of heads in key and value must divide the number of heads in query: got "
                f"{heads[1]}, {heads[2]} and {heads[0]}"
            )
    lead = torch.broadcast_shapes(*(t.shape[:-keep] for t in (query, key, value)))
    return tuple(t.expand(*lead, *t.shape[-keep:]) for t in (query, key, value))


def _repeated(t, query):
    """Key heads repeated for the query heads that share them."""
    group = query.shape[-3] // t.shape[-3] if t.dim() > 2 and t.shape[-3] else 1
    return t.repeat_interleave(group, -3) if group > 1 else t


def _summed(t, key):
    """The gradient of `_repeated`."""
    return t if t.shape == key.shape else t.unflatten(-3, (key.shape[-3], -1)).sum(-3)


def _probabilities(query, keys, attn_mask, is_causal, scale):
    """softmax(scale Q K^T + mask), 0 where masked and in rows that are masked as a whole."""
    scores = query @ keys.mT * scale
    if attn_mask is None and not is_causal:
        return scores.softmax(-1)
    if attn_mask is None:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril().logical_not()
    elif attn_mask.dtype == torch.bool:
        hidden = attn_mask.logical_not()
    else:
        hidden = attn_mask == -math.inf
        scores = scores + attn_mask.masked_fill(hidden, 0)
    empty = hidden.expand_as(scores).all(-1, keepdim=True)
    p = scores.masked_fill(hidden, -math.inf).masked_fill(empty, 0).softmax(-1)
    return p.masked_fill(hidden, 0)


def _dropped(x, query, key, dropout_key, dropout_p):
    """x * keep / (1 - dropout_p)."""
    if dropout_key is None or dropout_p == 0:
        return x
    if dropout_p == 1:
        return torch.zeros_like(x)
    keep = backends.op("scaled_dot_product_attention_keep", query)(query, key, dropout_key, dropout_p)
    return (x * (1 / (1 - dropout_p))).masked_fill(keep.logical_not(), 0)


def weights(query, key, attn_mask, dropout_key, dropout_p, is_causal, scale):
    """The (..., H, Lq, Lk) weights that scaled_dot_product_attention gives to the values, dropout included."""
    p = _probabilities(query, _repeated(key, query), attn_mask, is_causal, scale)
    return _dropped(p, query, key, dropout_key, dropout_p)


def second_order(grad_out, query, key, value, attn_mask, dropout_key, dropout_p, is_causal, scale, mask_gradient, *c):
    """Gradients of <c, backward(grad_out, query, key, value, attn_mask)>.

    With weights A = drop(P), G = drop(grad_out V^T) and dS = P * (G - rowsum(P * G)), the backward is
    dQ = scale dS K, dK = scale dS^T Q, dV = A^T grad_out, dmask = dS.
    """

    def drop(x):
        return _dropped(x, query, key, dropout_key, dropout_p)

    c_query, c_key, c_value, c_mask = c
    keys, values, c_key, c_value = (_repeated(t, query) for t in (key, value, c_key, c_value))
    p = _probabilities(query, keys, attn_mask, is_causal, scale)
    g = drop(grad_out @ values.mT)
    centred = g - (p * g).sum(-1, keepdim=True)
    ds = p * centred
    c_ds = scale * (c_query @ keys.mT + query @ c_key.mT)
    if mask_gradient:
        c_ds = c_ds + c_mask
    mean = (p * c_ds).sum(-1, keepdim=True)
    c_g = drop(p * (c_ds - mean))
    c_p = c_ds * centred - mean * g + drop(grad_out @ c_value.mT)
    c_scores = p * (c_p - (p * c_p).sum(-1, keepdim=True))
    d_grad_out = c_g @ values + drop(p) @ c_value
    d_query = scale * (ds @ c_key + c_scores @ keys)
    d_key = scale * (ds.mT @ c_query + c_scores.mT @ query)
    d_mask = c_scores.sum_to_size(attn_mask.shape) if mask_gradient else None
    return d_grad_out, d_query, _summed(d_key, key), _summed(c_g.mT @ grad_out, value), d_mask
