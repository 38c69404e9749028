"""conv2d against PyTorch on the dense layers of ResNet-50 and of U-Nets: forward, and forward with every gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import pynn
from bench.harness import Case, assert_agrees

# batch, in channels, out channels, height and width, kernel, stride
RESNET50 = [
    (8, 64, 64, 56, 3, 1),
    (8, 128, 128, 28, 3, 1),
    (8, 256, 256, 14, 3, 1),
    (8, 512, 512, 7, 3, 1),
    (8, 128, 128, 56, 3, 2),
    (8, 256, 256, 28, 3, 2),
    (8, 64, 256, 56, 1, 1),
    (8, 256, 64, 56, 1, 1),
    (8, 128, 512, 28, 1, 1),
    (8, 512, 128, 28, 1, 1),
    (8, 256, 1024, 14, 1, 1),
    (8, 1024, 256, 14, 1, 1),
    (8, 512, 2048, 7, 1, 1),
    (8, 2048, 512, 7, 1, 1),
    (8, 256, 512, 56, 1, 2),
]
UNET = [
    (64, 32, 32, 28, 3, 1),
    (64, 32, 64, 28, 3, 2),
    (64, 64, 64, 14, 3, 1),
    (64, 64, 64, 14, 1, 1),
    (64, 128, 128, 7, 3, 1),
    (64, 192, 64, 8, 3, 1),
    (64, 24, 24, 8, 3, 1),
    (8, 320, 320, 32, 3, 1),
]
QUICK = [(2, 64, 64, 14, 3, 1), (2, 64, 64, 14, 1, 1)]
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}


def cases(quick: bool = False) -> Iterator[Case]:
    for shape in QUICK if quick else RESNET50 + UNET:
        for mode in ("forward", "forward+backward"):
            yield _case(*shape, mode)


def _case(batch, channels, outputs, size, kernel, stride, mode) -> Case:
    pad, backward = kernel // 2, mode != "forward"
    x, w, b = torch.randn(batch, channels, size, size), torch.randn(outputs, channels, kernel, kernel), torch.randn(1)

    def run(conv2d, memory_format, dtype=torch.float32):
        leaves = [t.to(dtype, copy=True).requires_grad_(backward) for t in (x, w, b.expand(outputs))]
        leaves[0] = x.to(dtype, memory_format=memory_format, copy=True).requires_grad_(backward)
        shape = conv2d(*leaves, stride, pad).shape
        grad = torch.linspace(-1, 2, shape.numel()).view(shape).to(dtype, memory_format=memory_format)

        def step():
            output = conv2d(*leaves, stride, pad)
            return (output, *torch.autograd.grad(output, leaves, grad)) if backward else (output,)

        return step

    providers = {f"pynn {name}": run(pynn.ops.conv2d, layout) for name, layout in LAYOUTS.items()}
    providers |= {f"torch {name}": run(F.conv2d, layout) for name, layout in LAYOUTS.items()}

    def check():
        expected = run(F.conv2d, torch.contiguous_format, torch.float64)()
        for name in LAYOUTS:
            results = providers[f"pynn {name}"](), expected, providers[f"torch {name}"]()
            for got, want, peer in zip(*results, strict=True):  # a bias gradient of torch's is one long float32 sum
                assert_agrees(got, want, torch.float32, f"conv2d {name}", peer)

    out = (size + 2 * pad - kernel) // stride + 1
    return Case(
        "conv2d",
        shape=f"{batch}x{channels}x{size}x{size}->{outputs} k{kernel}s{stride}",
        dtype="float32",
        mode=mode,
        providers=providers,
        check=check,
        flops=2.0 * batch * outputs * channels * kernel**2 * out**2 * (3 if backward else 1),
    )
