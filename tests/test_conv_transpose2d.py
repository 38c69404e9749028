"""conv_transpose2d: kernels on every backend against float64, exactness, layouts, derivatives; messages; the layer."""

from __future__ import annotations

import functools
import random

import pytest
import torch
import torch.nn.functional as F
from adversary import Canary, constant, layouts
from bad_input import assert_rejects
from conv2d_reference import EMULATED, FUNCTIONS, LAST, interpret_only, on, run_on
from generated import generated
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
from pynn.ops.conv2d import ACTIVATIONS
from pynn.ops.conv_transpose2d import conv_transpose2d


def reference(x, w, b=None, r=None, activation=None, **geometry):
    z = F.conv_transpose2d(x, w, b, **geometry)
    return FUNCTIONS[activation](z if r is None else z + r)


def ours(x, w, b=None, r=None, activation=None, **geometry):
    return conv_transpose2d(x, w, b, activation=activation, residual=r, **geometry)


def operands(shape, weight_shape, dtype=torch.float32, bias=True, groups=1, **_):
    """Input, weight (scaled so that outputs are of size about 1) and bias, on the CPU."""
    x, w = torch.randn(shape).to(dtype), torch.randn(weight_shape)
    w = w / (w[:, 0].numel() / groups) ** 0.5
    return x, w.to(dtype), torch.randn(weight_shape[1] * groups).to(dtype) if bias else None


def output_like(x, w, **geometry):
    return F.conv_transpose2d(x.double(), w.double(), **geometry)


