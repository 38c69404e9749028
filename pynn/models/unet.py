"""UNet: the denoiser of an image diffusion model.

A pyramid of residual blocks, each told the timestep (and the class), with self-attention at the lower resolutions and
skip connections from the way down to the way up. Ho et al., "Denoising Diffusion Probabilistic Models",
https://arxiv.org/abs/2006.11239; dropping the class for guidance: Ho and Salimans, https://arxiv.org/abs/2207.12598.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._layers import PYNN_LAYERS, TORCH_LAYERS, Layers

__all__ = ["PYNN_LAYERS", "TORCH_LAYERS", "Layers", "UNet"]


def zero_init(module: nn.Module) -> nn.Module:
    """The module with all parameters at zero, so that a block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class TimeEmbedding(nn.Module):
    """(B,) timesteps to (B, time_dim): sines and cosines of `channels` / 2 frequencies, then a two-layer MLP."""

    frequencies: Tensor

    def __init__(self, channels: int, time_dim: int) -> None:
        super().__init__()
        half = channels // 2
        frequencies = torch.exp(-math.log(10_000.0) / half * torch.arange(half, dtype=torch.float32))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.linear1 = nn.Linear(2 * half, time_dim)
        self.linear2 = nn.Linear(time_dim, time_dim)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, channels)
        return self.linear2(F.silu(self.linear1(waves.to(self.linear1.weight.dtype))))


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + time))), with a 1x1 convolution on x where the channels change."""

    def __init__(
        self, in_channels: int, out_channels: int, time_dim: int, groups: int, dropout: float, layers: Layers
    ) -> None:
        super().__init__()
        self.norm1 = layers.GroupNorm(groups, in_channels, activation="silu")
        self.conv1 = layers.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, out_channels)
        self.norm2 = layers.GroupNorm(groups, out_channels, activation="silu")
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.conv2 = zero_init(layers.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else layers.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        time = self.time(embedding)[:, :, None, None].expand(-1, -1, *x.shape[2:])  # (B, C, H, W), no memory
        h = self.conv1(self.norm1(x), residual=time)
        return self.conv2(self.dropout(self.norm2(h)), residual=self.skip(x))


class SelfAttention(nn.Module):
    """x + projection(attention(norm(x))) over all pixels."""

    def __init__(self, channels: int, num_heads: int, groups: int, layers: Layers) -> None:
        super().__init__()
        if channels % num_heads != 0:
            raise ValueError(f"UNet: expected channels ({channels}) to be divisible by num_heads ({num_heads})")
        self.num_heads = num_heads
        self.attention = layers.attention
        self.norm = layers.GroupNorm(groups, channels)
        self.qkv = layers.Conv2d(channels, 3 * channels, 1)
        self.projection = zero_init(layers.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)  # (B, L, 3C), a view of channels_last
        qkv = qkv.unflatten(2, (3, self.num_heads, -1))  # (B, L, 3, H, D)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, L, D)
        out = self.attention(query, key, value)
        out = out.transpose(2, 3).reshape(x.shape)  # (B, C, height, width)
        return self.projection(out, residual=x)


class Stage(nn.Module):
    """A residual block and, where the resolution is low enough, self-attention."""

    def __init__(self, block: ResidualBlock, attention: SelfAttention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """A UNet that predicts an image from a noisy image, its timestep and optionally its class.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the prediction; None for in_channels.
        channels: width of the first level, a multiple of `groups`.
        channel_multipliers: width of each level over `channels`; a level has half the resolution of the one before.
        blocks_per_level: residual blocks per level, on the way down and again on the way up.
        attention_levels: the levels with self-attention. The bottom of the pyramid has it where its level has.
        num_heads: heads of the self-attention.
        num_classes: classes of a conditional model; index num_classes means "no class".
        dropout: probability inside the residual blocks.
        groups: groups of every GroupNorm.
        time_dim: width of the embedding of time and class; None for 4 * channels.
        layers: where the blocks come from, PYNN_LAYERS or TORCH_LAYERS; both have the same state_dict.
    Raises:
        ValueError: an attention level that does not exist, or widths that heads or groups do not divide.
    """

    # Activations are kept in this order inside the model.
    memory_format = torch.channels_last

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        channels: int = 32,
        channel_multipliers: Sequence[int] = (1, 2),
        blocks_per_level: int = 1,
        attention_levels: Sequence[int] = (1,),
        num_heads: int = 4,
        num_classes: int | None = None,
        dropout: float = 0.0,
        groups: int = 8,
        time_dim: int | None = None,
        layers: Layers = PYNN_LAYERS,
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in channel_multipliers]
        if not widths or blocks_per_level < 1:
            raise ValueError("UNet: expected at least one level and one block per level")
        if not set(attention_levels) <= set(range(len(widths))):
            raise ValueError(f"UNet: expected attention_levels below {len(widths)}, got {tuple(attention_levels)}")
        time_dim = 4 * channels if time_dim is None else time_dim
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.divisor = 2 ** (len(widths) - 1)

        def stage(level: int, before: int) -> Stage:
            block = ResidualBlock(before, widths[level], time_dim, groups, dropout, layers)
            attend = level in attention_levels
            return Stage(block, SelfAttention(widths[level], num_heads, groups, layers) if attend else None)

        self.time_embedding = TimeEmbedding(channels, time_dim)
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, time_dim)
        self.conv_in = layers.Conv2d(in_channels, channels, 3, padding=1)

        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        width = channels
        for level, level_width in enumerate(widths):
            if level > 0:
                self.downsample.append(layers.Conv2d(width, width, 3, stride=2, padding=1))
            for _ in range(blocks_per_level):
                self.down.append(stage(level, width))
                width = level_width

        self.middle = stage(len(widths) - 1, width)

        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(blocks_per_level):
                self.up.append(stage(level, width + widths[level]))
                width = widths[level]
            if level > 0:
                self.upsample.append(layers.Conv2d(width, width, 3, padding=1))

        self.norm_out = layers.GroupNorm(groups, width, activation="silu")
        self.conv_out = zero_init(layers.Conv2d(width, out_channels or in_channels, 3, padding=1))
        self.blocks_per_level = blocks_per_level

    def _check(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"UNet: expected x of shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if x.shape[2] % self.divisor or x.shape[3] % self.divisor:
            size = f"{x.shape[2]}x{x.shape[3]}"
            raise ValueError(f"UNet: expected height and width to be divisible by {self.divisor}, got {size}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"UNet: expected t of shape ({x.shape[0]},), got {tuple(t.shape)}")
        if class_labels is not None and self.num_classes is None:
            raise ValueError("UNet: got class_labels, but the model was built without num_classes")
        if class_labels is not None and class_labels.shape != t.shape:
            raise ValueError(f"UNet: expected class_labels of shape {tuple(t.shape)}, got {tuple(class_labels.shape)}")

    def embed(self, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """The (B, time_dim) embedding of time and class that every residual block reads."""
        embedding = self.time_embedding(t)
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full_like(t, self.class_embedding.num_embeddings - 1, dtype=torch.long)
            embedding = embedding + self.class_embedding(class_labels)
        return F.silu(embedding)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The prediction for noisy images.

        Args:
            x: (B, in_channels, H, W), H and W divisible by 2 ** (levels - 1).
            t: (B,) timesteps, integer or floating.
            class_labels: (B,) int64 in [0, num_classes], num_classes for "no class"; None for no class at all.
        Returns:
            (B, out_channels, H, W).
        Raises:
            ValueError: shapes do not fit.
        """
        self._check(x, t, class_labels)
        embedding = self.embed(t, class_labels)
        h = self.conv_in(x.to(memory_format=self.memory_format))  # to() sets the strides of one-channel images too

        skips = []
        for i, stage in enumerate(self.down):
            if i > 0 and i % self.blocks_per_level == 0:
                h = self.downsample[i // self.blocks_per_level - 1](h)
            h = stage(h, embedding)
            skips.append(h)

        h = self.middle(h, embedding)

        for i, stage in enumerate(self.up):
            if i > 0 and i % self.blocks_per_level == 0:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
                h = self.upsample[i // self.blocks_per_level - 1](h)
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding)

        return self.conv_out(self.norm_out(h))
