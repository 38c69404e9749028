"""conv2d where channels or taps are few: stems, heads, small groups, 1 x 1, in both layouts and every dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adversary import Canary
from policy import (
    DTYPES,
    assert_bitwise,
    assert_elementwise,
    assert_nonfinite,
    assert_relative,
    integers,
    run,
    threads,
    truth_of,
)

from pynn.ops.conv2d import conv2d

pytestmark = pytest.mark.usefixtures("cpu_kernels")


LAST = torch.channels_last

# (x shape, weight shape, geometry)
LAYERS = {
    "stem7": ((2, 3, 37, 41), (64, 3, 7, 7), {"padding": 3, "stride": 2}),
    "stem of one channel": ((6, 1, 28, 28), (32, 1, 3, 3), {"padding": 1}),
    "strided stem": ((2, 3, 34, 64), (32, 3, 3, 3), {"padding": 1, "stride": 2}),
    "lenet": ((5, 1, 28, 28), (6, 1, 5, 5), {"padding": 2}),
    "stem3": ((2, 3, 33, 30), (37, 3, 3, 3), {"padding": 1}),
    "four channels, dilated": ((2, 4, 19, 23), (18, 4, 3, 3), {"padding": (2, 1), "dilation": (2, 3)}),
    "head of three": ((2, 64, 28, 29), (3, 64, 3, 3), {"padding": 1}),
    "head of one": ((3, 32, 17, 16), (1, 32, 3, 3), {"padding": 1}),
    "head of two, strided": ((2, 40, 21, 18), (2, 40, 3, 4), {"padding": (1, 2), "stride": (2, 3)}),
    "pointwise head": ((2, 70, 13, 15), (4, 70, 1, 1), {}),
    "head of six, unpadded": ((24, 16, 14, 14), (6, 16, 5, 5), {}),
    "head of eight": ((2, 33, 20, 18), (8, 33, 3, 3), {"padding": 1}),
    "pointwise head of seven": ((16, 64, 13, 15), (7, 64, 1, 1), {}),
    "many channels, tall": ((1, 600, 40, 9), (3, 600, 3, 3), {"padding": 1}),
    "wide": ((1, 3, 5, 2100), (5, 3, 3, 3), {"padding": 1}),
    "large kernel": ((1, 8, 24, 24), (2, 8, 11, 11), {"padding": 5}),
    "4 per group": ((2, 128, 14, 14), (128, 4, 3, 3), {"padding": 1, "groups": 32}),
    "8 per group": ((2, 48, 15, 13), (48, 8, 3, 3), {"padding": 1, "groups": 6}),
    "16 per group": ((2, 64, 14, 17), (64, 16, 3, 3), {"padding": 1, "groups": 4, "stride": 2}),
    "32 per group": ((2, 96, 12, 14), (96, 32, 3, 3), {"padding": 1, "groups": 3}),
    "uneven groups": ((2, 15, 14, 12), (35, 3, 3, 2), {"padding": 1, "groups": 5, "stride": (1, 2)}),
    "3 into 40 per group": ((2, 6, 16, 16), (80, 3, 3, 3), {"padding": (0, 2), "groups": 2}),
    "pointwise, 8 into 64": ((3, 8, 14, 15), (64, 8, 1, 1), {}),
    "pointwise, 5 into 27": ((2, 5, 9, 11), (27, 5, 1, 1), {}),
    "pointwise, 20 into 16, strided": ((2, 20, 23, 18), (16, 20, 1, 1), {"stride": (2, 3)}),
    "pointwise, 200 into 12": ((2, 200, 11, 13), (12, 200, 1, 1), {"stride": (1, 2)}),
    "pointwise, one long row": ((1, 12, 1, 4100), (20, 12, 1, 1), {}),
    "pointwise, 64 into 256": ((2, 64, 7, 9), (256, 64, 1, 1), {}),
    "pointwise, 300 into 130": ((2, 300, 9, 11), (130, 300, 1, 1), {}),
    "pointwise, 90 into 200, strided": ((3, 90, 13, 18), (200, 90, 1, 1), {"stride": 2}),
    "pointwise, more weights than fit": ((1, 1030, 6, 9), (261, 1030, 1, 1), {}),
    "stride beyond the kernel": ((2, 3, 31, 31), (9, 3, 2, 2), {"stride": 5}),
}
TAPS_OUTSIDE = ((2, 2, 9, 9), (3, 2, 3, 3), {"padding": 9, "dilation": 9})


def reference(x, w, b, **geometry):
    return F.conv2d(x, w, b, **geometry)


def operands(name, dtype):
    shape, weight_shape, geometry = LAYERS[name]
    torch.manual_seed(len(name))
    w = torch.randn(weight_shape) / w_scale(weight_shape)
    x, b = torch.randn(shape).to(dtype), torch.randn(weight_shape[0]).to(dtype)
    dy = torch.randn(F.conv2d(x.double(), w.double(), **geometry).shape).to(dtype)
    return (x, w.to(dtype), b), dy, geometry


def w_scale(weight_shape):
    return (weight_shape[1] * weight_shape[2] * weight_shape[3]) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_accuracy(name, dtype):
    (x, w, b), dy, geometry = operands(name, dtype)
    y0, g0 = truth_of(lambda *t: reference(*t, **geometry), x, w, b, grad_output=dy)
    y1, g1 = run(lambda *t: reference(*t, **geometry), x, w, b, grad_output=dy)
    y2, g2 = run(lambda *t: reference(*t, **geometry), x.to(memory_format=LAST), w, b, grad_output=dy)
    y, g = run(lambda *t: conv2d(*t, **geometry), x, w, b, grad_output=dy)
    assert_relative(y, y0, [y1, y2], what="output")
    for what, got, truth, *peers in zip(("input", "weight", "bias"), g, g0, g1, g2, strict=True):
        assert_relative(got, truth, peers, kind="gradient", what=f"gradient of {what}")
    _, sizes = truth_of(
        lambda *t: reference(*t, **geometry), *(t.double().abs() for t in (x, w, b)), grad_output=dy.abs()
    )
    magnitude = reference(*(t.double().abs() for t in (x, w, b)), **geometry)
    assert_elementwise(y, y0, magnitude, w[0].numel() + 1, "output")
    assert_elementwise(g[0], g0[0], sizes[0], w[:, 0].numel(), "gradient of input")
    assert_elementwise(g[1], g0[1], sizes[1], dy[:, 0].numel(), "gradient of weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [*LAYERS.values(), TAPS_OUTSIDE], ids=[*LAYERS, "taps outside"])
def test_exact(layer, dtype):
    shape, weight_shape, geometry = layer
    x, w, b = integers(shape, dtype), integers(weight_shape, dtype, low=-1, high=1), integers((weight_shape[0],), dtype)
    z = F.conv2d(x.double(), w.double(), **geometry)
    r, dy = integers(z.shape, dtype), integers(z.shape, dtype, low=-1, high=1)

    def fused(op):
        return lambda x, w, b, r: op(x, w, b, r).relu()

    y0, g0 = truth_of(fused(lambda x, w, b, r: F.conv2d(x, w, b, **geometry) + r), x, w, b, r, grad_output=dy)
    for memory_format in (torch.contiguous_format, LAST):
        y, g = run(
            lambda x, w, b, r: conv2d(x, w, b, activation="relu", residual=r, **geometry),
            x.to(memory_format=memory_format),
            w,
            b,
            r,
            grad_output=dy.to(memory_format=memory_format),
        )
        assert_bitwise(y, y0.to(dtype), "output")
        for i, (got, truth) in enumerate(zip(g, g0, strict=True)):
            assert_bitwise(got, truth.to(dtype), f"gradient {i}")


@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_reproducible(name, dtype, plain):
    """The same bits in either layout, for any number of threads and any slice of the batch.

    plain: nothing but a bias to add, where register tiles store their results themselves.
    """
    (x, w, b), dy, geometry = operands(name, dtype)
    r = torch.zeros(dy.shape[0], 0) if plain else torch.randn(dy.shape).to(dtype)

    def layer(x, w, b, r):
        return conv2d(x, w, b, **geometry) if plain else conv2d(x, w, b, activation="silu", residual=r, **geometry)

    def results(x, dy, r):
        y, grads = run(layer, x, w, b, None if plain else r, grad_output=dy)
        return [t for t in (y, *grads) if t is not None]

    expected = results(x, dy, r)
    last = [t.to(memory_format=LAST) if t.dim() == 4 else t for t in (x, dy, r)]
    turned = dy.transpose(2, 3).contiguous().mT
    for count in (1, 2, 3):
        with threads(count):
            for tensors in ((x, dy, r), last, (x, last[1], r), (last[0], dy, r), (x[..., ::1], turned, r)):
                for i, (a, e) in enumerate(zip(results(*tensors), expected, strict=True)):
                    assert_bitwise(a, e, f"{count} threads, result {i}")
    for images in (x, last[0]):
        for i in range(len(x)):
            y, dx, *_ = results(images[i : i + 1], dy[i : i + 1], r[i : i + 1])
            assert_bitwise(y, expected[0][i : i + 1], "batch slice, output")
            assert_bitwise(dx, expected[1][i : i + 1], "batch slice, input gradient")


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_else_written(name):
    (x, w, b), dy, geometry = operands(name, torch.float32)
    expected = run(lambda *t: conv2d(*t, **geometry), x, w, b, grad_output=dy)
    cages = [Canary(t) for t in (x, w, b, dy)]
    tensors = [c.tensor for c in cages]
    y, grads = run(lambda *t: conv2d(*t, **geometry), *tensors[:3], grad_output=tensors[3])
    for cage in cages:
        cage.assert_untouched()
    for a, e in zip((y, *grads), (expected[0], *expected[1]), strict=True):
        assert_bitwise(a, e, "inside guards")


@pytest.mark.parametrize("name", ["stem3", "head of three", "4 per group", "head of two, strided"])
def test_nonfinite(name):
    (x, w, b), dy, geometry = operands(name, torch.float32)
    x[0, 0, 3, 3], x[1, 1, 0, 0], x[1, 0, 12, 11] = float("nan"), float("inf"), float("-inf")
    y0, _ = truth_of(lambda *t: reference(*t, **geometry), x, w, b)
    assert_nonfinite(conv2d(x, w, b, **geometry), y0)
    x = torch.randn(x.shape)
    dy[0, 0, 2, 4], dy[1, 1, 3, 3] = float("nan"), float("inf")
    _, g0 = truth_of(lambda x, w: reference(x, w, None, **geometry), x, w, grad_output=dy)
    _, g = run(lambda x, w: conv2d(x, w, **geometry), x, w, grad_output=dy)
    for got, truth in zip(g, g0, strict=True):
        assert_nonfinite(got, truth)
