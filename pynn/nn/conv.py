"""Convolution layers with torch.nn's constructors, parameters, initialisation and errors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..ops.conv2d import ACTIVATIONS, conv2d


class Conv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d computed by pynn.ops.conv2d, with an optional fused activation and residual.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in torch.nn.Conv2d; the weights drawn for a seed are the same too.
        activation: applied to the output in the same pass, one of pynn.ops.conv2d's.
    Raises:
        ValueError: torch.nn's errors, or an unknown activation.
    """

    def __init__(self, *args, activation: str | None = None, **kwargs):
        if activation not in ACTIVATIONS:
            raise ValueError(f"Conv2d: expected activation to be one of {ACTIVATIONS}, got {activation!r}")
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """activation(conv(input) + bias + residual).

        Args:
            input: (N, C, H, W) or (C, H, W). residual: broadcastable to the output.
        """
        padding: int | str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            residual=residual,
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation}"
