"""Depthwise conv2d against PyTorch: forward, input gradient and weight gradient on their own, in both layouts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import pynn  # noqa: F401  loads the ops
from bench.harness import Case, assert_agrees

# batch, channels, channel multiplier, height and width, kernel, stride
SHAPES = [
    (8, 64, 1, 56, 3, 1),
    (8, 64, 1, 56, 5, 1),
    (8, 64, 1, 56, 7, 1),
    (2, 64, 1, 56, 31, 1),
    (8, 128, 1, 56, 3, 2),
    (8, 192, 1, 28, 7, 1),
    (8, 384, 1, 14, 7, 1),
    (8, 768, 1, 7, 7, 1),
    (8, 32, 2, 28, 3, 1),
]
QUICK_SHAPES = [(2, 32, 1, 28, 3, 1), (2, 32, 1, 28, 7, 1)]
MODES = ("forward", "input gradient", "weight gradient")
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}


def cases(quick: bool = False) -> Iterator[Case]:
    for shape in QUICK_SHAPES if quick else SHAPES:
        for mode in MODES:
            yield _case(*shape, torch.float32, mode)
    if not quick:
        for dtype in (torch.bfloat16, torch.float16):
            for mode in MODES:
                yield _case(8, 64, 1, 56, 7, 1, dtype, mode)


def _case(batch, channels, multiplier, size, kernel, stride, dtype, mode) -> Case:
    pad, outputs = kernel // 2, channels * multiplier
    x, w = torch.randn(batch, channels, size, size), torch.randn(outputs, 1, kernel, kernel)
    b, dy = torch.randn(outputs), torch.randn(F.conv2d(x, w, None, stride, pad, 1, channels).shape)
    geometry = ([stride] * 2, [pad] * 4, [1, 1], channels, 0, False)
    mask = [mode == "input gradient", mode == "weight gradient", mode == "weight gradient"]
    ops = torch.ops.pynn

    def operands(memory_format, dtype):
        data, grad = (t.to(dtype, memory_format=memory_format, copy=True) for t in (x, dy))
        return data, grad, w.to(dtype), b.to(dtype)

    def ours(layout):
        data, grad, weight, bias = operands(LAYOUTS[layout], dtype)
        if mode == "forward":
            return lambda: (ops.conv2d_fwd(data, weight, bias, None, *geometry, 0, False)[0],)
        if mode == "input gradient":
            return lambda: (ops.conv2d_bwd_input(grad, weight, list(data.shape), *geometry, layout == "NHWC"),)
        return lambda: ops.conv2d_bwd_weight(grad, data, [kernel, kernel], *geometry, True)

    def theirs(layout):
        data, grad, weight, bias = operands(LAYOUTS[layout], dtype)
        if mode == "forward":
            return lambda: (F.conv2d(data, weight, bias, stride, pad, 1, channels),)
        arguments = ([outputs], [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], channels, mask)
        return lambda: torch.ops.aten.convolution_backward(grad, data, weight, *arguments)

    providers = {f"pynn {layout}": ours(layout) for layout in LAYOUTS}
    providers |= {f"torch {layout}": theirs(layout) for layout in LAYOUTS}

    def check():
        data, grad, weight, bias = (t.to(dtype).double() for t in (x, dy, w, b))
        if mode == "forward":
            exact = [F.conv2d(data, weight, bias, stride, pad, 1, channels)]
        else:
            arguments = ([outputs], [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], channels, mask)
            gradients = torch.ops.aten.convolution_backward(grad, data, weight, *arguments)
            exact = [gradient for gradient, wanted in zip(gradients, mask, strict=True) if wanted]
        for layout in LAYOUTS:
            for got, want in zip(providers[f"pynn {layout}"](), exact, strict=True):
                assert_agrees(got, want, dtype, f"depthwise conv2d {mode} {layout}")

    moved = (x.numel() + dy.numel()) * torch.finfo(dtype).bits // 8
    return Case(
        "conv2d depthwise",
        shape=f"{batch}x{channels}x{size}x{size}->{outputs} k{kernel}s{stride}",
        dtype=str(dtype).removeprefix("torch."),
        mode=mode,
        providers=providers,
        check=check,
        bytes=moved,
        flops=2.0 * dy.numel() * kernel**2,
    )
