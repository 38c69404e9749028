"""Diffusion ops against the usual eager formulas (coefficients already gathered, noise from torch.randn)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import pynn
from bench.harness import Case, assert_agrees
from pynn.diffusion import Schedule

SHAPES = ((64, 1, 8, 8), (128, 3, 32, 32), (4, 3, 256, 256), (64, 3, 128, 128))
QUICK_SHAPES = ((64, 1, 8, 8), (4, 3, 256, 256))


def cases(quick: bool = False) -> Iterator[Case]:
    for shape in QUICK_SHAPES if quick else SHAPES:
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            yield from _cases(shape, dtype)


def _cases(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    schedule = Schedule.cosine(1000)
    x, output = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    t = torch.randint(1, 1000, shape[:1])
    forward, reverse, loss_table = schedule.forward_table, schedule.reverse_table("v"), schedule.loss_table("v")

    def column(values):
        return values.view(-1, *[1] * (len(shape) - 1)).to(dtype)

    signal, noise = (column(c.sqrt()) for c in forward[t + 1].unbind(1))
    p, q, c, d, sigma = (column(values) for values in reverse[t].unbind(1)[:5])
    n, size = x.numel(), x.element_size()
    described = {"shape": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}

    def eager_jump(z=None):
        return signal * x + noise * (torch.randn_like(x) if z is None else z)

    def eager_reverse(z=None):
        x0 = (p * x + q * output).clamp(-1, 1)
        return c * x0 + d * x + sigma * (torch.randn_like(x) if z is None else z)

    def eager_loss(z):
        return ((output - (signal * z - noise * x)) ** 2).mean()

    z = torch.randn(shape).to(dtype)
    leaf = output.detach().clone().requires_grad_()

    def check_jump():
        assert_agrees(pynn.ops.forward_jump(x, t, forward, noise=z), eager_jump(z), torch.bfloat16, "forward_jump")

    def check_reverse():
        got = pynn.ops.reverse_step(x, t, output, reverse, clip=1.0, noise=z)
        assert_agrees(got, eager_reverse(z), torch.bfloat16, "reverse_step")

    def check_loss():
        got = pynn.ops.diffusion_loss(output, x, t, loss_table, noise=z).mean()
        assert_agrees(got, eager_loss(z), torch.bfloat16, "diffusion_loss")

    def train(loss_of):
        (grad,) = torch.autograd.grad(loss_of(), leaf)
        return grad

    def fused():
        return pynn.ops.diffusion_loss(leaf, x, t, loss_table, seed=1).mean()

    def eager():
        return ((leaf - (signal * z - noise * x)) ** 2).mean()

    def fused_pair():
        pynn.ops.forward_jump(x, t, forward, seed=1)
        return fused()

    def eager_pair():
        drawn = torch.randn_like(x)
        eager_jump(drawn)
        return ((leaf - (signal * drawn - noise * x)) ** 2).mean()

    yield Case(
        "forward_jump",
        mode="forward",
        providers={"pynn": lambda: pynn.ops.forward_jump(x, t, forward, seed=1), "torch": eager_jump},
        check=check_jump,
        bytes=2 * n * size,
        **described,
    )
    yield Case(
        "reverse_step",
        mode="forward",
        providers={
            "pynn": lambda: pynn.ops.reverse_step(x, t, output, reverse, clip=1.0, seed=1),
            "torch": eager_reverse,
        },
        check=check_reverse,
        bytes=3 * n * size,
        **described,
    )
    yield Case(
        "diffusion_loss",
        mode="forward+backward",
        providers={"pynn": lambda: train(fused), "torch": lambda: train(eager)},
        check=check_loss,
        bytes=5 * n * size,
        **described,
    )
    yield Case(  # all that a training step does around the model; torch draws the noise once and keeps it
        "forward_jump + diffusion_loss",
        mode="forward+backward",
        providers={"pynn": lambda: train(fused_pair), "torch": lambda: train(eager_pair)},
        check=check_loss,
        bytes=7 * n * size,
        **described,
    )
