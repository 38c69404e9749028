"""GroupNorm, alone and with a SiLU, in both memory formats. "torch" is its faster format at these sizes, contiguous."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.harness import Case, assert_agrees
from pynn.ops import group_norm

SHAPES = tuple((64, channels, size, size) for channels in (32, 64, 128) for size in (4, 8, 28))
QUICK_SHAPES = ((64, 32, 8, 8), (64, 64, 28, 28))
GROUPS = 8
FORMATS = {"": torch.contiguous_format, " channels_last": torch.channels_last}


def cases(quick: bool = False) -> Iterator[Case]:
    for shape in QUICK_SHAPES if quick else SHAPES:
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            for activation in (None, "silu"):
                yield from _cases(shape, dtype, activation)


def _cases(shape: tuple[int, ...], dtype: torch.dtype, activation: str | None) -> Iterator[Case]:
    weight, bias = (torch.randn(shape[1]).to(dtype).requires_grad_() for _ in range(2))
    x, grad = (torch.randn(shape).to(dtype) for _ in range(2))

    def ours(x):
        return group_norm(x, GROUPS, weight, bias, activation=activation)

    def eager(x):
        y = F.group_norm(x, GROUPS, weight, bias)
        return y if activation is None else F.silu(y)

    def forward(fn, leaf):
        with torch.no_grad():
            return fn(leaf)

    def train(fn, leaf, grad):
        return torch.autograd.grad(fn(leaf), (leaf, weight, bias), grad)

    def providers(run):
        result = {}
        for suffix, memory_format in FORMATS.items():
            leaf = x.contiguous(memory_format=memory_format).requires_grad_()
            laid_out = grad.contiguous(memory_format=memory_format)
            for name, fn in (("pynn", ours), ("torch", eager)):
                result[name + suffix] = lambda fn=fn, leaf=leaf, laid_out=laid_out: run(fn, leaf, laid_out)
        return result

    def check():
        leaf = x.clone().requires_grad_()
        for got, expected in zip(train(ours, leaf, grad), train(eager, leaf, grad), strict=True):
            assert_agrees(got, expected, dtype, "group_norm")

    described = {
        "op": "group_norm" + (f" + {activation}" if activation else ""),
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "check": check,
    }
    size = x.numel() * x.element_size()
    yield Case(mode="forward", providers=providers(lambda fn, leaf, _: forward(fn, leaf)), bytes=2 * size, **described)
    yield Case(mode="forward+backward", providers=providers(train), bytes=5 * size, **described)
