"""local_attention: each query attends to the keys around a centre of its own, weighted by a Gaussian.

Shapes: query (..., H, Lq, D), key (..., H, Lk, D), value (..., H, Lk, Dv), center (..., H, Lq) -> (..., H, Lq, Dv).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._attention_composite import broadcast_leading
from ._function import autocast, compute_dtype
from .scaled_dot_product_attention import scaled_dot_product_attention

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

    One pass of scaled_dot_product_attention in which each key is there twice: with its value and the Gaussian, and with
    the value 0 and what the Gaussian leaves of 1, so that the sum below the weights is that without a Gaussian. It has
    a mask of 2 Lq Lk elements for each head that has centres of its own, and takes time for all keys, not for the
    windows.

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
    distance = _distances(center, query, key)
    seen = distance.detach().abs() <= width
    added = None  # to the scores
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        hidden = attn_mask == -math.inf
        seen, added = seen & ~hidden, attn_mask.to(distance.dtype).masked_fill(hidden, 0)
    options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
    options |= {"generator": generator, "seed": seed}
    if sigma == math.inf:
        mask = seen if added is None else added.masked_fill(~seen, -math.inf)
        return scaled_dot_product_attention(query, key, value, mask, **options)
    # With width 0 the window holds the centre itself or nothing: no Gaussian is needed, and none divides by 0.
    exponent = distance.square() * (0.5 / sigma**2 if sigma > 0 else 0.0)
    apart = exponent.detach() > 0
    rest = exponent.masked_fill(~apart, 1).neg().expm1().neg().log()  # log(1 - exp(-exponent))
    parts = [-exponent if added is None else added - exponent, rest if added is None else added + rest]
    masks = [part.masked_fill(~shown, -math.inf) for part, shown in zip(parts, (seen, seen & apart), strict=True)]
    keys, values = torch.cat((key, key), -2), torch.cat((value, torch.zeros_like(value)), -2)
    return scaled_dot_product_attention(query, keys, values, torch.cat(masks, -1), **options)


def _distances(center: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """j - center_i, (..., Lq, Lk), with no more leading dimensions than center has."""
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
    columns = torch.arange(key.shape[-2], device=query.device, dtype=compute_dtype(query))
    return columns - center.to(columns.dtype)[..., None]
