"""The building blocks a model is made of, from pynn or from torch.

Both sets hold the same parameters under the same names, so a model built from one loads the weights of the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.conv import Conv2d
from ..nn.normalization import GroupNorm
from ..ops.scaled_dot_product_attention import scaled_dot_product_attention


class _TorchConv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d with an addition after it."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = super().forward(input)
        return output if residual is None else output + residual


class _TorchGroupNorm(torch.nn.GroupNorm):
    """torch.nn.GroupNorm with a SiLU after it."""

    def __init__(self, num_groups: int, num_channels: int, activation: str | None = None) -> None:
        super().__init__(num_groups, num_channels)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output if self.activation is None else F.silu(output)


@dataclasses.dataclass(frozen=True)
class Layers:
    """What a model takes its blocks from.

    Args:
        Conv2d: torch.nn.Conv2d's arguments; called as module(input, residual=None).
        GroupNorm: (num_groups, num_channels, activation=None or "silu").
        attention: (query, key, value) of shape (B, H, L, D) to (B, H, L, D).
    """

    Conv2d: Callable[..., torch.nn.Module]
    GroupNorm: Callable[..., torch.nn.Module]
    attention: Callable[..., Tensor]


PYNN_LAYERS = Layers(Conv2d, GroupNorm, scaled_dot_product_attention)
TORCH_LAYERS = Layers(_TorchConv2d, _TorchGroupNorm, F.scaled_dot_product_attention)
