"""Tokens drawn one by one from a model's logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def extend(
    ids: Tensor,
    steps: int,
    logits: Callable[[Tensor], Tensor],
    pick: Callable[[Tensor], Tensor],
    stop_token: int | None,
) -> Tensor:
    """Up to `steps` more tokens for each row.

    Args:
        ids: (B, L) int64, L >= 1. logits: (B, n) tokens that it has not seen to those of the next one, (B, V).
        pick: (B, V) logits to (B,) tokens. stop_token: ends a row, which is filled up with it; all stop together.
    Returns:
        (B, L + n), n <= steps.
    """
    new, ended = ids, torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    for _ in range(steps):
        token = pick(logits(new))
        if stop_token is not None:
            token = token.masked_fill(ended, stop_token)
            ended |= token == stop_token
        new = token[:, None].to(ids.dtype)
        ids = torch.cat([ids, new], dim=1)
        if stop_token is not None and ended.all():
            break
    return ids


def sampler(
    function: str, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Callable[[Tensor], Tensor]:
    """(B, V) logits to (B,) tokens; see GPT.generate."""
    if temperature < 0:
        raise ValueError(f"{function}: expected temperature >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{function}: expected top_k >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{function}: expected top_p in (0, 1], got {top_p}")

    def pick(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        logits, tokens = (logits.float() / temperature).sort(descending=True)
        if top_k is not None:
            logits = logits[:, :top_k]
        probabilities = logits.softmax(-1)
        if top_p is not None:  # a token stays when those before it do not reach p; the first always does
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= top_p, 0.0)
        return tokens.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)

    return pick
