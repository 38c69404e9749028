"""Depthwise conv2d: shapes, strides, tails, multipliers, borders, layouts and determinism of its own kernels."""

from __future__ import annotations

import pytest
import torch
from adversary import Canary, layouts
from conv2d_reference import EMULATED, LAST, on, operands, ours, output_like, reference, run_on
from policy import DTYPES, assert_bitwise, assert_nonfinite, assert_relative, integers, run, threads, truth_of

KERNEL = "conv2d_fwd"

# (x shape, channel multiplier, kernel, geometry): whole vectors and tails of pixels and of channels, every tile height
CASES = [
    ((2, 40, 13, 11), 1, (3, 3), {"padding": 1}),
    ((2, 16, 30, 33), 1, (7, 7), {"padding": 3}),
    ((2, 33, 7, 7), 1, (7, 7), {"padding": 3}),
    ((2, 19, 14, 14), 1, (5, 5), {"padding": 2}),
    ((1, 17, 20, 40), 1, (31, 31), {"padding": 15}),
    ((1, 3, 35, 33), 1, (31, 31), {"padding": 15}),
    ((2, 20, 30, 37), 1, (3, 3), {"padding": 1, "stride": 2}),
    ((2, 16, 15, 64), 1, (3, 3), {"stride": (1, 2)}),
    ((2, 19, 9, 40), 3, (2, 5), {"padding": (3, 1), "stride": (1, 3), "dilation": (2, 1)}),
    ((2, 20, 12, 29), 2, (3, 3), {"padding": 1}),
    ((2, 16, 14, 70), 1, (4, 4), {"padding": (2, 3), "dilation": 3}),
    ((3, 18, 5, 26), 1, (1, 9), {"padding": (0, 4)}),
    ((3, 18, 26, 5), 1, (9, 1), {"padding": (4, 0)}),
    ((2, 18, 9, 27), 1, (2, 2), {}),
    ((2, 5, 6, 5), 4, (5, 5), {}),
    ((2, 18, 1, 1), 1, (3, 3), {"padding": 1}),
    ((2, 17, 4, 30), 2, (1, 1), {"stride": 3}),
    ((9, 24, 3, 3), 1, (3, 3), {"padding": 1}),
]
SMALL_CASES = [((1, *shape[1:]), m, kernel, geometry) for shape, m, kernel, geometry in CASES if kernel != (31, 31)]
ACCURATE = [case for case in CASES if case[2] in ((3, 3), (5, 5), (7, 7), (31, 31)) and case[0][2] > 6]
BORDERS = ["reflect", "replicate", "circular"]


def weight_shape(shape, multiplier, kernel):
    return shape[1] * multiplier, 1, *kernel


def case_of(backend, index):
    cases = SMALL_CASES if backend.name in EMULATED else CASES
    shape, multiplier, kernel, geometry = cases[index % len(cases)]
    return shape, weight_shape(shape, multiplier, kernel), {"groups": shape[1], **geometry}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_exact(backend, case, dtype):
    shape, weights, geometry = case_of(backend, case)
    x, w, b = (
        integers(shape, dtype, low=-2, high=2),
        integers(weights, dtype, low=-1, high=1),
        integers(weights[:1], dtype),
    )
    if weights[2] * weights[3] > 100:  # keeps every sum exact in bfloat16
        w[:, :, ::4], w[:, :, :, ::3] = 0, 0
        w[:, :, 10:], x[:, :, ::3] = 0, 0
    z = output_like(x, w, **geometry)
    r, dy = integers(z.shape, dtype), integers(z.shape, dtype, low=-1, high=1)
    if dtype in (torch.bfloat16, torch.float16):
        dy[:, :, 6:] = 0
    y0, g0 = truth_of(lambda *t: reference(*t, "relu", **geometry), x, w, b, r, grad_output=dy)
    for memory_format in (torch.contiguous_format, LAST):
        y, g = run_on(
            backend,
            lambda *t: ours(*t, "relu", **geometry),
            x.to(memory_format=memory_format),
            w,
            b,
            r,
            grad_output=dy.to(memory_format=memory_format),
        )
        assert_bitwise(y, y0.to(dtype), "output")
        for i, (got, truth) in enumerate(zip(g, g0, strict=True)):
            assert_bitwise(got, truth.to(dtype), f"gradient {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", range(len(ACCURATE)))
def test_accuracy(case, dtype):
    """No worse than torch's better layout, in both of ours."""
    shape, multiplier, kernel, geometry = ACCURATE[case]
    geometry = {"groups": shape[1], **geometry}
    x, w, b = operands(shape, weight_shape(shape, multiplier, kernel), dtype)
    dy = torch.randn(output_like(x, w, **geometry).shape).to(dtype)
    y0, g0 = truth_of(lambda *t: reference(*t, **geometry), x, w, b, grad_output=dy)
    y1, g1 = run(lambda *t: reference(*t, **geometry), x, w, b, grad_output=dy)
    y, g = run(lambda *t: ours(*t, **geometry), x.to(memory_format=LAST), w, b, grad_output=dy)
    assert_relative(y, y0, [y1], what="output")
    for name, got, truth, peer in zip(("input", "weight", "bias"), g, g0, g1, strict=True):
        assert_relative(got, truth, [peer], kind="gradient", what=f"gradient of {name}")


