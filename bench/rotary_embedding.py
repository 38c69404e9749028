"""rotary_embedding against the same in torch's operations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import Case, assert_agrees
from pynn.ops import rotary_embedding

SHAPES = [(1, 8, 512, 64), (4, 8, 256, 32), (1, 32, 1024, 128)]  # batch, heads, tokens, head dim


def cases(quick: bool = False) -> Iterator[Case]:
    for shape in SHAPES[:1] if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for interleaved in (False, True):
                yield _case(*shape, dtype, interleaved)


def _case(batch, heads, tokens, dim, dtype, interleaved) -> Case:
    """Forward and backward of heads that are slices of a projection (N, L, H, D)."""
    x = torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2).requires_grad_()
    angles = torch.rand(tokens, dim // 2) * 9
    cos, sin = angles.cos(), angles.sin()
    grad = torch.randn(batch, heads, tokens, dim).to(dtype)

    def ours():
        output = rotary_embedding(x, cos, sin, interleaved=interleaved)
        return output, *torch.autograd.grad(output, x, grad)

    own_cos, own_sin = cos.to(dtype), sin.to(dtype)

    def theirs():
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        turned = (a * own_cos - b * own_sin, b * own_cos + a * own_sin)
        output = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        return output, *torch.autograd.grad(output, x, grad)

    def check():
        for got, expected in zip(ours(), theirs(), strict=True):
            assert_agrees(got, expected, dtype, "rotary_embedding")

    return Case(
        "rotary_embedding",
        f"{batch}x{heads}x{tokens}x{dim}" + (" interleaved" if interleaved else ""),
        str(dtype).removeprefix("torch."),
        "forward+backward",
        {"pynn": ours, "torch": theirs},
        check,
        bytes=4.0 * x.numel() * x.element_size(),
    )
