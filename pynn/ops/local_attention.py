"""local_attention: each query attends to the keys around a centre of its own, weighted by a Gaussian.

Shapes: query (..., H, Lq, D), key (..., H, Lk, D), value (..., H, Lk, Dv), center (..., H, Lq) -> (..., H, Lq, Dv).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._attention_composite import broadcast_leading
from ._attention_functions import ScaledDotProductAttention
from ._attention_options import scores_options
from ._function import autocast, call, compute_dtype, recorded
from .random import make_key

_NAME = "local_attention"


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    attn_mask: Tensor | None = None,
    *,
    width: float,
    sigma: float | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """Local attention with predicted centres, Luong's local-p (Luong, Pham, Manning 2015, arXiv 1508.04025).

    out_i = sum_j A_ij exp(-(j - center_i)^2 / (2 sigma^2)) value_j, where A is the softmax of scale Q K^T + mask over
    the keys with |j - center_i| <= width. As in the paper the Gaussian comes after the softmax: the weights of a query
    sum up to less than 1, the less the farther it attends from its centre. (Adding the exponent to the scores instead,
    which renormalises, is scaled_dot_product_attention with that as its float mask.)

    center has its gradient by way of the Gaussian; the window, a step, has none. Local-m, monotonic alignment, is
    center = torch.arange(Lq) and sigma = math.inf; scaled_dot_product_attention(window=(width, width)) is the same
    without a mask in memory.

    With S the scores and e the exponent that is out_i = O_i exp(L'_i - L_i): O and the log-sum-exp L' are those of
    attention with S - e, L that of S. Gradients in float32, where the difference of two results would be seen, come
    from one pass in which each key is there twice: with its value and the Gaussian, and with the value 0 and what the
    Gaussian leaves of 1, so that the sum below the weights is that without a Gaussian. Either way there is a mask for
    each head that has centres of its own. A single query per head, as in a decoder, copies the keys of its window and
    costs no more than those; otherwise the time is that of all keys.

    Args:
        query: (..., H, Lq, D) float64, float32, float16 or bfloat16; at least 2 dimensions.
        key: (..., H, Lk, D), or (..., Hk, Lk, D) with H a multiple of Hk when enable_gqa. value: (..., H, Lk, Dv), or
            (..., Hk, Lk, Dv).
        center: broadcastable to (..., H, Lq), floating or integer: the key that each query attends around, from 0; the
            paper predicts Lk sigmoid(v . tanh(W h)).
        attn_mask: broadcastable to (..., H, Lq, Lk): bool (True takes part) or float (added to the scores).
        width: keys on either side of the centre, D in the paper; at least 0.
        sigma: standard deviation of the Gaussian, width / 2 by default; math.inf for none.
        dropout_p, scale, enable_gqa, generator, seed: as scaled_dot_product_attention's.
    Returns:
        (..., H, Lq, Dv), dtype of query; 0 for a query without a key in its window.
    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
        ValueError: width is negative or sigma is not above 0.
    """
    sigma = width / 2 if sigma is None else sigma
    if not width >= 0:
        raise ValueError(f"{_NAME}: expected width of at least 0, got {width}")
    if not sigma > 0 and width > 0:
        raise ValueError(f"{_NAME}: expected sigma above 0, got {sigma}")
    query, key, value = autocast(query, key, value)
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        query, key, value = broadcast_leading(query, key, value, enable_gqa)
    center = _checked_center(center, query)
    keys = key.shape[-2]
    if attn_mask is not None and (attn_mask.dim() == 0 or attn_mask.shape[-1] not in (1, keys)):
        raise RuntimeError(f"{_NAME}: expected attn_mask (..., {keys}), got {list(attn_mask.shape)}")
    columns, place = torch.arange(keys, device=query.device), None
    most = int(2 * width) + 1 if width < keys else keys  # keys of a window
    if 2 * most <= keys:  # numbers for the keys of each window only
        alone = query.shape[-2] == 1 and query.shape[:-2] == key.shape[:-2]
        lead = () if attn_mask is None else attn_mask.shape[:-1]
        lead = query.shape[:-1] if alone else torch.broadcast_shapes(center.shape, lead)
        columns = _window(center.detach().expand(lead), width, most, keys)
        if attn_mask is not None and attn_mask.shape[-1] > 1:
            attn_mask = attn_mask.expand(*lead, -1).take_along_dim(columns, -1)
        if alone:
            rows = columns.squeeze(-2)[..., None]
            key, value = key.take_along_dim(rows, -2), value.take_along_dim(rows, -2)
        else:
            place = columns
    distance = columns - center[..., None]
    seen = distance.detach().abs() <= width
    added = None  # to the scores
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        hidden = attn_mask == -math.inf
        seen, added = seen & ~hidden, attn_mask.to(distance.dtype).masked_fill(hidden, 0)
    dropout_key = make_key(query.device, generator=generator, seed=seed) if dropout_p > 0 else None
    options = scores_options(_NAME, None, "upper_left", False, scale, None, query.shape[-1])

    def plain_mask():
        return _spread(seen if added is None else added.masked_fill(~seen, -math.inf), place, keys)

    def attended(values, mask, dropout_key, p):
        return call(ScaledDotProductAttention, query, key, values, mask, dropout_key, *(None,) * 4, float(p), *options)

    if sigma == math.inf or width == 0:  # with width 0 the window holds the centre itself or nothing
        return attended(value, plain_mask(), dropout_key, dropout_p)[0]
    exponent = distance.square() * (0.5 / sigma**2)
    weighted = (-exponent if added is None else added - exponent).masked_fill(~seen, -math.inf)
    # With dropout always: what is dropped must not depend on whether gradients are wanted.
    if query.dtype is torch.float32 and (dropout_key is not None or recorded((query, key, value, center))):
        apart = exponent.detach() > 0
        rest = exponent.masked_fill(~apart, 1).neg().expm1().neg().log()  # log(1 - exp(-exponent))
        rest = (rest if added is None else added + rest).masked_fill(~(seen & apart), -math.inf)
        key, value = torch.cat((key, key), -2), torch.cat((value, torch.zeros_like(value)), -2)
        twice = None if place is None else torch.cat((place, place + keys), -1)
        both = _spread(torch.cat((weighted, rest), -1), twice, 2 * keys)
        return attended(value, both, dropout_key, dropout_p)[0]
    out, with_gaussian = attended(value, _spread(weighted, place, keys), dropout_key, dropout_p)
    plain = attended(value.detach()[..., :1], plain_mask(), None, 0.0)[1]
    share = torch.where(plain == -math.inf, 0.0, with_gaussian - plain).exp()
    return (out.to(compute_dtype(query)) * share[..., None].to(compute_dtype(query))).to(query.dtype)


def _window(center: Tensor, width: float, most: int, keys: int) -> Tensor:
    """The `most` keys from the first one of each window on, moved to where there are so many: (..., H, 1, most)."""
    first = (center - width).ceil().nan_to_num().clamp(0, keys - most).long()
    return first[..., None] + torch.arange(most, device=center.device)


def _spread(mask: Tensor, place: Tensor | None, keys: int) -> Tensor:
    """The mask of all keys from that of the keys at `place`: the others take no part."""
    if place is None:
        return mask
    hidden = False if mask.dtype == torch.bool else -math.inf
    return mask.new_full((*place.shape[:-1], keys), hidden).scatter(-1, place, mask.expand(place.shape))


def _checked_center(center: Tensor, query: Tensor) -> Tensor:
    """In the precision of sums, with no more leading dimensions than it has."""
    if query.dim() < 2:
        raise RuntimeError(f"{_NAME}: expected query with at least 2 dimensions, got {query.dim()}")
    expected = query.shape[:-1]
    lead = len(expected) - center.dim()
    fits = 0 <= lead < len(expected) and all(
        size in (1, whole) for size, whole in zip(center.shape, expected[max(lead, 0) :], strict=True)
    )
    if not fits:
        raise RuntimeError(f"{_NAME}: expected center that broadcasts to {list(expected)}, got {list(center.shape)}")
    if center.device != query.device:
        raise RuntimeError(f"{_NAME}: expected center and query to be on the same device")
    if center.is_complex() or center.dtype == torch.bool:
        raise RuntimeError(f"{_NAME}: expected center to be floating or integer, got {center.dtype}")
    return center.to(compute_dtype(query))
