"""GroupNorm, alone and with a SiLU, in both memory formats; on a GPU with a SiLU, in shapes of diffusion U-Nets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench import _gpu
from bench.harness import Case, assert_agrees
from pynn.ops import group_norm

SHAPES = tuple((64, channels, size, size) for channels in (32, 64, 128) for size in (4, 8, 28))
QUICK_SHAPES = ((64, 32, 8, 8), (64, 64, 28, 28))
GPU_SHAPES = ((64, 128, 32, 32), (64, 512, 16, 16), (16, 320, 64, 64), (4, 128, 256, 256))
GPU = "cuda"
GROUPS = 8
FORMATS = {"": torch.contiguous_format, " channels_last": torch.channels_last}


def cases(quick: bool = False) -> Iterator[Case]:
    for shape in QUICK_SHAPES if quick else SHAPES:
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            for activation in (None, "silu"):
                yield from _cases(shape, dtype, activation)


def gpu_cases(quick: bool = False) -> Iterator[Case]:
    for shape in GPU_SHAPES[:1] if quick else GPU_SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.compiler.reset()  # every case is compiled for its own shape
            yield from _cases(shape, dtype, "silu", on_gpu=True)


def _cases(shape: tuple[int, ...], dtype: torch.dtype, activation: str | None, on_gpu: bool = False) -> Iterator[Case]:
    device = GPU if on_gpu else "cpu"
    weight, bias = (torch.randn(shape[1], device=device).to(dtype).requires_grad_() for _ in range(2))
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))

    def ours(x, weight, bias):
        return group_norm(x, GROUPS, weight, bias, activation=activation)

    def eager(x, weight, bias):
        y = F.group_norm(x, GROUPS, weight, bias)
        return y if activation is None else F.silu(y)

    def forward(fn, leaf, grad):
        with torch.no_grad():
            return fn(leaf, weight, bias)

    def train(fn, leaf, grad):
        return torch.autograd.grad(fn(leaf, weight, bias), (leaf, weight, bias), grad)

    backends = _gpu.backends_with("group_norm_fwd") if on_gpu else ["cpu"]
    others: dict[str, Callable] = {"torch": eager}
    if on_gpu:
        others["torch compile"] = torch.compile(eager, dynamic=False)

    def providers(run):
        result = {}
        for suffix, memory_format in FORMATS.items():
            leaf = x.contiguous(memory_format=memory_format).requires_grad_()
            laid_out = grad.contiguous(memory_format=memory_format)
            for backend in backends:  # around the backward too
                name = f"pynn {backend}" if on_gpu else "pynn"
                result[name + suffix] = functools.partial(_gpu.on, backend, run, ours, leaf, laid_out)
            for name, fn in others.items():
                result[name + suffix] = functools.partial(run, fn, leaf, laid_out)
        return result

    def check():
        leaf = x.clone().requires_grad_()
        wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        truth = torch.autograd.grad(eager(*wide), wide, grad.double())
        for backend in backends:
            for got, want in zip(_gpu.on(backend, train, ours, leaf, grad), truth, strict=True):
                assert_agrees(got, want, dtype, f"group_norm, {backend}")

    described = {
        "op": "group_norm" + (f" + {activation}" if activation else ""),
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "check": check,
        "device": "cuda" if on_gpu else "cpu",
    }
    size = x.numel() * x.element_size()
    yield Case(mode="forward", providers=providers(forward), bytes=2 * size, **described)
    yield Case(mode="forward+backward", providers=providers(train), bytes=5 * size, **described)
