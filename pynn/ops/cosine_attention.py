"""cosine_attention: scaled_dot_product_attention of directions, softmax(temperature cos(Q, K) + mask) V."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._function import autocast, call, compute_dtype, eager
from .scaled_dot_product_attention import scaled_dot_product_attention

_NAME = "cosine_attention"
_SHORTEST = 1e-12  # of a vector that has a direction, as in torch.nn.functional.normalize


@eager
class Direction(torch.autograd.Function):
    """(x, length) -> (x with this norm, the norm it had); NaN where that is not finite, and then without a gradient.

    One formula instead of those of norm, quotient and product: x is read and written half as often."""

    @staticmethod
    def forward(x, length):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * (length / norm.clamp_min(_SHORTEST)).masked_fill(~norm.isfinite(), torch.nan), norm

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, length = inputs
        ctx.number = None if isinstance(length, Tensor) else length
        ctx.save_for_backward(x, length if ctx.number is None else None, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, grad_norm):
        x, length, norm = ctx.saved_tensors
        length, of_length = (length, ctx.needs_input_grad[1]) if ctx.number is None else (ctx.number, False)
        grad = torch.zeros_like(x) if grad is None else grad
        finite, safe = norm.isfinite(), norm.clamp_min(_SHORTEST)
        to_factor = (grad * x).sum(-1, keepdim=True).masked_fill(~finite, 0)
        factor = length / safe
        to_norm = (-to_factor * factor / safe).masked_fill(norm < _SHORTEST, 0)
        if grad_norm is not None:
            to_norm = to_norm + grad_norm
        # A 0 that comes back for a masked key stays 0, whatever its norm.
        to_x = torch.addcmul(grad * factor, to_norm / safe, x).masked_fill(~finite, 0)
        return to_x, (to_factor / safe).sum_to_size(length.shape) if of_length else None

    @staticmethod
    def vmap(info, in_dims, x, length):
        rank = x.dim() + (in_dims[0] is None)
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        if isinstance(length, Tensor) and in_dims[1] is not None:
            length = length.movedim(in_dims[1], 0)
            length = length.reshape(len(length), *(1,) * (rank - length.dim()), *length.shape[1:])
        return call(Direction, x, length), (0, 0)


def _direction(x: Tensor, length: Tensor | float = 1.0) -> Tensor:
    """x with this norm, in its dtype."""
    return call(Direction, x.to(compute_dtype(x)), length)[0].to(x.dtype)


def cosine_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    temperature: Tensor | float = 1.0,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Attention by angles: softmax(temperature q . k / (|q| |k|) + mask) value.

    The content addressing of Neural Turing Machines with key strength beta = temperature (Graves et al. 2014, arXiv
    1410.5401), and the scaled cosine attention of Swin Transformer V2 with temperature 1 / tau (Liu et al. 2022, arXiv
    2111.09883). The scores are temperature at most: choose it well above 1, or learn it.

    query and key are normalised in float32 (float64), then all is scaled_dot_product_attention. A vector shorter than
    1e-12 has no direction, its cosines are about 0; one whose norm is not finite gives NaN where it is not masked.

    Args:
        query: (..., H, Lq, D) float64, float32, float16 or bfloat16.
        key: (..., H, Lk, D), or (..., Hk, Lk, D) with enable_gqa. value: (..., H, Lk, Dv), or (..., Hk, Lk, Dv).
        attn_mask: broadcastable to (..., H, Lq, Lk): bool (True takes part) or float (added to the scores).
        temperature: a number, or a tensor broadcastable to (..., H, Lq, 1), with its gradient: (H, 1, 1) for one per
            head, (..., Lq, 1) for one per query.
        options: of scaled_dot_product_attention, but scale: dropout_p, is_causal, window, sinks, return_lse and so on.
    Returns:
        What scaled_dot_product_attention returns: (..., H, Lq, Dv), dtype of query, and what options ask for.
    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
        TypeError: options have a scale.
    """
    if "scale" in options:
        raise TypeError(f"{_NAME}: expected temperature in place of scale")
    query, key, value = autocast(query, key, value)
    if isinstance(temperature, Tensor):
        temperature = _checked_temperature(temperature, query)
    return scaled_dot_product_attention(
        _direction(query, temperature), _direction(key), value, attn_mask, scale=1.0, **options
    )


def _checked_temperature(temperature: Tensor, query: Tensor) -> Tensor:
    """In the dtype that norms have; it must not make query larger."""
    expected = (*query.shape[:-1], 1)
    lead = len(expected) - temperature.dim()
    fits = lead >= 0 and all(
        size in (1, whole) for size, whole in zip(temperature.shape, expected[max(lead, 0) :], strict=False)
    )
    if not fits:
        raise RuntimeError(
            f"{_NAME}: expected temperature that broadcasts to {list(expected)}, got {list(temperature.shape)}"
        )
    if temperature.device != query.device and temperature.dim() > 0:
        raise RuntimeError(f"{_NAME}: expected temperature and query to be on the same device")
    return temperature.to(compute_dtype(query))
