"""conv2d around its kernels: transforms, layouts of the output, messages, rejected calls, and nn.Conv2d."""

from __future__ import annotations

import random

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
