"""The options that the ops of attention share, checked, as the dispatcher ops take them."""

from __future__ import annotations

import math

from torch import Tensor

from ._function import compute_dtype


def scores_options(
    name: str,
    window: tuple[int, int] | None,
    alignment: str,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    width: int,
) -> tuple[int, int, bool, float, float]:
    """left, right, lower_right, scale and softcap of the ops, for heads of `width` channels.

    Raises:
        ValueError: window, alignment or softcap is none of its values. name: the op, for the message.
    """
    if window is not None and (len(window) != 2 or not all(isinstance(n, int) and n >= -1 for n in window)):
        raise ValueError(f"{name}: expected window to be two integers from -1 on, got {window!r}")
    left, right = (-1, -1) if window is None else window
    if alignment not in ("upper_left", "lower_right"):
        raise ValueError(f'{name}: expected alignment to be "upper_left" or "lower_right", got {alignment!r}')
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}: expected softcap to be above 0 and finite, got {softcap}")
    scale = 1 / math.sqrt(max(width, 1)) if scale is None else scale
    return left, 0 if is_causal else right, alignment == "lower_right", float(scale), float(softcap or 0)


def per_head(
    name: str, alibi_slopes: Tensor | None, sinks: Tensor | None, query: Tensor, heads: tuple[int, ...]
) -> tuple[Tensor | None, ...]:
    """alibi_slopes and sinks of the shape `heads`, in the precision of sums over `query`.

    Raises:
        RuntimeError: they do not broadcast to that shape, or alibi_slopes require a gradient.
    """
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise RuntimeError(f"{name}: alibi_slopes have no gradient, expected them not to require one")
    numbers: list[Tensor | None] = []
    for what, given in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        try:
            numbers.append(None if given is None else given.to(compute_dtype(query)).expand(heads))
        except RuntimeError:
            shapes = f"{tuple(heads)} of query, got {tuple(given.shape)}"  # type: ignore[union-attr]
            raise RuntimeError(f"{name}: expected {what} that broadcast to the heads {shapes}") from None
    return tuple(numbers)


def check_causal(name: str, is_causal: bool, attn_mask: Tensor | None) -> None:
    """torch's rule, in torch's words.

    Raises:
        RuntimeError: both are given.
    """
    if is_causal and attn_mask is not None:
        raise RuntimeError(f"_{name}: Explicit attn_mask should not be set when is_causal=True")
