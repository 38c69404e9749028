"""conv2d against PyTorch on the convolutions of a small U-Net: forward, input gradient, weight and bias gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import pynn
from bench._conv2d_gpu import cases as gpu_cases  # noqa: F401  python -m bench --device cuda
from bench.harness import Case, assert_agrees

# batch, in channels, out channels, height and width, kernel, stride
SHAPES = [
    (64, 1, 32, 28, 3, 1),
    (64, 32, 32, 28, 3, 1),
    (64, 32, 64, 28, 3, 2),
    (64, 64, 64, 14, 3, 1),
    (64, 64, 64, 14, 1, 1),
    (64, 64, 128, 14, 3, 2),
    (64, 128, 128, 7, 3, 1),
    (64, 32, 1, 28, 3, 1),
    (64, 1, 32, 8, 3, 1),
    (64, 32, 32, 8, 3, 1),
    (64, 32, 64, 8, 1, 1),
    (64, 32, 64, 8, 3, 2),
    (64, 64, 64, 8, 3, 1),
    (64, 192, 64, 8, 3, 1),
    (64, 64, 64, 4, 3, 1),
    (64, 128, 128, 4, 3, 1),
    (64, 32, 1, 8, 3, 1),
]
QUICK_SHAPES = [(64, 32, 32, 8, 3, 1), (64, 64, 64, 4, 3, 1)]
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}


def cases(quick: bool = False) -> Iterator[Case]:
    for shape in QUICK_SHAPES if quick else SHAPES:
        yield _case(*shape)


def _case(batch, channels, outputs, size, kernel, stride) -> Case:
    """Forward and backward; the first layer of a network (one channel) needs no input gradient."""
    pad, needs_input = kernel // 2, channels > 1
    x, w, b = (
        torch.randn(batch, channels, size, size),
        torch.randn(outputs, channels, kernel, kernel),
        torch.randn(outputs),
    )

    def run(conv2d, memory_format, dtype=torch.float32):
        data = x.to(dtype, memory_format=memory_format, copy=True).requires_grad_(needs_input)
        weight = w.to(dtype, memory_format=memory_format, copy=True).requires_grad_()
        bias = b.to(dtype, copy=True).requires_grad_()
        leaves = [data, weight, bias] if needs_input else [weight, bias]
        shape = conv2d(data, weight, bias, stride, pad).shape
        grad = torch.linspace(-1, 2, shape.numel()).view(shape).to(dtype, memory_format=memory_format)

        def step():
            output = conv2d(data, weight, bias, stride, pad)
            return (output, *torch.autograd.grad(output, leaves, grad))

        return step

    providers = {f"pynn {name}": run(pynn.ops.conv2d, layout) for name, layout in LAYOUTS.items()}
    providers |= {f"torch {name}": run(F.conv2d, layout) for name, layout in LAYOUTS.items()}

    def check():
        expected = run(F.conv2d, torch.contiguous_format, torch.float64)()
        with pynn.backend("cpu"):  # where PyTorch's kernel is chosen, its long float32 sums are not ours to judge
            for name in LAYOUTS:
                for got, want in zip(providers[f"pynn {name}"](), expected, strict=True):
                    assert_agrees(got, want, torch.float32, f"conv2d {name}")

    out = (size + 2 * pad - kernel) // stride + 1
    products = batch * outputs * channels * kernel**2 * out**2
    return Case(
        "conv2d",
        shape=f"{batch}x{channels}x{size}x{size}->{outputs} k{kernel}s{stride}",
        dtype="float32",
        mode="forward+backward",
        providers=providers,
        check=check,
        flops=2.0 * products * (3 if needs_input else 2),
    )
