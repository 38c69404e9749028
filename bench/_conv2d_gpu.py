"""conv2d on a GPU, bfloat16 and channels last: fused layers against the chain of torch's ops and torch.compile, and the
bare convolution against cuDNN, backend by backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench import _gpu
from bench.harness import Case, assert_agrees
from pynn.ops import conv2d

GPU = "cuda"
DTYPE = torch.bfloat16


class Layer(NamedTuple):
    """A convolution and what follows it in a network; size is the input's."""

    batch: int
    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1
    activation: str | None = None
    residual: bool = False

    def __str__(self) -> str:
        groups = f" g{self.groups}" if self.groups > 1 else ""
        image = f"{self.batch}x{self.channels}x{self.size}x{self.size}"
        return f"{image}->{self.outputs} k{self.kernel}s{self.stride}{groups}"


# Layers of networks as they are: ResNet-50, diffusion U-Nets, stems, heads, ConvNeXt, ResNeXt, MobileNet.
FUSED = (
    Layer(64, 64, 256, 56, 1, activation="relu", residual=True),
    Layer(8, 64, 64, 256, 3, activation="silu", residual=True),
    Layer(16, 128, 128, 64, 3, activation="silu", residual=True),
    Layer(4, 256, 256, 32, 3, activation="silu"),
    Layer(64, 128, 128, 28, 3, activation="relu"),
    Layer(64, 3, 64, 224, 7, 2, activation="relu"),
    Layer(16, 64, 3, 128, 3),
    Layer(64, 96, 96, 56, 7, groups=96),
    Layer(64, 192, 192, 28, 3, groups=192, activation="silu"),
    Layer(64, 128, 128, 28, 3, groups=32, activation="relu"),
)
BARE = (
    Layer(64, 64, 64, 56, 3),
    Layer(64, 256, 256, 14, 3),
    Layer(64, 512, 512, 7, 3),
    Layer(64, 1024, 256, 14, 1),
    Layer(64, 256, 512, 56, 1, 2),
    Layer(16, 128, 128, 64, 3),
)


def cases(quick: bool = False) -> Iterator[Case]:
    for layer in FUSED[:2] if quick else FUSED:
        torch.compiler.reset()  # every case is compiled for its own shape
        yield _case(layer, "conv2d fused", "forward", compiled=True)
    for layer in BARE[:1] if quick else BARE:
        yield _case(layer, "conv2d", "forward")
    for layer in (*FUSED[:2], *BARE[:1]) if quick else (*FUSED, *BARE):
        yield _case(layer, "conv2d fused" if layer in FUSED else "conv2d", "forward+backward")


def _case(layer: Layer, op: str, mode: str, compiled: bool = False) -> Case:
    def made(*shape):
        return torch.randn(shape, device=GPU).to(DTYPE).to(memory_format=torch.channels_last).requires_grad_()

    out = (layer.size + 2 * (layer.kernel // 2) - layer.kernel) // layer.stride + 1
    x = made(layer.batch, layer.channels, layer.size, layer.size)
    weight = made(layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel)
    grad = made(layer.batch, layer.outputs, out, out).detach()
    bias = torch.randn(layer.outputs, device=GPU).to(DTYPE).requires_grad_() if op == "conv2d fused" else None
    residual = torch.randn_like(grad).requires_grad_() if layer.residual else None
    operands = [t for t in (x, weight, bias, residual) if t is not None]
    geometry = (layer.stride, layer.kernel // 2, 1, layer.groups)

    def ours(x, weight, bias, residual):
        return conv2d(x, weight, bias, *geometry, activation=layer.activation, residual=residual)

    def eager(x, weight, bias, residual):
        y = F.conv2d(x, weight, bias, *geometry)
        y = y if residual is None else y + residual
        return y if layer.activation is None else getattr(F, layer.activation)(y)

    def run(fn: Callable) -> object:
        if mode == "forward":
            with torch.no_grad():
                return fn(x, weight, bias, residual)
        return torch.autograd.grad(fn(x, weight, bias, residual), operands, grad)

    backends = [*_gpu.backends_with("conv2d_fwd"), "library"]
    providers = {f"pynn {b}": functools.partial(_gpu.on, b, run, ours) for b in backends}
    providers["torch"] = functools.partial(run, eager)
    if compiled:
        providers["torch compile"] = functools.partial(run, torch.compile(eager, dynamic=False))

    def check():
        """On a part of the batch: the reference is float64."""
        few = [
            None if t is None else t.detach() for t in (x[:2], weight, bias, None if residual is None else residual[:2])
        ]
        want = eager(*(None if t is None else t.double() for t in few))
        for backend in backends:
            with torch.no_grad():
                assert_agrees(_gpu.on(backend, ours, *few), want, DTYPE, f"{layer}, {backend}")
        wide = [t.detach().double().requires_grad_() for t in (x[:2], weight)]
        z = F.conv2d(*wide, None, *geometry)
        truth = torch.autograd.grad(z, wide, grad[:2].double())
        for backend in backends:
            narrow = [t.detach().requires_grad_() for t in (x[:2], weight)]
            got = _gpu.on(backend, lambda n=narrow: torch.autograd.grad(conv2d(*n, None, *geometry), n, grad[:2]))
            for a, b in zip(got, truth, strict=True):
                assert_agrees(a, b, DTYPE, f"gradient of {layer}, {backend}")

    products = grad.numel() * layer.channels // layer.groups * layer.kernel**2
    tensors = sum(t.numel() for t in (*operands, grad)) * 2
    passes = 1 if mode == "forward" else 3
    chain = [layer.activation or "", "+ residual" if layer.residual else ""] if op == "conv2d fused" else []
    return Case(
        op=" ".join([op, *filter(None, chain)]),
        shape=str(layer),
        dtype=str(DTYPE).removeprefix("torch."),
        mode=mode,
        providers=providers,
        check=check,
        bytes=passes * tensors,
        flops=2.0 * passes * products,
        device="cuda" if GPU == "cuda" else "cpu",
    )
