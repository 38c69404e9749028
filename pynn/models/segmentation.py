"""SegmentationUNet: a class for every pixel, by a pyramid of convolutions down and up again with skip connections.

Ronneberger et al., "U-Net", https://arxiv.org/abs/1505.04597; padded, with batch normalisation and the parameter
names of milesial's Pytorch-UNet. The U-Net of the diffusion models, which also reads a timestep, is pynn.models.UNet.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn.conv import Conv2d, ConvTranspose2d
from .cnn import check_images

fx.wrap("check_images")  # here too: torch.fx looks for the name in this module

__all__ = ["SegmentationUNet"]


class _DoubleConv(nn.Module):
    """Twice: 3x3 convolution, batch normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, middle: int | None = None) -> None:
        super().__init__()
        middle = out_channels if middle is None else middle
        self.double_conv = nn.Sequential(
            Conv2d(in_channels, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            Conv2d(middle, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class _Down(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), _DoubleConv(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class _Up(nn.Module):
    """Doubles the resolution, joins the skip connection, convolves twice."""

    def __init__(self, in_channels: int, out_channels: int, bilinear: bool) -> None:
        super().__init__()
        self.up: nn.Module
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = _DoubleConv(in_channels, out_channels, in_channels // 2)
        else:
            self.up = ConvTranspose2d(in_channels, in_channels // 2, 2, stride=2)
            self.conv = _DoubleConv(in_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        height, width = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]  # 0, or 1 where a size was odd
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return self.conv(torch.cat([skip, x], dim=1))


class SegmentationUNet(nn.Module):
    """U-Net for segmentation, four levels down and up.

    Args:
        in_channels: channels of the image. classes: outputs per pixel.
        base: channels of the first level; each level below has twice as many.
        bilinear: upsampling by interpolation instead of transposed convolution; base must then be even.
    Shape:
        (B, in_channels, H, W), H and W at least 16, to logits (B, classes, H, W).
    Raises:
        ValueError: a number below 1, an odd base with bilinear, an input of another shape.
    """

    def __init__(self, in_channels: int, classes: int, base: int = 64, bilinear: bool = False) -> None:
        super().__init__()
        if min(in_channels, classes, base) < 1 or (bilinear and base % 2):
            raise ValueError(
                "SegmentationUNet: expected in_channels, classes and base >= 1, base even with bilinear, "
                f"got {in_channels}, {classes} and {base}"
            )
        self.in_channels = in_channels
        share = 2 if bilinear else 1  # interpolation keeps the channels, so the level below has half as many
        self.inc = _DoubleConv(in_channels, base)
        self.down1 = _Down(base, 2 * base)
        self.down2 = _Down(2 * base, 4 * base)
        self.down3 = _Down(4 * base, 8 * base)
        self.down4 = _Down(8 * base, 16 * base // share)
        self.up1 = _Up(16 * base, 8 * base // share, bilinear)
        self.up2 = _Up(8 * base, 4 * base // share, bilinear)
        self.up3 = _Up(4 * base, 2 * base // share, bilinear)
        self.up4 = _Up(2 * base, base, bilinear)
        self.outc = nn.Sequential(OrderedDict(conv=Conv2d(base, classes, 1)))

    def forward(self, x: Tensor) -> Tensor:
        check_images("SegmentationUNet", x, self.in_channels, at_least=16)
        level1 = self.inc(x)
        level2 = self.down1(level1)
        level3 = self.down2(level2)
        level4 = self.down3(level3)
        x = self.up1(self.down4(level4), level4)
        x = self.up2(x, level3)
        x = self.up3(x, level2)
        return self.outc(self.up4(x, level1))
