"""Attention in torch ops: broadcasting, the gradients of the weights, and the backward of the backward."""

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


def _window(query, key, key_ranges, left, right, lower_right):
    """Which keys each query sees, (Lq, Lk) bool, and the distance of each key from the diagonal; None for all keys."""
    queries, keys = query.shape[-2], key.shape[-2]
    if key_ranges is not None:
        begin, end, diagonal, _ = key_ranges[:, None].unbind(-1)
        column = torch.arange(keys, device=query.device)
        return (column >= begin) & (column < end), column - diagonal
    rows = torch.arange(queries, device=query.device)[:, None]
    distance = torch.arange(keys, device=query.device) - rows - (keys - queries if lower_right else 0)
    seen = None
    if left >= 0:
        seen = distance >= -left
    if right >= 0:
        seen = distance <= right if seen is None else seen & (distance <= right)
    return seen, distance


def _capped(products, softcap):
    """Scores from scaled products, and the tangent in them or None."""
    if softcap == 0:
        return products, None
    tangent = (products / softcap).tanh()
    return softcap * tangent, tangent


def _probabilities(scores, query, keys, attn_mask, alibi_slopes, sinks, key_ranges, left, right, lower_right):
    """softmax(scores + mask + alibi), 0 where masked and in rows that are masked as a whole.

    With sinks there is one more column, the weight of the sink.
    """
    seen, distance = _window(query, keys, key_ranges, left, right, lower_right)
    hidden = None if seen is None else seen.logical_not()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = attn_mask.logical_not() if hidden is None else hidden | attn_mask.logical_not()
    elif attn_mask is not None:
        out = attn_mask == -math.inf
        scores = scores + attn_mask.masked_fill(out, 0)
        hidden = out if hidden is None else hidden | out
    if alibi_slopes is not None:
        scores = scores - (alibi_slopes[..., None, None] * distance.abs()).to(scores.dtype)
    if hidden is not None:
        hidden = hidden.expand_as(scores)
        scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        column = sinks[..., None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
        return torch.cat((scores, column), -1).softmax(-1)
    if hidden is None:
        return scores.softmax(-1)
    empty = hidden.all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(hidden, 0)


def _dropped(x, query, key, dropout_key, dropout_p):
    """x * keep / (1 - dropout_p)."""
    if dropout_key is None or dropout_p == 0:
        return x
    if dropout_p == 1:
        return torch.zeros_like(x)
    keep = backends.op("scaled_dot_product_attention_keep", query)(query, key, dropout_key, dropout_p)
    return (x * (1 / (1 - dropout_p))).masked_fill(keep.logical_not(), 0)


def weights_gradients(grad, inputs, options, mask_gradient, sinks_gradient):
    """Gradients of query, key, mask and sinks from that of the (..., H, Lq, Lk) weights, dropout included.

    With G = drop(grad), the scores have the gradient dS = P * (G - rowsum(P * G)).
    """
    query, key, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges = inputs
    dropout_p, *window, scale, softcap = options
    count, keys = key.shape[-2], _repeated(key, query)
    scores, tangent = _capped(query @ keys.mT * scale, softcap)
    p = _probabilities(scores, query, keys, attn_mask, alibi_slopes, sinks, key_ranges, *window)
    g = _dropped(grad, query, key, dropout_key, dropout_p)
    if sinks is not None:
        g = torch.cat((g, torch.zeros_like(g[..., :1])), -1)
    ds = p * (g - (p * g).sum(-1, keepdim=True))
    to_sinks = ds[..., count].sum(-1).to(sinks.dtype) if sinks_gradient else None
    ds = ds[..., :count]
    to_mask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype) if mask_gradient else None
    dx = scale * (ds if tangent is None else ds * (1 - tangent.square()))
    return dx @ keys, _summed(dx.mT @ query, key), to_mask, to_sinks


