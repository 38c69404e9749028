"""ViT: a transformer on the patches of an image, with torchvision's parameter names."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..nn.conv import Conv2d
from ._transformer import Attention, activation_named


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = activation_named("ViT", name)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Block(nn.Module):
    """A pre-normalised block under torchvision's names; the same computation as TransformerBlock."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float, activation: str, eps: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.self_attention = Attention(width, heads, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(width, eps)
        first, last = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.mlp = nn.Sequential(first, _Activation(activation), nn.Dropout(dropout), last, nn.Dropout(dropout))
        for layer in (first, last):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attention(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))


class _Encoder(nn.Module):
    """Adds positions, runs the blocks, normalises."""

    def __init__(self, tokens: int, width: int, blocks: list[_Block], dropout: float, pre_norm: bool, eps: float):
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, tokens, width).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.ln_pre = nn.LayerNorm(width, eps) if pre_norm else None
        self.layers = nn.Sequential(OrderedDict((f"encoder_layer_{i}", block) for i, block in enumerate(blocks)))
        self.ln = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x + self.pos_embedding)
        return self.ln(self.layers(x if self.ln_pre is None else self.ln_pre(x)))


class ViT(nn.Module):
    """A vision transformer: non-overlapping patches as tokens, after a class token that the head reads.

    Dosovitskiy et al., https://arxiv.org/abs/2010.11929. The head starts at zero, as in torchvision. The image tower of
    CLIP is ViT(..., num_classes=None, pre_norm=True, patch_bias=False, activation="quick_gelu", eps=1e-5).

    Args:
        image_size, patch_size: a number, or (height, width); the patch divides the image.
        in_channels: channels of the image.
        num_classes: outputs; None for no head: the output is then the class token, (B, width).
        width, layers, heads: of the blocks. mlp_width: None for 4 width.
        dropout, activation, eps: see TransformerBlock.
        pre_norm: a normalisation before the blocks. patch_bias: a bias in the patch embedding.
    Shape:
        (B, in_channels, height, width) to logits (B, num_classes).
    Raises:
        ValueError: a patch that does not divide the image, heads that do not divide width, an input of another shape.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_channels: int = 3,
        num_classes: int | None = 1000,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_width: int | None = None,
        dropout: float = 0.0,
        activation: str = "gelu",
        eps: float = 1e-6,
        pre_norm: bool = False,
        patch_bias: bool = True,
    ) -> None:
        super().__init__()
        image = (image_size, image_size) if isinstance(image_size, int) else image_size
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if image[0] % patch[0] or image[1] % patch[1]:
            raise ValueError(f"ViT: expected patch_size to divide image_size, got {patch} and {image}")
        self.input_shape = (in_channels, *image)
        self.width = width
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.conv_proj = Conv2d(in_channels, width, patch, stride=patch, bias=patch_bias)
        mlp_width = 4 * width if mlp_width is None else mlp_width
        blocks = [_Block(width, heads, mlp_width, dropout, activation, eps) for _ in range(layers)]
        tokens = 1 + (image[0] // patch[0]) * (image[1] // patch[1])
        self.encoder = _Encoder(tokens, width, blocks, dropout, pre_norm, eps)
        self.heads = nn.Sequential()
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (in_channels * patch[0] * patch[1])))
        if self.conv_proj.bias is not None:
            nn.init.zeros_(self.conv_proj.bias)
        if num_classes is not None:
            head = nn.Linear(width, num_classes)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.heads.add_module("head", head)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1:] != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(f"ViT: expected x of shape (B, {expected}), got {tuple(x.shape)}")
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)  # (B, L, width)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], dim=1)
        return self.heads(self.encoder(tokens)[:, 0])
