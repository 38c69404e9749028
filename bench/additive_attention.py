"""additive_attention against torch's formula, which makes a tensor of all (Lq, Lk, D) tangents."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.harness import Case, assert_agrees
from pynn.ops import additive_attention

SHAPES = [(8, 1, 64, 64, 128), (32, 1, 32, 48, 256), (64, 1, 13, 12, 128)]  # batch, heads, queries, keys, width
STEP = (32, 1, 1, 48, 256)  # a decoder that asks for one output after the other


def formula(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    scores = (query[..., :, None, :] + key[..., None, :, :]).tanh() @ weight
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


def cases(quick: bool = False) -> Iterator[Case]:
    for shape in SHAPES[2:] if quick else SHAPES:
        for mode in ("forward", "forward+backward"):
            yield _case(shape, torch.float32, mode)
    if quick:
        return
    yield _case(STEP, torch.float32, "forward")
    yield _case(SHAPES[1], torch.float32, "forward+backward", padded=True)
    yield _case(SHAPES[1], torch.bfloat16, "forward+backward")


def _case(shape: tuple[int, ...], dtype: torch.dtype, mode: str, padded: bool = False) -> Case:
    batch, heads, queries, keys, width = shape
    backward = mode == "forward+backward"
    shapes = ((batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, width), (width,))
    operands = [torch.randn(s).to(dtype) for s in shapes]
    operands[3] *= width**-0.5
    leaves = [t.requires_grad_(backward) for t in operands]
    grad = torch.randn(shapes[0]).to(dtype)
    mask = (torch.arange(keys) < keys // 2).expand(batch, 1, 1, keys) if padded else None

    def call(attention, tensors, grad):
        out = attention(*tensors, mask)
        return (out.detach(), *torch.autograd.grad(out, tensors, grad)) if backward else (out,)

    def check():
        exact = call(formula, [t.detach().double().requires_grad_(backward) for t in leaves], grad.double())
        peer = call(formula, leaves, grad)
        for got, truth, theirs in zip(call(additive_attention, leaves, grad), exact, peer, strict=True):
            assert_agrees(got, truth, dtype, "additive_attention", theirs)

    terms = batch * heads * queries * keys * width // (2 if padded else 1)
    return Case(
        "additive_attention",
        "x".join(map(str, shape)) + (" half padded" if padded else ""),
        str(dtype).removeprefix("torch."),
        mode,
        {
            "pynn": lambda: call(additive_attention, leaves, grad),
            "torch": lambda: call(formula, leaves, grad),
        },
        check,
        flops=5.0 * terms * (2.5 if backward else 1),  # a sum, a tangent counted as one, weight and value
    )
