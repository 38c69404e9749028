"""cosine_attention, local_attention and hard_attention against their formulas in torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, assert_agrees
from pynn import ops

SHAPES = ((8, 4, 256, 256, 64), (32, 1, 1, 512, 256))  # batch, heads, queries, keys, width
QUICK_SHAPES = ((2, 2, 33, 40, 16),)
TEMPERATURE, WIDTH = 10.0, 16


class Scorer(NamedTuple):
    """ours and formula take query, key, value and, where there are centres, those."""

    ours: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    centres: bool = False


def _cosine(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    return F.scaled_dot_product_attention(query, key, value, scale=TEMPERATURE)


def _local(query: Tensor, key: Tensor, value: Tensor, centre: Tensor) -> Tensor:
    distance = torch.arange(key.shape[-2]).to(query.dtype) - centre[..., None]
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(distance.abs() > WIDTH, -torch.inf)
    return scores.softmax(-1) * torch.exp(-distance.square() * (2 / WIDTH**2)) @ value


def _hard(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One-hot weights whose gradient is the softmax's."""
    soft = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    one_hot = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
    return (one_hot - soft.detach() + soft) @ value


SCORERS = {
    "cosine_attention": Scorer(lambda q, k, v: ops.cosine_attention(q, k, v, temperature=TEMPERATURE), _cosine),
    "local_attention": Scorer(lambda q, k, v, c: ops.local_attention(q, k, v, c, width=WIDTH), _local, centres=True),
    "hard_attention": Scorer(ops.hard_attention, _hard),
}


def cases(quick: bool = False) -> Iterator[Case]:
    for name, scorer in SCORERS.items():
        for shape in QUICK_SHAPES if quick else SHAPES:
            for mode in ("forward", "forward+backward"):
                yield _case(name, scorer, shape, mode)


def _case(name: str, scorer: Scorer, shape: tuple[int, ...], mode: str) -> Case:
    batch, heads, queries, keys, width = shape
    backward = mode == "forward+backward"
    sizes = ((batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, width))
    leaves = [torch.randn(size) for size in sizes]
    if scorer.centres:
        leaves.append(torch.rand(batch, heads, queries) * (keys - 1))
    leaves = [t.requires_grad_(backward) for t in leaves]
    grad = torch.randn(sizes[0])

    def call(attention: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        out = attention(*tensors)
        return (out.detach(), *torch.autograd.grad(out, tensors, grad)) if backward else (out,)

    def check():
        wide = [t.detach().double().requires_grad_(backward) for t in leaves]
        truths, peers = call(scorer.formula, wide, grad.double()), call(scorer.formula, leaves, grad)
        for got, truth, peer in zip(call(scorer.ours, leaves, grad), truths, peers, strict=True):
            assert_agrees(got, truth, torch.float32, name, peer)

    return Case(
        name,
        "x".join(map(str, shape)),
        "float32",
        mode,
        {
            "pynn": lambda: call(scorer.ours, leaves, grad),
            "torch": lambda: call(scorer.formula, leaves, grad),
        },
        check,
        flops=4.0 * batch * heads * queries * keys * width * (3 if backward else 1),
    )
