"""conv2d's kernels on every backend: against float64, exactness, layouts, determinism, derivatives."""

from __future__ import annotations

import pytest
import torch
from adversary import Canary, constant, layouts
from conv2d_reference import (
    BORDERS,
    EMULATED,
    LAST,
    LAYERS,
    MODES,
    SAMPLES,
    interpret_only,
    layers,
    on,
    operands,
    ours,
    output_like,
    reference,
    run_on,
)
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

from pynn.ops.conv2d import ACTIVATIONS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_accuracy(backend, layer, dtype):
    shape, weight_shape, geometry = layers(backend)[layer]
    torch.manual_seed(layer)
    x, w, b = operands(shape, weight_shape, dtype)
    dy = torch.randn(output_like(x, w, **geometry).shape).to(dtype)
    y0, g0 = truth_of(lambda *t: reference(*t, **geometry), x, w, b, grad_output=dy)
    y1, g1 = run(lambda *t: reference(*t, **geometry), x, w, b, grad_output=dy)
    y2, g2 = run(lambda *t: reference(*t, **geometry), x.to(memory_format=LAST), w, b, grad_output=dy)
    y, g = run_on(backend, lambda *t: ours(*t, **geometry), x, w, b, grad_output=dy)
    assert_relative(y, y0, [y1, y2], what="output")
    for name, got, truth, *peers in zip(("input", "weight", "bias"), g, g0, g1, g2, strict=True):
        assert_relative(got, truth, peers, kind="gradient", what=f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_border_accuracy(backend, mode, dtype):
    x, w, b = operands((3, 32, 8, 7), (24, 32, 3, 3), dtype)
    dy = torch.randn(3, 24, 10, 9).to(dtype)
    geometry = {"padding": 2, "padding_mode": mode}
    y0, g0 = truth_of(lambda *t: reference(*t, **geometry), x, w, b, grad_output=dy)
    y1, g1 = run(lambda *t: reference(*t, **geometry), x, w, b, grad_output=dy)
    for memory_format in (torch.contiguous_format, LAST):
        y, g = run_on(backend, lambda *t: ours(*t, **geometry), x.to(memory_format=memory_format), w, b, grad_output=dy)
        assert_relative(y, y0, [y1], what="output")
        for i, (got, truth, peer) in enumerate(zip(g, g0, g1, strict=True)):
            assert_relative(got, truth, [peer], kind="gradient", what=f"gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_accuracy(backend, activation, dtype):
    x, w, b = operands((4, 24, 9, 9), (40, 24, 3, 3), dtype)
    r = torch.randn(4, 40, 9, 9).to(dtype)
    dy = torch.randn(4, 40, 9, 9).to(dtype)

    def fn(op):
        return lambda *t: op(*t, activation, padding=1)

    y0, g0 = truth_of(fn(reference), x, w, b, r, grad_output=dy)
    y1, g1 = run(fn(reference), x, w, b, r, grad_output=dy)
    for memory_format in (torch.contiguous_format, LAST):
        y, g = run_on(backend, fn(ours), x.to(memory_format=memory_format), w, b, r, grad_output=dy)
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
    pads = [r // 2 for r in reach] if geometry["padding"] == "same" else geometry["padding"]
    room = min(s - p for s, p in zip((height, width), pads, strict=True))
    fitting = {"replicate": True, "circular": room >= 0, "reflect": room > 0}
    geometry["padding_mode"] = draw(st.sampled_from(("zeros", "zeros", *(m for m in MODES if fitting[m]))))
    return {
        "shape": (draw(st.integers(1, 5)), channels * groups, height, width),
        "weight_shape": (outputs * groups, channels, *kernel),
        "geometry": geometry,
        "dtype": draw(st.sampled_from(DTYPES)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "residual": draw(st.sampled_from(("none", "full", "channel"))),
        "bias": draw(st.booleans()),
        "last": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**20)),
    }


def _residual(kind, shape, dtype):
    if kind == "none":
        return None
    return torch.randn(shape if kind == "full" else (*shape[:2], 1, 1)).to(dtype)


@generated(calls())
def test_generated(backend, call):
    geometry, dtype, activation = call["geometry"], call["dtype"], call["activation"]
    torch.manual_seed(call["seed"])
    x, w, b = operands(call["shape"], call["weight_shape"], dtype, call["bias"])
    x = x.contiguous(memory_format=LAST) if call["last"] else x
    z = output_like(x, w, **geometry)
    r = _residual(call["residual"], z.shape, dtype)
    with torch.no_grad():
        y = ours(*on(backend, x, w, b, r), activation, **geometry).cpu()
    truth, _ = truth_of(lambda *t: reference(*t, activation, **geometry), x, w, b, r)
    magnitude = reference(*(None if t is None else t.double().abs() for t in (x, w, b, r)), **geometry)
    if activation in ("gelu_tanh", "gelu", "silu"):
        magnitude = 2 * magnitude  # their slope reaches 1.13, and they add roundings of their own
    elif activation in ("sigmoid", "tanh"):
        magnitude = magnitude + 1
    assert_elementwise(y, truth, magnitude, w[0].numel() + 2, "output")
    if call["seed"] % 4:
        return
    dy = torch.randn(z.shape).to(dtype)
    _, grads = run_on(backend, lambda x, w: ours(x, w, **geometry), x, w, grad_output=dy)
    _, truths = truth_of(lambda x, w: reference(x, w, **geometry), x, w, grad_output=dy)
    _, sizes = truth_of(lambda x, w: reference(x, w, **geometry), x.abs(), w.abs(), grad_output=dy.abs())
    assert_elementwise(grads[0], truths[0], sizes[0], w[:, 0].numel(), "input")
    assert_elementwise(grads[1], truths[1], sizes[1], dy[:, 0].numel(), "weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", range(len(LAYERS) + len(SAMPLES) + len(BORDERS)))
def test_exact(backend, sample, dtype):
    interpret_only(backend, dtype in (torch.float32, torch.bfloat16))
    shape, weight_shape, geometry = (layers(backend) + SAMPLES + BORDERS)[sample]
    x, w, b = integers(shape, dtype), integers(weight_shape, dtype, low=-1, high=1), integers((weight_shape[0],), dtype)
    z = output_like(x, w, **geometry)
    r, dy = integers(z.shape, dtype), integers(z.shape, dtype, low=-1, high=1)
    y0, g0 = truth_of(lambda *t: reference(*t, "relu", **geometry), x, w, b, r, grad_output=dy)
    y, g = run_on(backend, lambda *t: ours(*t, "relu", **geometry), x, w, b, r, grad_output=dy)
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
        ((3, 17, 6, 5), (21, 17, 3, 3), {"padding": 2, "padding_mode": "reflect"}),
        ((3, 3, 6, 5), (18, 3, 3, 3), {"padding": 1, "stride": 2, "padding_mode": "circular"}),
        ((2, 20, 6, 5), (20, 1, 3, 3), {"padding": 1, "groups": 20, "padding_mode": "replicate"}),
    ],
)
def test_layouts(backend, sample, dtype):
    interpret_only(backend, dtype is torch.float32)
    shape, weight_shape, geometry = sample
    x, w, b = operands(shape, weight_shape, dtype)
    r = torch.randn(output_like(x, w, **geometry).shape).to(dtype)
    dy = torch.randn(r.shape).to(dtype)
    tensors = on(backend, x, w, b, r, dy)

    def results(*tensors):
        *leaves, dy = tensors
        y, grads = run(lambda *t: ours(*t, "silu", **geometry), *leaves, grad_output=dy)
        return y, *grads

    expected = results(*tensors)
    for i in range(len(tensors)):
        for name, tensor in layouts(tensors[i]):
            got = results(*(tensor if j == i else t for j, t in enumerate(tensors)))
            for k, (a, e) in enumerate(zip(got, expected, strict=True)):
                assert_bitwise(a, e, f"operand {i} as {name}, result {k}")
    same = constant((), 0.75, dtype).to(backend.device).expand(r.shape)
    for a, e in zip(results(*tensors[:4], same), results(*tensors[:4], same.contiguous()), strict=True):
        assert_bitwise(a, e, "constant grad_output")


