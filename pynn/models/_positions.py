"""How a transformer knows where a token is: by what is added to tokens or scores, or by turning queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.rotary_embedding import rotary_embedding


class SinusoidalPositionalEncoding(nn.Module):
    """Adds sines and cosines of the position: sin(p / 10000^(2 i / width)) in channel 2 i, cos in 2 i + 1.

    Vaswani et al., "Attention is all you need", https://arxiv.org/abs/1706.03762, section 3.5. There are no parameters.

    Args:
        length: positions. width: channels, even.
    Shape:
        (B, L, width) to the same, L + start <= length.
    Raises:
        ValueError: an odd width, or a sequence longer than length.
    """

    table: Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"SinusoidalPositionalEncoding: expected an even width, got {width}")
        frequencies = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10_000.0) / width))
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
        table = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)  # (length, width)
        self.register_buffer("table", table.float(), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        _check_length(type(self).__name__, x, start, self.table)
        return x + self.table[start : start + x.shape[1]].to(x.dtype)


class LearnedPositionalEmbedding(nn.Embedding):
    """Adds a learned vector per position.

    Args:
        length: positions. width: channels.
    Shape:
        (B, L, width) to the same, L + start <= length.
    Raises:
        ValueError: a sequence longer than length.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__(length, width)

    def forward(self, input: Tensor, start: int = 0) -> Tensor:
        _check_length(type(self).__name__, input, start, self.weight)
        return input + self.weight[start : start + input.shape[1]]


def _check_length(owner: str, x: Tensor, start: int, table: Tensor) -> None:
    if x.dim() != 3 or x.shape[2] != table.shape[1] or start + x.shape[1] > table.shape[0]:
        raise ValueError(
            f"{owner}: expected x of shape (B, L, {table.shape[1]}) with start + L <= {table.shape[0]}, "
            f"got {tuple(x.shape)} with start {start}"
        )


class RotaryEmbedding(nn.Module):
    """Turns pairs of channels of queries and keys by angles that grow with the position.

    Channels i and i + D / 2 form a pair, turned by p / base^(2 i / D): the score of a query and a key then depends on
    the distance of their positions only. Su et al., "RoFormer", https://arxiv.org/abs/2104.09864.

    Args:
        head_width: D, even. base: of the wavelengths.
    Shape:
        (B, H, L, D) to the same.
    Raises:
        ValueError: an odd head_width.
    """

    frequencies: Tensor

    def __init__(self, head_width: int, base: float = 10_000.0) -> None:
        super().__init__()
        if head_width % 2:
            raise ValueError(f"RotaryEmbedding: expected an even head_width, got {head_width}")
        exponents = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
        self.register_buffer("frequencies", base**-exponents, persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        positions = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float32)
        angles = positions[:, None] * self.frequencies.float()  # (L, D / 2)
        return rotary_embedding(x, angles.cos(), angles.sin())


class RelativePositionBias(nn.Module):
    """A learned number per head and distance bucket, added to the scores of attention.

    Distances below half of the buckets have one each; above, buckets grow logarithmically up to max_distance. Raffel
    et al., "T5", https://arxiv.org/abs/1910.10683.

    Args:
        heads: H. buckets: number of buckets, half of them for each direction when bidirectional.
        max_distance: all distances from here on share the last bucket.
        bidirectional: keys after the query have buckets of their own; otherwise they count as distance 0.
    Shape:
        forward(queries, keys) gives (1, H, queries, keys); the last query is at the last key's position.
    """

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(buckets, heads)
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def buckets(self, distance: Tensor) -> Tensor:
        """The bucket of key position - query position, int64."""
        number = self.embedding.num_embeddings
        offset = torch.zeros_like(distance)
        if self.bidirectional:
            number //= 2
            offset = number * (distance > 0).long()
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = number // 2
        logarithm = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        large = (exact + (logarithm * (number - exact)).long()).clamp(max=number - 1)
        return offset + torch.where(distance < exact, distance, large)

    def forward(self, queries: int, keys: int) -> Tensor:
        device = self.embedding.weight.device
        query = torch.arange(keys - queries, keys, device=device)[:, None]
        bias = self.embedding(self.buckets(torch.arange(keys, device=device) - query))  # (Lq, Lk, H)
        return bias.permute(2, 0, 1).unsqueeze(0)