def results(x, w, b, r, dy, activation="silu", **geometry):
    y, grads = run(lambda *t: ours(*t, activation, **geometry), x, w, b, r, grad_output=dy)
    return y, *grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_layouts(case, dtype):
    """The same bits for every layout of every operand."""
    shape, multiplier, kernel, geometry = CASES[case]
    geometry = {"groups": shape[1], **geometry}
    x, w, b = operands(shape, weight_shape(shape, multiplier, kernel), dtype)
    r = torch.randn(output_like(x, w, **geometry).shape).to(dtype)
    tensors = [x, w, b, r, torch.randn(r.shape).to(dtype)]
    expected = results(*tensors, **geometry)
    for i in range(len(tensors)):
        for name, tensor in layouts(tensors[i]):
            got = results(*(tensor if j == i else t for j, t in enumerate(tensors)), **geometry)
            for k, (a, e) in enumerate(zip(got, expected, strict=True)):
                assert_bitwise(a, e, f"operand {i} as {name}, result {k}")
    # Without an epilogue the sums are stored as they are.
    plain = [results(t, w, b, None, g, None, **geometry) for t in (x, x.to(memory_format=LAST)) for g in (tensors[4],)]
    for a, e in zip(*plain, strict=True):
        if a is not None:
            assert_bitwise(a, e, "plain")


@pytest.mark.parametrize("case", range(len(CASES)))
def test_reproducible(case):
    shape, multiplier, kernel, geometry = CASES[case]
    geometry = {"groups": shape[1], **geometry}
    x, w, b = operands((5, *shape[1:]), weight_shape(shape, multiplier, kernel))
    dy = torch.randn(output_like(x, w, **geometry).shape)
    expected = results(x, w, b, None, dy, **geometry)
    for count in (1, 2, 3):
        with threads(count):
            for a, e in zip(results(x, w, b, None, dy, **geometry), expected, strict=True):
                if a is not None:
                    assert_bitwise(a, e, f"{count} threads")
    for first, last in ((0, 1), (1, 4), (4, 5)):
        y, dx, *_ = results(x[first:last], w, b, None, dy[first:last], **geometry)
        assert_bitwise(y, expected[0][first:last], "batch slice, output")
        assert_bitwise(dx, expected[1][first:last], "batch slice, input gradient")


@pytest.mark.parametrize("mode", BORDERS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride"), [(20, (9, 30), 7, 1), (5, (30, 40), 3, 2), (32, (8, 7), 5, 1)]
)
def test_borders(mode, memory_format, channels, size, kernel, stride):
    """Every padding mode against torch's layer, in float64."""
    theirs = torch.nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, padding_mode=mode, dtype=torch.float64
    )
    import pynn.nn

    mine = pynn.nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, padding_mode=mode, dtype=torch.float64
    )
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    outputs = []
    for layer, data in ((theirs, x.clone()), (mine, x.to(memory_format=memory_format))):
        data.requires_grad_()
        y = layer(data)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape, dtype=y.dtype))
        outputs.append((y.detach(), data.grad, layer.weight.grad, layer.bias.grad))
    for got, expected in zip(*reversed(outputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("case", [0, 1, 6, 9])
def test_nothing_else_written(case):
    shape, multiplier, kernel, geometry = CASES[case]
    geometry = {"groups": shape[1], **geometry}
    x, w, b = operands(shape, weight_shape(shape, multiplier, kernel))
    r = torch.randn(output_like(x, w, **geometry).shape)
    dy = torch.randn(r.shape)
    cages = [Canary(t) for t in (x, w, b, r, dy)]
    got = results(*(c.tensor for c in cages), **geometry)
    for cage in cages:
        cage.assert_untouched()
    for a, e in zip(got, results(x, w, b, r, dy, **geometry), strict=True):
        assert_bitwise(a, e, "inside guards")


@pytest.mark.parametrize("size", [(7, 7), (9, 30)])
@pytest.mark.parametrize("padding", [0, 1])
def test_nonfinite(backend, size, padding):
    """A lane past the end of a row never reaches a sum."""
    geometry = {"groups": 18, "padding": padding}
    x, w, b = operands((2, 18, *size), (18, 1, 3, 3))
    clean = x.clone()
    x[0, 0, 3, 3], x[1, 1, 2, 2], x[1, 2, -2, -2] = float("nan"), float("inf"), float("-inf")
    x[0, 3, 2, -1], x[0, 4, -1, 2] = float("nan"), float("inf")
    for data in (x, x.to(memory_format=LAST)):
        y0, _ = truth_of(lambda *t: reference(*t, **geometry), data, w, b)
        assert_nonfinite(ours(*on(backend, data, w, b), **geometry).cpu(), y0)
        dy = torch.ones(y0.shape)
        _, g0 = truth_of(lambda *t: reference(*t, **geometry), data, w, grad_output=dy)
        _, g = run_on(backend, lambda *t: ours(*t, **geometry), data, w, grad_output=dy)
        assert_nonfinite(g[1], g0[1])
        dy[0, 0, 2, 3], dy[1, 1, 3, 3] = float("nan"), float("inf")
        _, g0 = truth_of(lambda *t: reference(*t, **geometry), clean, w, grad_output=dy)
        _, g = run_on(backend, lambda *t: ours(*t, **geometry), clean, w, grad_output=dy)
        for got, truth in zip(g, g0, strict=True):
            assert_nonfinite(got, truth)
