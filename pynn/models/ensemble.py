"""Ensemble: several classifiers as one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Ensemble(nn.Module):
    """The mean of the members' probabilities, or the shares of their votes (Hansen and Salamon 1990).

    Args:
        models: modules of the same input, each giving logits (B, C). vote: "mean" or "majority".
    Shape:
        whatever the members take, to probabilities (B, C).
    Raises:
        ValueError: no members, or an unknown vote.
    """

    def __init__(self, models: Iterable[nn.Module], vote: str = "mean") -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        if not len(self.models):
            raise ValueError("Ensemble: expected at least one model")
        if vote not in ("mean", "majority"):
            raise ValueError(f"Ensemble: expected vote to be 'mean' or 'majority', got {vote!r}")
        self.vote = vote

    def logits(self, *inputs: Tensor) -> Tensor:
        """Logits of each member, (members, B, C)."""
        return torch.stack([model(*inputs) for model in self.models])

    def forward(self, *inputs: Tensor) -> Tensor:
        logits = self.logits(*inputs)
        if self.vote == "mean":
            return logits.softmax(-1).mean(0)
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype).mean(0)
