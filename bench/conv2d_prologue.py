"""conv2d of silu(x * scale + shift), the affine map of a group norm, against the chain of torch's ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import pynn
from bench.harness import Case, assert_agrees

# batch, in channels, out channels, height and width, kernel
SHAPES = [(64, 32, 32, 28, 3), (64, 64, 64, 14, 3), (64, 64, 64, 14, 1), (64, 128, 128, 7, 3), (8, 64, 64, 56, 3)]
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}


def cases(quick: bool = False) -> Iterator[Case]:
    for shape in SHAPES[1:3] if quick else SHAPES:
        for mode in ("forward", "forward+backward"):
            yield _case(*shape, mode)


def _fused(x, scale, shift, weight, bias):
    return pynn.ops.conv2d(
        x, weight, bias, padding="same", input_scale=scale, input_shift=shift, input_activation="silu"
    )


def _chain(x, scale, shift, weight, bias):
    return F.conv2d(F.silu(x * scale[..., None, None] + shift[..., None, None]), weight, bias, padding="same")


def _case(batch, channels, outputs, size, kernel, mode) -> Case:
    backward = mode != "forward"
    x, scale, shift = (
        torch.randn(batch, channels, size, size),
        torch.rand(batch, channels),
        torch.randn(batch, channels),
    )
    operands = x, scale, shift, torch.randn(outputs, channels, kernel, kernel), torch.randn(outputs)

    def run(fn, memory_format, dtype=torch.float32):
        leaves = [t.to(dtype, copy=True).requires_grad_(backward) for t in operands]
        leaves[0] = x.to(dtype, memory_format=memory_format, copy=True).requires_grad_(backward)
        grad = torch.linspace(-1, 2, batch * outputs * size**2).view(batch, outputs, size, size)
        grad = grad.to(dtype, memory_format=memory_format)

        def step():
            output = fn(*leaves)
            return (output, *torch.autograd.grad(output, leaves, grad)) if backward else (output,)

        return step

    providers = {f"pynn {name}": run(_fused, layout) for name, layout in LAYOUTS.items()}
    providers |= {f"torch {name}": run(_chain, layout) for name, layout in LAYOUTS.items()}

    def check():
        expected = run(_chain, torch.contiguous_format, torch.float64)()
        with pynn.backend("cpu"):
            for name in LAYOUTS:
                for got, want in zip(providers[f"pynn {name}"](), expected, strict=True):
                    assert_agrees(got, want, torch.float32, f"conv2d prologue {name}")

    return Case(
        "conv2d prologue",
        shape=f"{batch}x{channels}x{size}x{size}->{outputs} k{kernel}",
        dtype="float32",
        mode=mode,
        providers=providers,
        check=check,
        flops=2.0 * batch * outputs * channels * kernel**2 * size**2 * (3 if backward else 1),
    )
