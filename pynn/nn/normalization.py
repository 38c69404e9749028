"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.group_norm import group_norm


class GroupNorm(torch.nn.GroupNorm):
    """torch.nn.GroupNorm, optionally followed by an activation in the same pass.

    Args:
        num_groups, num_channels, eps, affine, device, dtype, bias: as torch.nn.GroupNorm's.
        activation: None, or "silu".
    Shape:
        input (N, C, ...) to output (N, C, ...).
    Raises:
        ValueError: num_channels is not a multiple of num_groups, or activation is unknown.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        if activation not in (None, "silu"):
            raise ValueError(f'GroupNorm: expected activation to be None or "silu", got {activation!r}')
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation}"
        return f"{super().extra_repr()}{activation}"