# (x shape, weight shape, geometry): decoders, a head, a stem, groups, depthwise, dilation
LAYERS = [
    ((4, 64, 8, 8), (64, 32, 4, 4), {"stride": 2, "padding": 1}),
    ((2, 128, 13, 12), (128, 40, 4, 4), {"stride": 2, "padding": 1}),
    ((4, 64, 8, 8), (64, 32, 2, 2), {"stride": 2}),
    ((2, 32, 9, 7), (32, 48, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    ((2, 32, 12, 12), (32, 3, 4, 4), {"stride": 2, "padding": 1}),
    ((2, 3, 9, 9), (3, 32, 3, 3), {"padding": 1}),
    ((2, 64, 7, 7), (64, 8, 3, 3), {"stride": 2, "groups": 4, "padding": 1}),
    ((2, 40, 7, 6), (40, 1, 4, 4), {"stride": 2, "groups": 40, "padding": 1}),
    ((2, 24, 6, 5), (24, 20, 3, 2), {"stride": (3, 2), "dilation": (2, 3), "output_padding": (1, 2)}),
]
SMALL_LAYERS = [
    ((2, 32, 5, 5), (32, 24, 4, 4), {"stride": 2, "padding": 1}),
    ((1, 48, 5, 4), (48, 24, 4, 4), {"stride": 2, "padding": 1}),
    ((2, 32, 5, 5), (32, 24, 2, 2), {"stride": 2}),
    ((1, 16, 6, 5), (16, 40, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    ((1, 32, 8, 8), (32, 3, 4, 4), {"stride": 2, "padding": 1}),
    ((2, 3, 6, 6), (3, 24, 3, 3), {"padding": 1}),
    ((1, 32, 5, 5), (32, 8, 3, 3), {"stride": 2, "groups": 4, "padding": 1}),
    ((2, 24, 5, 4), (24, 1, 4, 4), {"stride": 2, "groups": 24, "padding": 1}),
    ((1, 12, 5, 4), (12, 10, 3, 2), {"stride": (3, 2), "dilation": (2, 3), "output_padding": (1, 2)}),
]


def layers(backend):
    return SMALL_LAYERS if backend.name in EMULATED else LAYERS


# torch's own test samples, and corner cases; an output_padding of the stride or more is legal where dilation exceeds it
SAMPLES = [
    ((1, 3, 4, 4), (3, 3, 3, 3), {"stride": 2, "padding": 2, "output_padding": (1, 1)}),
    (
        (2, 2, 4, 4),
        (2, 2, 4, 5),
        {"stride": (3, 2), "padding": (1, 2), "output_padding": (2, 3), "groups": 2, "dilation": (4, 4)},
    ),
    ((1, 1, 4, 5), (1, 1, 4, 3), {"stride": 2, "padding": 1, "output_padding": 1, "dilation": (2, 3)}),
    ((1, 1, 4, 3), (1, 2, 3, 4), {"stride": 2, "padding": 1, "output_padding": 1}),
    ((2, 4, 4, 4), (4, 1, 3, 3), {"groups": 4}),
    ((1, 2, 5, 5), (2, 4, 3, 3), {}),
    ((2, 3, 4, 4), (3, 2, 2, 2), {"stride": 2, "dilation": 5, "output_padding": 4}),
    ((2, 3, 4, 4), (3, 2, 2, 2), {"stride": 2, "dilation": 5, "output_padding": 4, "padding": 1}),
    ((2, 3, 1, 4), (3, 2, 1, 2), {"dilation": 3, "output_padding": 2, "padding": 1}),
    ((2, 3, 3, 4), (3, 5, 1, 2), {"stride": (4, 3)}),
    ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    ((2, 6, 1, 1), (6, 4, 4, 4), {"groups": 2}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(backend, dtype):
    """Over all layers together: their short sums differ from torch's by chance only, which must not decide."""
    columns = {"truth": [], "torch": [], "channels last": [], "ours": []}
    for shape, weight_shape, geometry in layers(backend):
        x, w, b = operands(shape, weight_shape, dtype, **geometry)
        dy = torch.randn(output_like(x, w, **geometry).shape).to(dtype)
        theirs, mine = functools.partial(reference, **geometry), functools.partial(ours, **geometry)
        last = x.to(memory_format=LAST)
        columns["truth"].append(truth_of(theirs, x, w, b, grad_output=dy))
        columns["torch"].append(run(theirs, x, w, b, grad_output=dy))
        columns["channels last"].append(run(theirs, last, w, b, grad_output=dy))
        columns["ours"].append(run_on(backend, mine, x, w, b, grad_output=dy))
    results = {
        name: [torch.cat([t.reshape(-1) for t in part]) for part in zip(*((y, *g) for y, g in rows), strict=True)]
        for name, rows in columns.items()
    }
    for i, what in enumerate(("output", "gradient of input", "gradient of weight", "gradient of bias")):
        truth, *peers, got = (results[name][i] for name in columns)
        assert_relative(got, truth, peers, kind="gradient" if i else "forward", what=what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_accuracy(backend, activation, dtype):
    x, w, b = operands((4, 64, 5, 4), (64, 40, 4, 4), dtype)
    r = torch.randn(4, 40, 10, 8).to(dtype)
    dy = torch.randn(4, 40, 10, 8).to(dtype)

    def fn(op):
        return lambda *t: op(*t, activation, stride=2, padding=1)

    y0, g0 = truth_of(fn(reference), x, w, b, r, grad_output=dy)
    y1, g1 = run(fn(reference), x, w, b, r, grad_output=dy)
    for memory_format in (torch.contiguous_format, LAST):
        y, g = run_on(backend, fn(ours), x.to(memory_format=memory_format), w, b, r, grad_output=dy)
        assert_relative(y, y0, [y1], what="output")
        # The residual's gradient is what the bias sums; beside torch's sum of torch's, its rounding would decide.
        g0[2], g1[2] = g[3].double().sum((0, 2, 3)), g[3].sum((0, 2, 3))
        for i, (got, truth, peer) in enumerate(zip(g, g0, g1, strict=True)):
            assert_relative(got, truth, [peer], kind="gradient", what=f"gradient {i}")


@st.composite
def calls(draw):
    groups = draw(st.sampled_from((1, 1, 1, 2, 3, 5, 19)))
    channels = draw(st.sampled_from((1, 2, 3, 4, 7, 16, 17))) if groups < 19 else 1
    outputs = draw(st.sampled_from((1, 2, 4, 5, 15, 16, 18, 33))) if groups < 5 else draw(st.sampled_from((1, 2, 3)))
    axes = []
    for _ in range(2):
        size, kernel, stride, dilation = (draw(st.integers(1, most)) for most in (7, 5, 3, 3))
        extra = draw(st.integers(0, max(stride, dilation) - 1))
        largest = ((size - 1) * stride + dilation * (kernel - 1) + extra) // 2
        axes.append((size, kernel, stride, dilation, extra, draw(st.integers(0, min(3, largest)))))
    sizes, kernel, stride, dilation, extra, padding = zip(*axes, strict=True)
    names = "stride", "dilation", "output_padding", "padding", "groups"
    return {
        "shape": (draw(st.integers(1, 4)), channels * groups, *sizes),
        "weight_shape": (channels * groups, outputs, *kernel),
        "geometry": dict(zip(names, (stride, dilation, extra, padding, groups), strict=True)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "residual": draw(st.sampled_from(("none", "full", "channel"))),
        "bias": draw(st.booleans()),
        "last": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**20)),
    }


@generated(calls())
def test_generated(backend, call):
    geometry, dtype, activation = call["geometry"], call["dtype"], call["activation"]
    torch.manual_seed(call["seed"])
    x, w, b = operands(call["shape"], call["weight_shape"], dtype, call["bias"], **geometry)
    x = x.contiguous(memory_format=LAST) if call["last"] else x
    z = output_like(x, w, **geometry)
    r = {"none": None, "full": torch.randn(z.shape).to(dtype), "channel": torch.randn(*z.shape[:2], 1, 1).to(dtype)}[
        call["residual"]
    ]
    with torch.no_grad():
        y = ours(*on(backend, x, w, b, r), activation, **geometry).cpu()
    truth, _ = truth_of(lambda *t: reference(*t, activation, **geometry), x, w, b, r)
    magnitude = reference(*(None if t is None else t.double().abs() for t in (x, w, b, r)), **geometry)
    if activation in ("gelu_tanh", "gelu", "silu"):
        magnitude = 2 * magnitude  # their slope reaches 1.13, and they add roundings of their own
    elif activation in ("sigmoid", "tanh"):
        magnitude = magnitude + 1
    assert_elementwise(y, truth, magnitude, w[:, 0].numel() + 2, "output")
    if call["seed"] % 4:
        return
    dy = torch.randn(z.shape).to(dtype)
    _, grads = run_on(backend, lambda x, w: ours(x, w, **geometry), x, w, grad_output=dy)
    _, truths = truth_of(lambda x, w: reference(x, w, **geometry), x, w, grad_output=dy)
    _, sizes = truth_of(lambda x, w: reference(x, w, **geometry), x.abs(), w.abs(), grad_output=dy.abs())
    assert_elementwise(grads[0], truths[0], sizes[0], w[0].numel(), "input")
    assert_elementwise(grads[1], truths[1], sizes[1], x[:, 0].numel(), "weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", range(len(LAYERS) + len(SAMPLES)))
def test_exact(backend, sample, dtype):
    shape, weight_shape, geometry = (layers(backend) + SAMPLES)[sample]
    x, w = integers(shape, dtype), integers(weight_shape, dtype, low=-1, high=1)
    z = output_like(x, w, **geometry)
    b, r, dy = integers(z.shape[1:2], dtype), integers(z.shape, dtype), integers(z.shape, dtype, low=-1, high=1)
    y0, g0 = truth_of(lambda *t: reference(*t, "relu", **geometry), x, w, b, r, grad_output=dy)
    y, g = run_on(backend, lambda *t: ours(*t, "relu", **geometry), x, w, b, r, grad_output=dy)
    assert_bitwise(y, y0.to(dtype), "output")
    for i, (got, truth) in enumerate(zip(g, g0, strict=True)):
        assert_bitwise(got, truth.to(dtype), f"gradient {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sample",
    [
        ((3, 17, 5, 4), (17, 21, 4, 4), {"stride": 2, "padding": 1}),
        ((3, 16, 4, 4), (16, 32, 2, 2), {"stride": 2}),
        ((3, 32, 4, 3), (32, 2, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
        ((2, 20, 5, 4), (20, 1, 3, 3), {"groups": 20, "padding": 1}),
    ],
)
def test_layouts(backend, sample, dtype):
    interpret_only(backend, dtype is torch.float32)
    shape, weight_shape, geometry = sample
    x, w, b = operands(shape, weight_shape, dtype, **geometry)
    r = torch.randn(output_like(x, w, **geometry).shape).to(dtype)
    tensors = on(backend, x, w, b, r, torch.randn(r.shape).to(dtype))

    def results(*tensors):
        *leaves, dy = tensors
        y, grads = run(lambda *t: ours(*t, "silu", **geometry), *leaves, grad_output=dy)
        return y, *grads

    expected = results(*tensors)
    for i in range(len(tensors)):
        for name, tensor in layouts(tensors[i]):
            got = results(*(tensor if j == i else t for j, t in enumerate(tensors)))
            for k, (a, e) in enumerate(zip(got, expected, strict=True)):
                if k == 3:  # the bias gradient is torch's sum, whose order follows the layout
                    torch.testing.assert_close(a, e)
                else:
                    assert_bitwise(a, e, f"operand {i} as {name}, result {k}")
    same = constant((), 0.75, dtype).to(backend.device).expand(r.shape)
    for a, e in zip(results(*tensors[:4], same), results(*tensors[:4], same.contiguous()), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_reproducible(backend, layer):
    shape, weight_shape, geometry = layers(backend)[layer]
    x, w, b = operands((5, *shape[1:]), weight_shape, **geometry)
    dy = torch.randn(output_like(x, w, **geometry).shape)
    x, w, b, dy = on(backend, x, w, b, dy)

    def results(x, dy):
        y, grads = run(lambda *t: ours(*t, None, "gelu", **geometry), x, w, b, grad_output=dy)
        return y, *grads[:2]

    expected = results(x, dy)
    for count in (1, 2, 3) if backend.name == "cpu" else (1,):
        with threads(count):
            for a, e in zip(results(x, dy), expected, strict=True):
                assert_bitwise(a, e, f"{count} threads")
    for first, last in ((0, 1), (1, 4), (4, 5)):
        y, dx, *_ = results(x[first:last], dy[first:last])
        assert_bitwise(y, expected[0][first:last], "batch slice, output")
        assert_bitwise(dx, expected[1][first:last], "batch slice, input gradient")
    for a, e in zip(results(x.to(memory_format=LAST), dy), expected, strict=True):
        assert_bitwise(a, e, "channels last")


def test_nothing_else_written(backend):
    x, w, b = operands((2, 5, 4, 3), (5, 19, 4, 4))
    tensors = on(backend, x, w, b, torch.randn(2, 19, 8, 6), torch.randn(2, 19, 8, 6))
    cages = [Canary(t) for t in tensors]
    fn = lambda *t: ours(*t, "silu", stride=2, padding=1)  # noqa: E731
    y, grads = run(fn, *(c.tensor for c in cages[:4]), grad_output=cages[4].tensor)
    y0, g0 = run(fn, *tensors[:4], grad_output=tensors[4])
    for cage in cages:
        cage.assert_untouched()
    for a, e in zip((y, *grads), (y0, *g0), strict=True):
        assert_bitwise(a, e, "inside guards")


@pytest.mark.parametrize("channels", [5, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite(backend, dtype, channels):
    size = 5 if channels == 5 or backend.name in EMULATED else 12
    x, w, b = operands((4, channels, size, size), (channels, 20, 4, 4), dtype)
    x[0, 0, 3, 3], x[1, 1, 0, 0], x[2, 0, 4, 4] = float("nan"), float("inf"), float("-inf")
    y0, _ = truth_of(lambda *t: reference(*t, stride=2, padding=1), x, w, b)
    y, _ = run_on(backend, lambda *t: ours(*t, stride=2, padding=1), x, w, b)
    assert_nonfinite(y, y0)


@pytest.mark.parametrize("sample", range(len(SAMPLES)))
@pytest.mark.parametrize("batched", [True, False])
def test_torch_samples(backend, sample, batched):
    shape, weight_shape, geometry = SAMPLES[sample]
    x, w, b = operands(shape if batched else shape[1:], weight_shape, torch.float64, **geometry)
    dy = torch.randn(output_like(x, w, **geometry).shape, dtype=torch.float64)
    for bias in (b, None):
        y0, g0 = run(lambda *t: reference(*t, **geometry), x, w, bias, grad_output=dy)
        y, g = run_on(backend, lambda *t: ours(*t, **geometry), x, w, bias, grad_output=dy)
        torch.testing.assert_close((y, *g), (y0, *g0))


@pytest.mark.parametrize("geometry", [SAMPLES[i][2] for i in (0, 6, 7)])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "tanh"])
def test_gradcheck(backend, activation, geometry):
    interpret_only(backend, activation in (None, "silu"))
    x, w, b = operands((2, 2, 3, 2), (2, 3, 3, 2), torch.float64)
    shape = output_like(x, w, **geometry).shape
    leaves = on(backend, x, w, b, torch.randn(*shape[:2], 1, 1, dtype=torch.float64))
    leaves = [t.requires_grad_() for t in leaves]
    assert gradcheck(lambda *t: ours(*t, activation, **geometry), leaves, fast_mode=True)
    assert gradgradcheck(lambda *t: ours(*t, activation, **geometry), leaves, fast_mode=True)


def test_opcheck(backend):
    x, w, b = on(backend, *operands((2, 4, 3, 3), (4, 6, 4, 4)))
    residual = torch.randn(2, 6, 7, 7, device=backend.device)
    geometry = ([2, 2], [1, 1], [1, 1], [1, 1], 1, False)
    for x_ in (x, x.to(memory_format=LAST)):
        torch.library.opcheck(backend.ops.conv_transpose2d_fwd.default, (x_, w, b, residual, *geometry, 3, True))
        torch.library.opcheck(backend.ops.conv_transpose2d_fwd.default, (x_, w, None, None, *geometry, 0, False))


def test_empty(backend):
    x, w, b = (torch.randn(s, device=backend.device, requires_grad=True) for s in ((0, 4, 5, 5), (4, 6, 3, 3), (6,)))
    y = ours(x, w, b, None, "silu", stride=2)
    assert y.shape == (0, 6, 11, 11)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not w.grad.any()
    assert not b.grad.any()


# From here on around the kernels: the same for every backend.


@pytest.mark.parametrize("activation", [None, "silu"])
def test_transforms(activation):
    x, w, b = operands((2, 4, 3, 3), (4, 3, 4, 4), torch.float64, groups=2)
    r = torch.randn(2, 6, 6, 6, dtype=torch.float64)
    assert_all(lambda x, w, b, r: ours(x, w, b, r, activation, stride=2, padding=1, groups=2), x, w, b, r)


@pytest.mark.parametrize("groups", [1, 2])
def test_vmap_makes_one_call(groups):
    x, w, b = operands((2, 4, 3, 3), (4, 6 // groups, 3, 3), torch.float64, groups=groups)
    for dims in ((0, None, None), (None, 0, None), (0, 0, 0), (0, 0, None)):
        tensors = [t if dim is None else torch.stack((t, 2 * t, -t)) for t, dim in zip((x, w, b), dims, strict=True)]
        with pynn.explain() as ran:
            got = torch.vmap(lambda *t: ours(*t, None, "tanh", stride=2, groups=groups), in_dims=dims)(*tensors)
        assert [call.op for call in ran] == ["conv_transpose2d_fwd"]
        for i in range(3):
            one = (t if dim is None else t[i] for t, dim in zip(tensors, dims, strict=True))
            torch.testing.assert_close(got[i], reference(*one, None, "tanh", stride=2, groups=groups))


def test_inductor():
    x, w, b = operands((2, 4, 5, 5), (4, 6, 3, 3))
    assert_compiles(lambda x, w, b: ours(x.relu(), w, b, None, "gelu", stride=2) * 2, x, w, b, backend="inductor")


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_partial_gradients(wanted):
    """Only the gradients that are asked for are computed."""
    tensors = operands((2, 4, 5, 5), (4, 6, 3, 3), torch.float64)
    for t, want in zip(tensors, wanted, strict=True):
        t.requires_grad_(bool(want))
    inputs = [t for t in tensors if t.requires_grad]
    with pynn.explain() as ran:
        got = torch.autograd.grad(ours(*tensors, stride=2).square().sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(reference(*tensors, stride=2).square().sum(), inputs))
    expected = ["conv_transpose2d_fwd"] + ["conv2d_fwd"] * wanted[0] + ["conv2d_bwd_weight"] * wanted[1]
    assert [c.op for c in ran] == expected


def test_autocast():
    x, w, b = operands((2, 4, 5, 5), (4, 6, 3, 3))
    w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x, w, b, None, "relu")
    assert y.dtype is torch.bfloat16
    expected = reference(*(t.bfloat16() for t in (x, w, b)), None, "relu")
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert w.grad.dtype is torch.float32


def test_memory_format():
    x, w, _ = operands((2, 4, 5, 5), (4, 6, 3, 3))
    for a in (x, x.to(memory_format=LAST), x.permute(0, 1, 3, 2)):
        for b in (w, w.to(memory_format=LAST)):
            for one, other in ((a, b), (a[:, :1], b[:1])):
                assert ours(one, other).stride() == F.conv_transpose2d(one, other).stride()


X, W = (2, 4, 5, 5), (4, 3, 3, 3)
MESSAGES = [
    ((2, 3, 5, 5), W, {}, "to have 4 channels, but got 3 channels instead"),
    ((5, 5), W, {}, r"Expected 3D \(unbatched\) or 4D \(batched\) input to conv_transpose2d, but got input of size"),
    (X, W, {"groups": 3}, "Given groups=3, expected weight to be divisible by 3 at dimension 0"),
    (X, W, {"groups": 0}, "non-positive groups is not supported"),
    (X, W, {"stride": 0}, "non-positive stride is not supported"),
    (X, W, {"padding": -1}, "negative padding is not supported"),
    (X, W, {"output_padding": -1}, "negative output_padding is not supported"),
    (X, W, {"output_padding": 2, "stride": 2}, "output padding must be smaller than either stride or dilation, but"),
    (X, W, {"output_padding": (1, 1, 1)}, r"expected output_padding to be a single integer value .*=\[1, 1, 1\]"),
    (X, W, {"stride": (1, 1, 1)}, r"expected stride to be a single integer value .* stride=\[1, 1, 1\]"),
    (X, W, {"padding": (1, 1, 1)}, r"expected padding to be a single integer value .* padding=\[1, 1, 1\]"),
    ((2, 4, 0, 5), W, {}, "Only zero batch or zero channel inputs are supported, but got input shape: "),
]
OURS = [  # where torch's own message is about its library, or its argument parser
    (X, W, {"dilation": 0}, r"dilation should be greater than zero, but got \[0, 0\]"),
    ((2, 4, 1, 1), W, {"padding": 2}, r"Calculated output size per channel: \(-1 x -1\). Output size is too small"),
    (X, (4, 3, 3), {}, "Expected 4-dimensional weight for 4-dimensional input"),
    (X, (4, 3, 0, 3), {}, "expected a kernel of at least 1 x 1"),
    (X, W, {"stride": 2**40}, "expected stride below 2[*][*]31"),
]


@pytest.mark.parametrize("case", range(len(MESSAGES) + len(OURS)))
def test_messages(case):
    shape, weight_shape, geometry, message = (MESSAGES + OURS)[case]
    for fn in (conv_transpose2d, F.conv_transpose2d)[: 2 if case < len(MESSAGES) else 1]:
        with pytest.raises(RuntimeError, match=message):
            fn(torch.randn(shape), torch.randn(weight_shape), **geometry)


def test_other_messages():
    x, w, b = operands(X, W)
    for fn in (conv_transpose2d, F.conv_transpose2d):
        with pytest.raises(RuntimeError, match="expected bias to be 1-dimensional with 3 elements, but got bias of si"):
            fn(x, w, b[:2])
        with pytest.raises(RuntimeError, match=r"Input type .* and bias type .* should be the same"):
            fn(x, w, b.double())
        with pytest.raises(RuntimeError, match=r"Input type .* and weight type .* should be the same"):
            fn(x, w.double(), b)
    with pytest.raises(RuntimeError, match="conv_transpose2d: expected residual that can be expanded to"):
        conv_transpose2d(x, w, b, residual=torch.randn(2, 3, 5, 5))
    with pytest.raises(RuntimeError, match="float64, float32, float16 or bfloat16"):
        conv_transpose2d(x.int(), w.int())
    with pytest.raises(ValueError, match="activation"):
        conv_transpose2d(x, w, b, activation="elu")


def bad_call(rng: random.Random):
    """A call of the public function or of the op that must fail."""
    dtype = rng.choice(DTYPES)
    x, w, b = torch.randn(2, 4, 5, 5).to(dtype), torch.randn(4, 3, 3, 3).to(dtype), torch.randn(3).to(dtype)
    values = {"stride": [2, 2], "padding": [1, 1], "output_padding": [1, 1], "dilation": [1, 1], "groups": 1}
    huge = rng.choice((-1, -(2**40), 2**31, 2**40, 2**62, 2**63 - 1))
    residual, activation = None, 0
    kind = rng.choice(("input", "weight", "channels", "list", "groups", "dtype", "bias", "residual", "activation"))
    sizes = [rng.choice((1, 2, 3, 5)) for _ in range(rng.choice((0, 1, 2, 5)))]
    if kind == "input":
        x = torch.randn(sizes).to(dtype) if rng.random() < 0.7 else x[:, :, : rng.choice((0, 0)), :]
    elif kind == "weight":
        w = torch.randn(sizes).to(dtype) if rng.random() < 0.7 else w[:, :, :, :0]
    elif kind == "channels":
        x = torch.randn(2, rng.choice((0, 1, 3, 5, 8)), 5, 5).to(dtype)
    elif kind == "list":
        name = rng.choice(("stride", "padding", "output_padding", "dilation"))
        bad = [[-1, 1], [1, -1], [], [1, 1, 1], [huge | 1 << 40, 1], [1, huge | 1 << 40], [2**31, 1]]
        extra = {"padding": [[99, 1], [1, 99]], "output_padding": [[2, 1], [1, 5]]}
        values[name] = rng.choice(bad + extra.get(name, [[0, 1], [1, 0]]))
        if name == "dilation" and values[name] == [2**31, 1]:
            values["output_padding"] = [0, 0]
    elif kind == "groups":
        values["groups"] = rng.choice((0, -1, 3, 5, 8, huge))
    elif kind == "dtype":
        w = w.to(rng.choice([d for d in (*DTYPES, torch.int64, torch.bool, torch.complex64) if d is not dtype]))
    elif kind == "bias":
        b = rng.choice((b[:2], b[:, None], b.to(torch.float64 if dtype is not torch.float64 else torch.float16)))
    elif kind == "residual":
        residual = torch.randn(rng.choice(((2, 3, 5, 5), (1, 2, 3, 10, 10), (7,), (0,), (2, 4, 1, 1)))).to(dtype)
    else:
        activation = rng.choice((-1, 8, huge))
    text = f"{kind}: {tuple(x.shape)} {tuple(w.shape)} {w.dtype} {tuple(b.shape)} {b.dtype} {values} {activation}"
    if activation == 0 and rng.random() < 0.5:
        return text, lambda: conv_transpose2d(x, w, b, residual=residual, **values)
    geometry = [values[k] for k in ("stride", "padding", "output_padding", "dilation", "groups")]
    op = torch.ops.pynn.conv_transpose2d_fwd
    return text, lambda: op(x, w, b, residual, *geometry, False, activation, False)


def test_bad_calls():
    assert_rejects("test_conv_transpose2d", 500)


def test_module():
    arguments = {"stride": 2, "padding": (1, 0), "output_padding": (0, 1), "groups": 2, "dilation": (1, 2)}
    torch.manual_seed(3)
    theirs = torch.nn.ConvTranspose2d(4, 6, (3, 2), **arguments)
    torch.manual_seed(3)
    module = pynn.nn.ConvTranspose2d(4, 6, (3, 2), **arguments, activation="relu")
    assert list(module.state_dict()) == list(theirs.state_dict())
    for a, b in zip(module.parameters(), theirs.parameters(), strict=True):
        assert_bitwise(a.detach(), b.detach(), "parameters")
    assert repr(module) == repr(theirs)[:-1] + ", activation=relu)"
    x = torch.randn(2, 4, 7, 8)
    torch.testing.assert_close(module(x), theirs(x).relu())
    torch.testing.assert_close(module(x[0]), theirs(x[0]).relu())
    r = torch.randn_like(theirs(x))
    torch.testing.assert_close(module(x, residual=r), (theirs(x) + r).relu())
    for size in ([14, 17], [2, 6, 14, 18]):
        torch.testing.assert_close(module(x, size), theirs(x, size).relu())
        torch.testing.assert_close(module(x, output_size=size), theirs(x, size).relu())


def test_module_errors():
    for arguments in ({"groups": 3}, {"groups": 0}, {"padding_mode": "reflect"}, {"activation": "foo"}):
        with pytest.raises(ValueError):  # noqa: PT011
            pynn.nn.ConvTranspose2d(4, 6, 3, **arguments)
    module = pynn.nn.ConvTranspose2d(4, 6, 3, stride=2)
    with pytest.raises(ValueError, match="requested an output size of"):
        module(torch.randn(2, 4, 5, 5), [20, 20])
    with pytest.raises(ValueError, match="output_size must have 2 or 4 elements"):
        module(torch.randn(2, 4, 5, 5), [11, 11, 11])