def test_residual_broadcast(backend):
    x, w, b = operands((3, 8, 5, 5), (12, 8, 3, 3), torch.float64)
    dy = torch.ones(3, 12, 5, 5, dtype=torch.float64)
    for shape in ((3, 12, 1, 1), (12, 1, 1), (1, 12, 5, 5), (5,), (), (3, 1, 5, 1)):
        r = torch.randn(shape, dtype=torch.float64)
        y0, g0 = run(lambda *t: reference(*t, "tanh", padding=1), x, w, b, r, grad_output=dy)
        y, g = run_on(backend, lambda *t: ours(*t, "tanh", padding=1), x, w, b, r, grad_output=dy)
        torch.testing.assert_close(y, y0)
        torch.testing.assert_close(g, g0)
    one = torch.randn(3, 12, 1, 1, dtype=torch.float64)
    expected = reference(x, w, b, one, padding=1)
    x, w, b, one = on(backend, x, w, b, one)
    torch.testing.assert_close(ours(x, w, b, one.expand(3, 12, 5, 5), padding=1).cpu(), expected)


@pytest.mark.parametrize("layer", range(len(LAYERS) + 2))
def test_reproducible(backend, layer):
    shape, weight_shape, geometry = (layers(backend) + BORDERS[:1] + BORDERS[8:9])[layer]
    x, w, b = operands((5, *shape[1:]), weight_shape)
    dy = torch.randn(output_like(x, w, **geometry).shape)
    x, w, b, dy = on(backend, x, w, b, dy)

    def results(x, dy):
        y, grads = run(lambda *t: ours(*t, None, "gelu", **geometry), x, w, b, grad_output=dy)
        return y, *grads

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
    x, w, b = operands((2, 5, 7, 6), (19, 5, 3, 3))
    tensors = on(backend, x, w, b, torch.randn(2, 19, 7, 6), torch.randn(2, 19, 7, 6))
    cages = [Canary(t) for t in tensors]
    fn = lambda *t: ours(*t, "silu", padding=1)  # noqa: E731
    y, grads = run(fn, *(c.tensor for c in cages[:4]), grad_output=cages[4].tensor)
    y0, g0 = run(fn, *tensors[:4], grad_output=tensors[4])
    for cage in cages:
        cage.assert_untouched()
    for a, e in zip((y, *grads), (y0, *g0), strict=True):
        assert_bitwise(a, e, "inside guards")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_shape", [(20, 5, 3, 3), (2, 17, 3, 3), (18, 2, 1, 3)])
