"""conv2d: kernels against float64, exactness, layouts, derivatives, transforms, errors, and nn.Conv2d."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from adversary import Canary, constant, layouts
from bad_input import assert_rejects
from hypothesis import given, settings
from hypothesis import strategies as st
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
from torch.autograd import gradcheck, gradgradcheck
from transforms import assert_all, assert_compiles

import pynn
from pynn.ops.conv2d import ACTIVATIONS, conv2d

FUNCTIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
LAST = torch.channels_last


def reference(x, w, b=None, r=None, activation=None, **geometry):
    z = F.conv2d(x, w, b, **geometry)
    return FUNCTIONS[activation](z if r is None else z + r)


def ours(x, w, b=None, r=None, activation=None, **geometry):
    return conv2d(x, w, b, activation=activation, residual=r, **geometry)


def operands(shape, weight_shape, dtype=torch.float32, bias=True, scale=True):
    x, w = torch.randn(shape).to(dtype), torch.randn(weight_shape)
    if scale:
        w = w / (w[0].numel() or 1) ** 0.5
    return x, w.to(dtype), torch.randn(weight_shape[0]).to(dtype) if bias else None


def output_like(x, w, **geometry):
    return F.conv2d(x.double(), w.double(), **geometry)


# (x shape, weight shape, geometry): U-Net blocks, stem, head, downsampling, groups, depthwise, odd kernels
LAYERS = [
    ((4, 32, 8, 8), (32, 32, 3, 3), {"padding": 1}),
    ((4, 128, 4, 4), (64, 128, 3, 3), {"padding": 1}),
    ((2, 64, 14, 14), (64, 64, 3, 3), {"padding": 1}),
    ((2, 32, 14, 14), (64, 32, 3, 3), {"padding": 1, "stride": 2}),
    ((4, 64, 8, 8), (96, 64, 1, 1), {}),
    ((4, 1, 28, 28), (32, 1, 3, 3), {"padding": 1}),
    ((4, 32, 28, 28), (1, 32, 3, 3), {"padding": 1}),
    ((2, 3, 32, 32), (40, 3, 7, 7), {"padding": 3, "stride": 2}),
    ((2, 64, 10, 10), (64, 16, 3, 3), {"padding": 1, "groups": 4}),
    ((2, 40, 12, 12), (40, 1, 5, 5), {"padding": 2, "groups": 40}),
    ((2, 24, 13, 11), (20, 24, 2, 4), {"padding": (1, 2), "dilation": (2, 1)}),
]

# torch's own test samples: x, weight, geometry
SAMPLES = [
    ((1, 3, 4, 4), (3, 3, 3, 3), {"stride": (2, 2), "padding": 2}),
    ((2, 4, 8, 8), (2, 2, 3, 3), {"stride": (3, 2), "padding": (2, 1), "groups": 2, "dilation": (4, 4)}),
    ((1, 4, 5, 5), (1, 4, 2, 3), {"stride": 2, "padding": 1, "dilation": (2, 3)}),
    ((1, 2, 4, 3), (4, 2, 3, 4), {"stride": 2, "padding": 1}),
    ((1, 4, 5, 5), (1, 4, 2, 3), {"stride": 2, "padding": "valid"}),
    ((1, 4, 5, 5), (1, 4, 2, 3), {"padding": "same", "dilation": 3}),
    ((2, 4, 6, 6), (4, 1, 3, 3), {"groups": 4}),
    ((2, 4, 6, 6), (8, 1, 3, 3), {"groups": 4}),
    ((2, 4, 6, 6), (4, 1, 3, 3), {"groups": 4, "stride": (3, 2)}),
    ((2, 4, 5, 5), (4, 1, 2, 2), {"groups": 4, "dilation": (2, 2)}),
    ((2, 4, 6, 5), (6, 2, 3, 2), {"groups": 2}),
    ((1, 4, 5, 5), (3, 4, 3, 3), {}),
    ((2, 5, 7, 6), (4, 5, 4, 2), {"padding": "same"}),
    ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    ((2, 3, 2, 2), (5, 3, 3, 3), {"padding": 4, "stride": 5}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_accuracy(layer, dtype):
    shape, weight_shape, geometry = LAYERS[layer]
    torch.manual_seed(layer)
    x, w, b = operands(shape, weight_shape, dtype)
    dy = torch.randn(output_like(x, w, **geometry).shape).to(dtype)
    y0, g0 = truth_of(lambda *t: reference(*t, **geometry), x, w, b, grad_output=dy)
    y1, g1 = run(lambda *t: reference(*t, **geometry), x, w, b, grad_output=dy)
    y2, g2 = run(lambda *t: reference(*t, **geometry), x.to(memory_format=LAST), w, b, grad_output=dy)
    y, g = run(lambda *t: ours(*t, **geometry), x, w, b, grad_output=dy)
    assert_relative(y, y0, [y1, y2], what="output")
    for name, got, truth, *peers in zip(("input", "weight", "bias"), g, g0, g1, g2, strict=True):
        assert_relative(got, truth, peers, kind="gradient", what=f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_accuracy(activation, dtype):
    x, w, b = operands((4, 24, 9, 9), (40, 24, 3, 3), dtype)
    r = torch.randn(4, 40, 9, 9).to(dtype)
    dy = torch.randn(4, 40, 9, 9).to(dtype)

    def fn(op):
        return lambda *t: op(*t, activation, padding=1)

    y0, g0 = truth_of(fn(reference), x, w, b, r, grad_output=dy)
    y1, g1 = run(fn(reference), x, w, b, r, grad_output=dy)
    for memory_format in (torch.contiguous_format, LAST):
        y, g = run(fn(ours), x.to(memory_format=memory_format), w, b, r, grad_output=dy)
        assert_relative(y, y0, [y1], what="output")
        for i, (got, truth, peer) in enumerate(zip(g, g0, g1, strict=True)):
            assert_relative(got, truth, [peer], kind="gradient", what=f"gradient {i}")


@st.composite
def calls(draw):
    groups = draw(st.sampled_from((1, 1, 1, 2, 3, 5, 19)))
    channels = draw(st.sampled_from((1, 2, 3, 4, 7, 16, 17))) if groups < 19 else 1
    outputs = draw(st.sampled_from((1, 2, 4, 5, 15, 16, 18, 33))) if groups < 5 else draw(st.sampled_from((1, 2, 3)))
    size = st.integers(1, 9)
    height, width = draw(size), draw(size)
    geometry = {"groups": groups}
    kernel = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    geometry["dilation"] = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    reach = [d * (k - 1) + 1 for d, k in zip(geometry["dilation"], kernel, strict=True)]
    if draw(st.integers(0, 5)) == 0:
        geometry["padding"] = "same"
    else:
        geometry["padding"] = tuple(
            draw(st.integers(max(0, (r - s + 1) // 2), max(0, (r - s + 1) // 2) + 2))
            for r, s in zip(reach, (height, width), strict=True)
        )
        geometry["stride"] = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 5)), channels * groups, height, width)
    weight_shape = (outputs * groups, channels, *kernel)
    return (
        shape,
        weight_shape,
        geometry,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.sampled_from(("none", "full", "channel"))),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 2**20)),
    )


def _residual(kind, shape, dtype):
    if kind == "none":
        return None
    return torch.randn(shape if kind == "full" else (*shape[:2], 1, 1)).to(dtype)


@settings(max_examples=2000)
@given(calls())
def test_generated(call):
    shape, weight_shape, geometry, dtype, activation, residual, bias, last, seed = call
    torch.manual_seed(seed)
    x, w, b = operands(shape, weight_shape, dtype, bias)
    x = x.contiguous(memory_format=LAST) if last else x
    z = output_like(x, w, **geometry)
    r = _residual(residual, z.shape, dtype)
    with torch.no_grad():
        y = ours(x, w, b, r, activation, **geometry)
    truth, _ = truth_of(lambda *t: reference(*t, activation, **geometry), x, w, b, r)
    terms = w[0].numel() + 2
    magnitude = reference(*(None if t is None else t.double().abs() for t in (x, w, b, r)), **geometry)
    if activation == "gelu_tanh" or activation == "gelu" or activation == "silu":
        magnitude = 2 * magnitude  # their slope reaches 1.13, and they add roundings of their own
    elif activation in ("sigmoid", "tanh"):
        magnitude = magnitude + 1
    assert_elementwise(y, truth, magnitude, terms, "output")
    if seed % 4:
        return
    dy = torch.randn(z.shape).to(dtype)
    _, grads = run(lambda x, w: ours(x, w, **geometry), x, w, grad_output=dy)
    _, truths = truth_of(lambda x, w: reference(x, w, **geometry), x, w, grad_output=dy)
    _, sizes = truth_of(lambda x, w: reference(x, w, **geometry), x.abs(), w.abs(), grad_output=dy.abs())
    pixels = dy[:, 0].numel()
    assert_elementwise(grads[0], truths[0], sizes[0], weight_shape[0] * weight_shape[2] * weight_shape[3], "input")
    assert_elementwise(grads[1], truths[1], sizes[1], pixels, "weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", range(len(LAYERS) + len(SAMPLES)))
def test_exact(sample, dtype):
    shape, weight_shape, geometry = (LAYERS + SAMPLES)[sample]
    x, w, b = integers(shape, dtype), integers(weight_shape, dtype, low=-1, high=1), integers((weight_shape[0],), dtype)
    z = output_like(x, w, **geometry)
    r, dy = integers(z.shape, dtype), integers(z.shape, dtype, low=-1, high=1)
    y0, g0 = truth_of(lambda *t: reference(*t, "relu", **geometry), x, w, b, r, grad_output=dy)
    y, g = run(lambda *t: ours(*t, "relu", **geometry), x, w, b, r, grad_output=dy)
    assert_bitwise(y, y0.to(dtype), "output")
    for i, (got, truth) in enumerate(zip(g, g0, strict=True)):
        assert_bitwise(got, truth.to(dtype), f"gradient {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sample",
    [
        ((3, 17, 6, 5), (21, 17, 3, 3), {"padding": 1}),
        ((3, 16, 6, 6), (32, 16, 1, 1), {}),
        ((3, 3, 6, 5), (18, 3, 3, 3), {"padding": 1, "stride": 2}),
        ((3, 32, 6, 5), (2, 32, 3, 3), {"padding": 1, "dilation": 2}),
        ((2, 20, 6, 5), (20, 1, 3, 3), {"padding": 1, "groups": 20}),
    ],
)
def test_layouts(sample, dtype):
    shape, weight_shape, geometry = sample
    x, w, b = operands(shape, weight_shape, dtype)
    r = torch.randn(output_like(x, w, **geometry).shape).to(dtype)
    dy = torch.randn(r.shape).to(dtype)
    tensors = [x, w, b, r, dy]

    def results(x, w, b, r, dy):
        y, grads = run(lambda *t: ours(*t, "silu", **geometry), x, w, b, r, grad_output=dy)
        return y, *grads

    expected = results(*tensors)
    for i in range(len(tensors)):
        for name, tensor in layouts(tensors[i]):
            got = results(*(tensor if j == i else t for j, t in enumerate(tensors)))
            for k, (a, e) in enumerate(zip(got, expected, strict=True)):
                assert_bitwise(a, e, f"operand {i} as {name}, result {k}")
    got = results(x, w, b, r, constant(r.shape, 0.75, dtype))
    for a, e in zip(got, results(x, w, b, r, torch.full_like(r, 0.75)), strict=True):
        assert_bitwise(a, e, "constant grad_output")


def test_residual_broadcast():
    x, w, b = operands((3, 8, 5, 5), (12, 8, 3, 3), torch.float64)
    for shape in ((3, 12, 1, 1), (12, 1, 1), (1, 12, 5, 5), (5,), (), (3, 1, 5, 1)):
        r = torch.randn(shape, dtype=torch.float64)
        y0, g0 = run(lambda *t: reference(*t, "tanh", padding=1), x, w, b, r, grad_output=torch.ones(3, 12, 5, 5))
        y, g = run(lambda *t: ours(*t, "tanh", padding=1), x, w, b, r, grad_output=torch.ones(3, 12, 5, 5))
        torch.testing.assert_close(y, y0)
        torch.testing.assert_close(g, g0)
    expanded = torch.randn(3, 12, 1, 1, dtype=torch.float64).expand(3, 12, 5, 5)
    torch.testing.assert_close(ours(x, w, b, expanded, padding=1), reference(x, w, b, expanded, padding=1))


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_reproducible(layer):
    shape, weight_shape, geometry = LAYERS[layer]
    x, w, b = operands((5, *shape[1:]), weight_shape)
    dy = torch.randn(output_like(x, w, **geometry).shape)

    def results(x, dy):
        y, grads = run(lambda *t: ours(*t, None, "gelu", **geometry), x, w, b, grad_output=dy)
        return y, *grads

    expected = results(x, dy)
    for count in (1, 2, 3):
        with threads(count):
            for a, e in zip(results(x, dy), expected, strict=True):
                assert_bitwise(a, e, f"{count} threads")
    for first, last in ((0, 1), (1, 4), (4, 5)):
        y, dx, *_ = results(x[first:last], dy[first:last])
        assert_bitwise(y, expected[0][first:last], "batch slice, output")
        assert_bitwise(dx, expected[1][first:last], "batch slice, input gradient")
    for a, e in zip(results(x.to(memory_format=LAST), dy), expected, strict=True):
        assert_bitwise(a, e, "channels last")


def test_nothing_else_written():
    x, w, b = operands((2, 5, 7, 6), (19, 5, 3, 3))
    r, dy = torch.randn(2, 19, 7, 6), torch.randn(2, 19, 7, 6)
    cages = [Canary(t) for t in (x, w, b, r, dy)]
    y, grads = run(lambda *t: ours(*t, "silu", padding=1), *(c.tensor for c in cages[:4]), grad_output=cages[4].tensor)
    y0, g0 = run(lambda *t: ours(*t, "silu", padding=1), x, w, b, r, grad_output=dy)
    for cage in cages:
        cage.assert_untouched()
    for a, e in zip((y, *grads), (y0, *g0), strict=True):
        assert_bitwise(a, e, "inside guards")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_shape", [(20, 5, 3, 3), (2, 17, 3, 3), (18, 2, 1, 3)])
def test_nonfinite(weight_shape, dtype):
    x, w, b = operands((3, weight_shape[1], 7, 7), weight_shape, dtype)
    x[0, 0, 3, 3], x[1, 1, 0, 0], x[2, 0, 6, 6] = float("nan"), float("inf"), float("-inf")
    y0, _ = truth_of(lambda *t: reference(*t, padding=1), x, w, b)
    assert_nonfinite(ours(x, w, b, padding=1), y0)
    dy = torch.ones(y0.shape, dtype=dtype)
    dy[0, 0, 2, 4], dy[1, 1, 3, 3] = float("nan"), float("inf")
    x = torch.randn(x.shape).to(dtype)
    _, g0 = truth_of(lambda *t: reference(*t, padding=1), x, w, grad_output=dy)
    _, g = run(lambda *t: ours(*t, padding=1), x, w, grad_output=dy)
    for got, truth in zip(g, g0, strict=True):
        assert_nonfinite(got, truth)


@pytest.mark.parametrize("sample", range(len(SAMPLES)))
@pytest.mark.parametrize("batched", [True, False])
def test_torch_samples(sample, batched):
    shape, weight_shape, geometry = SAMPLES[sample]
    x, w, b = operands(shape if batched else shape[1:], weight_shape, torch.float64)
    dy = torch.randn(output_like(x, w, **geometry).shape, dtype=torch.float64)
    y0, g0 = run(lambda *t: reference(*t, **geometry), x, w, b, grad_output=dy)
    y, g = run(lambda *t: ours(*t, **geometry), x, w, b, grad_output=dy)
    torch.testing.assert_close((y, *g), (y0, *g0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    x, w, b = operands((2, 4, 4, 3), (4, 2, 3, 2), torch.float64)
    r = torch.randn(2, 4, 1, 1, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, b, r)]

    def fn(x, w, b, r):
        return ours(x, w, b, r, activation, padding=(1, 1), stride=(2, 1), groups=2)

    assert gradcheck(fn, leaves, fast_mode=True)
    assert gradgradcheck(fn, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("weight_shape", "geometry"),
    [((3, 4, 2, 3), {"padding": "same"}), ((4, 1, 3, 3), {"groups": 4, "padding": 1}), ((3, 4, 2, 2), {"dilation": 2})],
)
def test_gradgradcheck_geometry(weight_shape, geometry):
    leaves = [t.requires_grad_() for t in operands((2, 4, 4, 5), weight_shape, torch.float64)]
    assert gradcheck(lambda *t: ours(*t, **geometry), leaves)
    assert gradgradcheck(lambda *t: ours(*t, **geometry), leaves)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_partial_gradients(wanted):
    tensors = operands((2, 4, 5, 5), (6, 4, 3, 3), torch.float64)
    for t, want in zip(tensors, wanted, strict=True):
        t.requires_grad_(bool(want))
    inputs = [t for t in tensors if t.requires_grad]
    got = torch.autograd.grad(ours(*tensors, None, "silu").sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(reference(*tensors, None, "silu").sum(), inputs))


def test_opcheck():
    x, w, b = operands((2, 4, 5, 5), (6, 4, 3, 3))
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1], 1, 0, False)
    dy = torch.randn(2, 6, 5, 5)
    ops = torch.ops.pynn
    for x_ in (x, x.to(memory_format=LAST)):
        torch.library.opcheck(ops.conv2d_fwd.default, (x_, w, b, dy, *geometry, 3, True))
        torch.library.opcheck(ops.conv2d_fwd.default, (x_, w, None, None, *geometry, 0, False))
        torch.library.opcheck(ops.conv2d_bwd_weight.default, (dy, x_, [3, 3], *geometry, True))
    torch.library.opcheck(ops.conv2d_bwd_input.default, (dy, w, list(x.shape), *geometry, True))
    torch.library.opcheck(ops.conv2d_bwd_activation.default, (dy, dy, 3))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_transforms(activation):
    x, w, b = operands((2, 4, 5, 5), (6, 4, 3, 3), torch.float64)
    r = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert_all(lambda x, w, b, r: ours(x, w, b, r, activation, padding=1), x, w, b, r)


def test_inductor():
    x, w, b = operands((2, 4, 5, 5), (6, 4, 3, 3))
    assert_compiles(lambda x, w, b: ours(x.relu(), w, b, None, "gelu", padding=1) * 2, x, w, b, backend="inductor")


def test_per_sample_gradients():
    x, w, b = operands((3, 4, 5, 5), (6, 4, 3, 3), torch.float64)

    def loss(fn):
        return lambda w, x: fn(x.unsqueeze(0), w, b, None, "gelu", padding=1).square().sum()

    got = torch.vmap(torch.func.grad(loss(ours)), in_dims=(None, 0))(w, x)
    torch.testing.assert_close(got, torch.vmap(torch.func.grad(loss(reference)), in_dims=(None, 0))(w, x))


def test_autocast():
    x, w, b = operands((2, 4, 5, 5), (6, 4, 3, 3))
    w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d(x, w, b, activation="relu")
    assert y.dtype is torch.bfloat16
    expected = reference(*(t.bfloat16() for t in (x, w, b)), None, "relu")
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert w.grad.dtype is torch.float32


def test_memory_format():
    def formats(x, w):
        return [fn(x, w, padding=1).stride() for fn in (conv2d, F.conv2d)]

    x, w, _ = operands((2, 4, 5, 5), (6, 4, 3, 3))
    for a in (x, x.to(memory_format=LAST), x.permute(0, 1, 3, 2)):
        for b in (w, w.to(memory_format=LAST)):
            got, expected = formats(a, b)
            assert got == expected
    got, expected = formats(*operands((2, 1, 5, 5), (6, 1, 3, 3))[:2])
    assert got == expected


def test_empty():
    w, b = torch.randn(6, 4, 3, 3, requires_grad=True), torch.randn(6, requires_grad=True)
    x = torch.randn(0, 4, 5, 5, requires_grad=True)
    y = conv2d(x, w, b, activation="silu")
    assert y.shape == (0, 6, 3, 3)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not w.grad.any()
    assert not b.grad.any()
    y = conv2d(torch.randn(2, 0, 5, 5), torch.randn(6, 0, 3, 3), b)  # a sum of no products is 0
    assert_bitwise(y, b.detach().view(1, 6, 1, 1).expand(2, 6, 3, 3), "no input channels")


MESSAGES = [
    (((2, 3, 8, 8), (4, 2, 3, 3)), {}, "to have 2 channels, but got 3 channels instead"),
    (
        ((8, 8), (4, 2, 3, 3)),
        {},
        r"Expected 3D \(unbatched\) or 4D \(batched\) input to conv2d, but got input of size: \[8, 8\]",
    ),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"stride": 0}, "non-positive stride is not supported"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"padding": -1}, "negative padding is not supported"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"dilation": 0}, r"dilation should be greater than zero, but got \[0, 0\]"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"groups": 0}, "non-positive groups is not supported"),
    (((2, 6, 8, 8), (2, 2, 3, 3)), {"groups": 3}, "expected weight to be at least 3 at dimension 0"),
    (((2, 4, 8, 8), (3, 2, 3, 3)), {"groups": 2}, "expected weight to be divisible by 2 at dimension 0"),
    (((2, 3, 2, 2), (4, 3, 3, 3)), {}, r"Calculated padded input size per channel: \(2 x 2\). Kernel size: \(3 x 3\)"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"stride": (1, 1, 1)}, r"but got stride=\[1, 1, 1\]"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"padding": "foo"}, "Invalid padding string: 'foo'"),
]


@pytest.mark.parametrize("case", range(len(MESSAGES)))
def test_messages(case):
    shapes, geometry, message = MESSAGES[case]
    with pytest.raises(RuntimeError, match=message):
        conv2d(*(torch.randn(s) for s in shapes), **geometry)


def test_other_messages():
    x, w, b = operands((2, 3, 8, 8), (4, 3, 3, 3))
    with pytest.raises(RuntimeError, match="expected bias to be 1-dimensional with 4 elements, but got bias of size"):
        conv2d(x, w, b[:3])
    with pytest.raises(RuntimeError, match=r"Input type \(float32\) and bias type \(float64\) should be the same"):
        conv2d(x, w, b.double())
    with pytest.raises(RuntimeError, match="residual"):
        conv2d(x, w, b, residual=torch.randn(2, 4, 8, 8))
    with pytest.raises(RuntimeError, match="float64, float32, float16 or bfloat16"):
        conv2d(x.int(), w.int())
    with pytest.raises(ValueError, match="activation"):
        conv2d(x, w, b, activation="elu")


def bad_call(rng: random.Random):
    """A call of the public function or of an op that must fail."""
    sizes = lambda n: [rng.choice((1, 2, 3, 5)) for _ in range(n)]  # noqa: E731
    dtype = rng.choice(DTYPES)
    x, w, dy = torch.randn(2, 4, 6, 6).to(dtype), torch.randn(6, 4, 3, 3).to(dtype), torch.randn(2, 6, 6, 6).to(dtype)
    b = torch.randn(6).to(dtype)
    stride, padding, dilation, groups = [1, 1], [1, 1, 1, 1], [1, 1], 1
    huge = rng.choice((-1, -(2**40), 2**31, 2**40, 2**62, 2**63 - 1))
    ops, kind = torch.ops.pynn, rng.randrange(12)
    if kind == 0:
        x = torch.randn(sizes(rng.choice((0, 1, 2, 3, 5))))
    elif kind == 1:
        w = torch.randn(sizes(rng.choice((0, 1, 2, 3, 5)))).to(dtype)
    elif kind == 2:
        x, dy = torch.randn(2, rng.choice((1, 3, 5, 8)), 6, 6).to(dtype), dy[:, :5]
    elif kind == 3:
        stride = rng.choice(([0, 1], [-1, 1], [1], [1, 1, 1], [], [huge | 1 << 40, 1], [1, 0]))
    elif kind == 4:
        padding = rng.choice(([1, 1], [-1, 1, 1, 1], [huge, 1, 1, 1], [1, 1, 1, huge], [], [1] * 5))
    elif kind == 5:
        dilation = rng.choice(([0, 1], [huge, 1], [1, huge], [1], [4, 4], [2**31 - 1, 1]))
    elif kind == 6:
        groups = rng.choice((0, -1, 2, 3, 4, 5, 6, huge))
    elif kind == 7:
        w = w.to(rng.choice([d for d in (*DTYPES, torch.int64, torch.bool) if d is not dtype]))
        dy = dy.to(torch.int32)
    elif kind == 8:
        w, dy, x = torch.randn(6, 4, 9, 9).to(dtype), dy[:, :, 1:], x
    elif kind == 9:
        x, dy, dtype = x.to(torch.complex64), dy.to(torch.complex64), torch.complex64
    elif kind == 10:
        return "sparse", lambda: ops.conv2d_bwd_weight(
            dy.to_sparse(), x, [3, 3], stride, padding, dilation, 1, 0, False, True
        )
    else:
        which = rng.randrange(5)
        if which == 0:
            return f"activation {huge}", lambda: ops.conv2d_fwd(
                x, w, b, None, stride, padding, dilation, 1, 0, False, huge, False
            )
        if which == 1:
            return "bias", lambda: ops.conv2d_fwd(
                x, w, b[: rng.randrange(6)], None, stride, padding, dilation, 1, 0, False, 0, False
            )
        if which == 2:
            r = torch.randn(rng.choice(((2, 6, 5, 5), (1, 2, 6, 6, 6), (7,), (0,), (2, 5, 1, 1)))).to(dtype)
            return "residual", lambda: ops.conv2d_fwd(x, w, b, r, stride, padding, dilation, 1, 0, False, 0, False)
        if which == 3:
            shape = rng.choice(
                ([2, 4, 6], [2, 4, 6, -6], [2, 4, huge, 6], [2, 5, 6, 6], [3, 4, 6, 6], [2, 4, 7, 6], [])
            )
            return f"shape {shape}", lambda: ops.conv2d_bwd_input(
                dy, w, shape, stride, padding, dilation, 1, 0, False, True
            )
        saved = torch.randn(rng.choice(((2, 6, 6, 5), (2, 6, 6), ()))).to(dtype)
        return "saved", lambda: ops.conv2d_bwd_activation(dy, saved, 3)
    geometry = (stride, padding, dilation, groups, 0, False)
    call = rng.choice((0, 1) if kind in (2, 4, 6) else (0, 1, 2, 3))
    text = f"{kind}/{call}: {tuple(x.shape)} {x.dtype} {tuple(w.shape)} {w.dtype} {geometry}"
    if call == 0 or kind in (1, 8):
        return text, lambda: ops.conv2d_fwd(x, w, None, None, *geometry, 0, False)
    if call == 1:
        return text, lambda: ops.conv2d_bwd_input(dy, w, list(x.shape), *geometry, False)
    if call == 2:
        return text, lambda: ops.conv2d_bwd_weight(dy, x, list(w.shape[2:]) if kind != 7 else [0, 3], *geometry, True)
    return text, lambda: conv2d(x, w, b.to(x.dtype), stride, padding, dilation, groups)


def test_bad_calls():
    assert_rejects("test_conv2d", 500)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_module(mode):
    arguments = {"padding": (1, 2), "stride": 2, "dilation": 1, "groups": 2, "padding_mode": mode}
    torch.manual_seed(3)
    theirs = torch.nn.Conv2d(4, 6, (3, 2), **arguments)
    torch.manual_seed(3)
    module = pynn.nn.Conv2d(4, 6, (3, 2), **arguments, activation="relu")
    assert list(module.state_dict()) == list(theirs.state_dict())
    for a, b in zip(module.parameters(), theirs.parameters(), strict=True):
        assert_bitwise(a.detach(), b.detach(), "parameters")
    assert "activation=relu" in repr(module)
    x = torch.randn(2, 4, 7, 8)
    torch.testing.assert_close(module(x), theirs(x).relu())
    torch.testing.assert_close(module(x[0]), theirs(x[0]).relu())
    r = torch.randn_like(theirs(x))
    torch.testing.assert_close(module(x, r), (theirs(x) + r).relu())


def test_module_errors():
    for arguments in (
        {"groups": 3},
        {"groups": 0},
        {"padding_mode": "foo"},
        {"padding": "foo"},
        {"padding": "same", "stride": 2},
        {"activation": "foo"},
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            pynn.nn.Conv2d(4, 6, 3, **arguments)