def second_order(inputs, options, cotangents):
    """Gradients of <cotangents, backward(*inputs, *options)>, in the order of `inputs`.

    With weights A = drop(P), G = drop(grad_out V^T) and dS = P * (G - rowsum(P * G) + grad_lse), the backward is
    dQ = scale dX K, dK = scale dX^T Q, dV = A^T grad_out, dmask = dS. dX is dS, times 1 - tanh^2 where there is a
    soft cap. A sink is a column of S, P and dS whose G is 0.
    """
    grad_out, grad_lse, query, key, value, attn_mask, dropout_key, alibi_slopes, sinks, key_ranges, _ = inputs
    dropout_p, left, right, lower_right, scale, softcap, mask_gradient, sinks_gradient = options
    c_query, c_key, c_value, c_mask, c_sinks = cotangents

    def drop(x):
        return _dropped(x, query, key, dropout_key, dropout_p)

    def with_sink(x, column=0):
        """x with the column of the sink."""
        return x if sinks is None else torch.cat((x, torch.zeros_like(x[..., :1]) + column), -1)

    count = key.shape[-2]
    keys, values, c_key, c_value = (_repeated(t, query) for t in (key, value, c_key, c_value))
    window = (key_ranges, left, right, lower_right)
    scores, tangent = _capped(query @ keys.mT * scale, softcap)
    slope = 1 if tangent is None else 1 - tangent.square()
    p = _probabilities(scores, query, keys, attn_mask, alibi_slopes, sinks, *window)
    own = p[..., :count]  # of the keys
    g = with_sink(drop(grad_out @ values.mT))
    centred = g - (p * g).sum(-1, keepdim=True)
    if grad_lse is not None:
        centred = centred + grad_lse[..., None].to(p.dtype)
    ds = (p * centred)[..., :count]
    c_dx = scale * (c_query @ keys.mT + query @ c_key.mT)
    c_ds = c_dx * slope
    if mask_gradient:
        c_ds = c_ds + c_mask
    c_ds = with_sink(c_ds, c_sinks[..., None, None].to(p.dtype) if sinks_gradient else 0)
    mean = (p * c_ds).sum(-1, keepdim=True)
    c_g = drop((p * (c_ds - mean))[..., :count])
    c_p = c_ds * centred - mean * g + with_sink(drop(grad_out @ c_value.mT))
    c_scores = p * (c_p - (p * c_p).sum(-1, keepdim=True))
    d_sinks = c_scores[..., count].sum(-1).to(sinks.dtype) if sinks_gradient else None
    c_scores = c_scores[..., :count]
    dx, c_x = ds * slope, c_scores * slope
    if tangent is not None:
        c_x = c_x - 2 / softcap * c_dx * dx * tangent  # slope depends on the products too
    d_grad_out = c_g @ values + drop(own) @ c_value
    d_grad_lse = mean.squeeze(-1).to(grad_lse.dtype) if grad_lse is not None else None
    d_query = scale * (dx @ c_key + c_x @ keys)
    d_key = scale * (dx.mT @ c_query + c_x.mT @ query)
    d_mask = c_scores.sum_to_size(attn_mask.shape) if mask_gradient else None
    d_value = _summed(c_g.mT @ grad_out, value)
    return d_grad_out, d_grad_lse, d_query, _summed(d_key, key), d_value, d_mask, None, None, d_sinks


def additive_composite(query, key, value, weight, added, *, seen):
    """(out, weights) in differentiable torch operations; added and seen have the whole shape of the scores."""
    scores = (query[..., :, None, :] + key[..., None, :, :]).tanh() @ weight
    if added is not None:
        scores = scores + added.masked_fill(~seen, 0).to(scores.dtype)
    if seen is not None:
        empty = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(~seen, -math.inf).masked_fill(empty, 0)
    weights = scores.softmax(-1)
    if seen is not None:
        weights = weights.masked_fill(~seen, 0)
    return weights @ value, weights