def test_nonfinite(backend, weight_shape, dtype):
    x, w, b = operands((3, weight_shape[1], 7, 7), weight_shape, dtype)
    x[0, 0, 3, 3], x[1, 1, 0, 0], x[2, 0, 6, 6] = float("nan"), float("inf"), float("-inf")
    y0, _ = truth_of(lambda *t: reference(*t, padding=1), x, w, b)
    y, _ = run_on(backend, lambda *t: ours(*t, padding=1), x, w, b)
    assert_nonfinite(y, y0)
    dy = torch.ones(y0.shape, dtype=dtype)
    dy[0, 0, 2, 4], dy[1, 1, 3, 3] = float("nan"), float("inf")
    x = torch.randn(x.shape).to(dtype)
    _, g0 = truth_of(lambda *t: reference(*t, padding=1), x, w, grad_output=dy)
    _, g = run_on(backend, lambda *t: ours(*t, padding=1), x, w, grad_output=dy)
    for got, truth in zip(g, g0, strict=True):
        assert_nonfinite(got, truth)


@pytest.mark.parametrize("sample", range(len(SAMPLES)))
@pytest.mark.parametrize("batched", [True, False])
def test_torch_samples(backend, sample, batched):
    shape, weight_shape, geometry = SAMPLES[sample]
    interpret_only(backend, weight_shape[-1] < 31)
    x, w, b = operands(shape if batched else shape[1:], weight_shape, torch.float64)
    dy = torch.randn(output_like(x, w, **geometry).shape, dtype=torch.float64)
    for bias in (b, None):
        y0, g0 = run(lambda *t: reference(*t, **geometry), x, w, bias, grad_output=dy)
        y, g = run_on(backend, lambda *t: ours(*t, **geometry), x, w, bias, grad_output=dy)
        torch.testing.assert_close((y, *g), (y0, *g0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend, activation):
    interpret_only(backend, activation in (None, "silu"))
    x, w, b = operands((2, 4, 4, 3), (4, 2, 3, 2), torch.float64)
    leaves = on(backend, x, w, b, torch.randn(2, 4, 1, 1, dtype=torch.float64))
    leaves = [t.requires_grad_() for t in leaves]

    def fn(x, w, b, r):
        return ours(x, w, b, r, activation, padding=(1, 1), stride=(2, 1), groups=2)

    assert gradcheck(fn, leaves, fast_mode=True)
    assert gradgradcheck(fn, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("weight_shape", "geometry"),
    [
        ((3, 4, 2, 3), {"padding": "same"}),
        ((4, 1, 3, 3), {"groups": 4, "padding": 1}),
        ((3, 4, 2, 2), {"dilation": 2}),
        ((3, 4, 2, 3), {"padding": (1, 2), "padding_mode": "reflect"}),
        ((3, 4, 3, 3), {"padding": (4, 1), "padding_mode": "circular", "stride": 2}),
    ],
)
def test_gradgradcheck_geometry(backend, weight_shape, geometry):
    leaves = [t.requires_grad_() for t in on(backend, *operands((2, 4, 4, 5), weight_shape, torch.float64))]
    fast = backend.name in EMULATED
    assert gradcheck(lambda *t: ours(*t, **geometry), leaves, fast_mode=fast)
    assert gradgradcheck(lambda *t: ours(*t, **geometry), leaves, fast_mode=fast)


def test_opcheck(backend):
    x, w, b = on(backend, *operands((2, 4, 5, 5), (6, 4, 3, 3)))
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1], 1, 0, False)
    dy = torch.randn(2, 6, 5, 5, device=backend.device)
    ops = backend.ops
    for x_ in (x, x.to(memory_format=LAST)):
        torch.library.opcheck(ops.conv2d_fwd.default, (x_, w, b, dy, *geometry, 3, True))
        torch.library.opcheck(ops.conv2d_fwd.default, (x_, w, None, None, *geometry, 0, False))
        torch.library.opcheck(ops.conv2d_bwd_weight.default, (dy, x_, [3, 3], *geometry, True))
    torch.library.opcheck(ops.conv2d_bwd_input.default, (dy, w, list(x.shape), *geometry, True))
    torch.library.opcheck(ops.conv2d_bwd_activation.default, (dy, dy, 3))


def test_empty(backend):
    x, w, b = (torch.randn(s, device=backend.device, requires_grad=True) for s in ((0, 4, 5, 5), (6, 4, 3, 3), (6,)))
    y = ours(x, w, b, None, "silu")
    assert y.shape == (0, 6, 3, 3)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not w.grad.any()
    assert not b.grad.any()
    x, w = (torch.randn(s, device=backend.device) for s in ((2, 0, 5, 5), (6, 0, 3, 3)))
    assert_bitwise(ours(x, w, b.detach()), b.detach().view(1, 6, 1, 1).expand(2, 6, 3, 3), "a sum of no products is 0")
