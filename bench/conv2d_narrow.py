"""conv2d against PyTorch where channels are few: stems, heads and small groups, every pass on its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.harness import Case, assert_agrees

# batch, in channels, out channels, height and width, kernel, stride, padding, groups
SHAPES = [
    (128, 1, 6, 28, 5, 1, 2, 1),
    (32, 1, 32, 28, 3, 1, 1, 1),
    (64, 1, 32, 28, 3, 1, 1, 1),
    (8, 3, 64, 224, 7, 2, 3, 1),
    (8, 3, 64, 64, 3, 1, 1, 1),
    (8, 64, 3, 56, 3, 1, 1, 1),
    (64, 32, 1, 28, 3, 1, 1, 1),
    (8, 128, 128, 28, 3, 1, 1, 32),
    (8, 256, 256, 28, 3, 1, 1, 32),
    (8, 8, 64, 28, 1, 1, 0, 1),
    (8, 64, 8, 28, 1, 1, 0, 1),
    (8, 64, 16, 28, 1, 2, 0, 1),
]
QUICK_SHAPES = [(8, 1, 32, 28, 3, 1, 1, 1), (2, 64, 3, 28, 3, 1, 1, 1)]
# for the 16-bit types: conversions on the way in and out
DENSE_SHAPES = [(2, 64, 64, 28, 3, 1, 1, 1), (64, 32, 32, 28, 3, 1, 1, 1)]
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
MODES = ("forward", "input gradient", "weight gradient")


def cases(quick: bool = False) -> Iterator[Case]:
    for shape in QUICK_SHAPES if quick else SHAPES:
        for mode in MODES:
            yield _case(*shape, mode, torch.float32)
    for shape in () if quick else DENSE_SHAPES:
        for dtype in (torch.float16, torch.bfloat16):
            yield _case(*shape, "forward", dtype)


def _case(batch, channels, outputs, size, kernel, stride, pad, groups, mode, dtype) -> Case:
    w = torch.randn(outputs, channels // groups, kernel, kernel).to(dtype)
    b = torch.randn(outputs).to(dtype)
    x = torch.randn(batch, channels, size, size).to(dtype)
    dy = torch.randn_like(F.conv2d(x, w, b, stride, pad, 1, groups))
    mask = [mode == "input gradient"] + [mode == "weight gradient"] * 2
    geometry = [stride] * 2, [pad] * 4, [1, 1], groups, 0, False

    def pynn_pass(memory_format):
        data, grad = (t.contiguous(memory_format=memory_format) for t in (x, dy))
        last = memory_format is torch.channels_last
        return {
            "forward": lambda: (torch.ops.pynn.conv2d_fwd(data, w, b, None, *geometry, 0, False)[0],),
            "input gradient": lambda: (torch.ops.pynn.conv2d_bwd_input(grad, w, x.shape, *geometry, last),),
            "weight gradient": lambda: torch.ops.pynn.conv2d_bwd_weight(grad, data, [kernel] * 2, *geometry, True),
        }[mode]

    def torch_pass(memory_format, dtype=dtype):
        data, grad, weight = (t.to(dtype).contiguous(memory_format=memory_format) for t in (x, dy, w))
        bias = b.to(dtype)

        def backward():
            return torch.ops.aten.convolution_backward(
                grad, data, weight, [outputs], [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], groups, mask
            )

        def forward():
            return (F.conv2d(data, weight, bias, stride, pad, 1, groups),)

        return forward if mode == "forward" else backward

    providers = {f"pynn {name}": pynn_pass(layout) for name, layout in LAYOUTS.items()}
    providers |= {f"torch {name}": torch_pass(layout) for name, layout in LAYOUTS.items()}

    def check():
        truths = [t for t in torch_pass(torch.contiguous_format, torch.float64)() if t is not None and t.numel()]
        for name in LAYOUTS:
            for got, truth in zip(providers[f"pynn {name}"](), truths, strict=True):
                assert_agrees(got, truth, dtype, f"conv2d {mode} {name}")

    return Case(
        "conv2d",
        shape=f"{batch}x{channels}x{size}x{size}->{outputs} k{kernel}s{stride}g{groups}",
        dtype=str(dtype).removeprefix("torch."),
        mode=mode,
        providers=providers,
        check=check,
        flops=2.0 * dy.numel() * (channels // groups) * kernel**2,
    )
