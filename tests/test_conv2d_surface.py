"""conv2d around its kernels: transforms, layouts of the output, messages, rejected calls, and nn.Conv2d."""

from __future__ import annotations

import itertools
import random
import re
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bad_input import assert_rejects
from conv2d_reference import LAST, operands, ours, reference
from policy import DTYPES, assert_bitwise
from transforms import assert_all, assert_compiles

import pynn
from pynn.ops.conv2d import conv2d


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_partial_gradients(wanted):
    """Only the gradients that are asked for are computed."""
    tensors = operands((2, 4, 5, 5), (6, 4, 3, 3), torch.float64)
    for t, want in zip(tensors, wanted, strict=True):
        t.requires_grad_(bool(want))
    inputs = [t for t in tensors if t.requires_grad]
    with pynn.explain() as ran:
        got = torch.autograd.grad(ours(*tensors, None, "silu").sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(reference(*tensors, None, "silu").sum(), inputs))
    expected = ["conv2d_fwd", "conv2d_bwd_activation"]
    assert [c.op for c in ran] == expected + ["conv2d_bwd_input"] * wanted[0] + ["conv2d_bwd_weight"] * wanted[1]


def _ops(ran):
    return [call.op for call in ran]


def test_double_backward_is_made_of_the_same_ops():
    """Image and filter never swap roles: a filter as large as an image is what made this slow elsewhere."""
    x, w, _ = (t if t is None else t.requires_grad_() for t in operands((2, 4, 6, 6), (6, 4, 3, 3), bias=False))
    first = torch.autograd.grad(ours(x, w, padding=1).square().sum(), (x, w), create_graph=True)
    with pynn.explain() as ran:
        torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))
    assert sorted(_ops(ran)) == ["conv2d_bwd_input"] * 2 + ["conv2d_bwd_weight"] * 2 + ["conv2d_fwd"] * 2
    assert {call.shape for call in ran} == {(2, 4, 6, 6), (2, 6, 6, 6)}


def test_double_backward_is_fast():
    """Depthwise: six passes like the forward, no loop over the groups."""
    x, w, _ = (t if t is None else t.requires_grad_() for t in operands((2, 64, 24, 24), (64, 1, 3, 3), bias=False))

    def seconds(fn):
        times = []
        for _ in range(7):
            start = time.thread_time()
            fn()
            times.append(time.thread_time() - start)
        return min(times)

    first = torch.autograd.grad(ours(x, w, padding=1, groups=64).square().sum(), (x, w), create_graph=True)
    loss = sum(g.square().sum() for g in first)
    forward = seconds(lambda: ours(x, w, padding=1, groups=64))
    ratio = seconds(lambda: torch.autograd.grad(loss, (x, w), retain_graph=True)) / forward
    assert ratio < 40, f"the double backward takes {ratio:.0f} forward passes"


