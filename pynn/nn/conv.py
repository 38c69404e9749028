"""Convolution layers with torch.nn's constructors, parameters, initialisation and errors."""

from __future__ import annotations

from typing import Any

import torch

from ..ops._conv2d_activation import check_activation
from ..ops.conv2d import conv2d
from ..ops.conv_transpose2d import conv_transpose2d


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
        check_activation("Conv2d", activation)
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """activation(conv(input) + bias + residual).

        Args:
            input: (N, C, H, W) or (C, H, W). residual: broadcastable to the output.
        """
        return conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            padding_mode=self.padding_mode,
            activation=self.activation,
            residual=residual,
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation}"


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d computed by pynn.ops.conv_transpose2d, with an optional fused activation and residual.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode,
            device, dtype: as in torch.nn.ConvTranspose2d; the weights drawn for a seed are the same too.
        activation: applied to the output in the same pass, one of pynn.ops.conv2d's.
    Raises:
        ValueError: torch.nn's errors, or an unknown activation.
    """

    def __init__(self, *args, activation: str | None = None, **kwargs):
        check_activation("ConvTranspose2d", activation)
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(
        self, input: torch.Tensor, output_size: list[int] | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """activation(transposed conv(input) + bias + residual).

        Args:
            input: (N, C, H, W) or (C, H, W). output_size: as in torch.nn. residual: broadcastable to the output.
        """
        if self.padding_mode != "zeros":
            raise ValueError("Only `zeros` padding mode is supported for ConvTranspose2d")
        layer: Any = self  # torch.nn declares wider types than its constructor leaves
        output_padding = layer._output_padding(
            input, output_size, layer.stride, layer.padding, layer.kernel_size, 2, layer.dilation
        )
        return conv_transpose2d(
            input,
            self.weight,
            self.bias,
            layer.stride,
            layer.padding,
            output_padding,
            self.groups,
            self.dilation,
            activation=self.activation,
            residual=residual,
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation}"