@pytest.mark.parametrize("groups", [1, 2])
def test_vmap_makes_one_call(groups):
    x, w, b = operands((2, 4, 5, 5), (6, 4 // groups, 3, 3), torch.float64)
    r = torch.randn(2, 6, 1, 1, dtype=torch.float64)
    operands_ = x, w, b, r
    stacks = [torch.stack((t, 2 * t, -t)) for t in operands_]

    def fn(*t):
        return ours(*t, "silu", padding=1, groups=groups)

    for batched in itertools.product((False, True), repeat=4):
        if not any(batched):
            continue
        tensors = [s if wanted else t for s, t, wanted in zip(stacks, operands_, batched, strict=True)]
        with pynn.explain() as ran:
            got = torch.vmap(fn, in_dims=tuple(0 if wanted else None for wanted in batched))(*tensors)
        expected = [fn(*(t[i] if wanted else t for t, wanted in zip(tensors, batched, strict=True))) for i in range(3)]
        torch.testing.assert_close(got, torch.stack(expected))
        assert _ops(ran) == ["conv2d_fwd"]


def test_per_sample_gradients_make_one_call_each():
    x, w, b = operands((3, 4, 5, 5), (6, 4, 3, 3), torch.float64)
    loss = lambda w, b, x: ours(x.unsqueeze(0), w, b, padding=1).square().sum()  # noqa: E731
    with pynn.explain() as ran:
        got = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(w, b, x)
    assert _ops(ran) == ["conv2d_fwd", "conv2d_bwd_weight"]
    for i, g in enumerate(zip(*got, strict=True)):
        torch.testing.assert_close(g, torch.func.grad(loss, argnums=(0, 1))(w, b, x[i]))


@pytest.mark.parametrize("geometry", [{"padding": 1}, {"padding": 1, "groups": 2, "padding_mode": "circular"}])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_transforms(activation, geometry):
    x, w, b = operands((2, 4, 5, 5), (6, 4 // geometry.get("groups", 1), 3, 3), torch.float64)
    r = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert_all(lambda x, w, b, r: ours(x, w, b, r, activation, **geometry), x, w, b, r)


def test_transforms_of_one_image():
    x, w, b = operands((4, 5, 5), (6, 4, 4, 2), torch.float64)
    assert_all(lambda x, w, b: ours(x, w, b, None, "tanh", padding="same"), x, w, b)


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


def test_more_than_two_to_the_31_elements():
    """An image of 4.3 GB, of which only the pages that are written take memory, against a slice of it."""
    available = int(re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[0]) << 10
    if available < 8 << 30:
        pytest.skip(f"needs 8 GB of memory, {available >> 30} GB are available")
    side, rows = 32800, 64  # the last `rows` begin at a multiple of the stride
    x, w = torch.zeros(1, 2, side, side, dtype=torch.bfloat16), torch.randn(3, 2, 3, 3).bfloat16()
    assert x.numel() > 2**31
    x[:, :, -rows:] = torch.randn(1, 2, rows, side)
    y, last = ours(x, w, stride=32), ours(x[:, :, -rows:], w, stride=32)
    assert_bitwise(y[:, :, -last.shape[2] :], last, "output")
    dy = torch.randn(y.shape).bfloat16()
    dy[:, :, : -last.shape[2]] = 0
    geometry = ((32, 32), (0,) * 4, (1, 1), 1, 0, False)
    dw, _ = torch.ops.pynn.conv2d_bwd_weight(dy, x, (3, 3), *geometry, False)
    expected, _ = torch.ops.pynn.conv2d_bwd_weight(
        dy[:, :, -last.shape[2] :], x[:, :, -rows:], (3, 3), *geometry, False
    )
    torch.testing.assert_close(dw, expected)


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


MESSAGES = [
    (((2, 3, 8, 8), (4, 2, 3, 3)), {}, "to have 2 channels, but got 3 channels instead"),
    (
        ((8, 8), (4, 2, 3, 3)),
        {},
        r"Expected 3D \(unbatched\) or 4D \(batched\) input to conv2d, but got input of size: \[8, 8\]",
    ),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"stride": 0}, "non-positive stride is not supported"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"padding": -1}, "negative padding is not supported"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"dilation": 0}, "dilation should be greater than zero|non-positive dilation"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"groups": 0}, "non-positive groups is not supported"),
    (((2, 6, 8, 8), (2, 2, 3, 3)), {"groups": 3}, "expected weight to be at least 3 at dimension 0"),
    (((2, 4, 8, 8), (3, 2, 3, 3)), {"groups": 2}, "expected weight to be divisible by 2 at dimension 0"),
    (((2, 3, 2, 2), (4, 3, 3, 3)), {}, r"Calculated padded input size per channel: \(2 x 2\). Kernel size: \(3 x 3\)"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"stride": (1, 1, 1)}, r"but got stride=\[1, 1, 1\]"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"padding": "foo"}, "Invalid padding string: 'foo'"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"padding": (1, 1, 1)}, r"but got padding=\[1, 1, 1\]"),
    (((2, 3, 8, 8), (4, 3, 3, 3)), {"dilation": ()}, r"but got dilation=\[\]"),
    (((2, 3, 8, 8), (0, 3, 3, 3)), {}, "expected weight to be at least 1 at dimension 0"),
    (((2, 3, 0, 8), (4, 3, 1, 3)), {"padding": 1}, "Only zero batch or zero channel inputs are supported, but got inp"),
    (((0, 3, 2, 2), (4, 3, 3, 3)), {}, "Kernel size can't be greater than actual input size"),
]


@pytest.mark.parametrize("case", range(len(MESSAGES)))
def test_messages(case):
    shapes, geometry, message = MESSAGES[case]
    for fn in (conv2d, F.conv2d):
        with pytest.raises(RuntimeError, match=message):
            fn(*(torch.randn(s) for s in shapes), **geometry)


BORDER_MESSAGES = [
    ("reflect", (3, 1), r"padding_mode='reflect': Padding size should be less than the corresponding input dimension"),
    ("reflect", (1, 4), r"but got: padding \(4, 4\) at dimension 3 of input \[2, 3, 3, 4\]"),
    ("circular", (4, 1), "padding_mode='circular': Padding value causes wrapping around more than once"),
    ("mirror", 1, r"conv2d: expected padding_mode to be one of \('zeros', 'reflect', 'replicate', 'circular'\)"),
]


@pytest.mark.parametrize(("mode", "padding", "message"), BORDER_MESSAGES)
def test_messages_of_padding_modes(mode, padding, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        conv2d(torch.randn(2, 3, 3, 4), torch.randn(4, 3, 3, 3), padding=padding, padding_mode=mode)


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
    stride, padding, dilation, groups, mode = [1, 1], [1, 1, 1, 1], [1, 1], 1, rng.randrange(4)
    huge = rng.choice((-1, -(2**40), 2**31, 2**40, 2**62, 2**63 - 1))
    ops, kind = torch.ops.pynn, rng.randrange(13)
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
    elif kind == 12:
        mode, padding[rng.randrange(4)] = rng.choice(
            ((-1, 1), (4, 1), (huge, 1), (1, 6), (1, 2**30), (3, 7), (3, 2**20))
        )
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
    geometry = (stride, padding, dilation, groups, mode, False)
    call = rng.choice((0, 1) if kind in (2, 4, 6) else (0, 1, 2) if kind == 12 else (0, 1, 2, 3))
    text = f"{kind}/{call}: {tuple(x.shape)} {x.dtype} {tuple(w.shape)} {w.dtype} {geometry}"
    if call == 0 or kind in (1, 8):
        return text, lambda: ops.conv2d_fwd(x, w, None, None, *geometry, 0, False)
    if call == 1:
        return text, lambda: ops.conv2d_bwd_input(dy, w, list(x.shape), *geometry, False)
    if call == 2:
        return text, lambda: ops.conv2d_bwd_weight(dy, x, list(w.shape[2:]) if kind != 7 else [0, 3], *geometry, True)
    return text, lambda: conv2d(x, w, b.to(x.dtype), stride, padding, dilation, groups)


def test_bad_calls():
    assert_rejects("test_conv2d_surface", 500)


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
