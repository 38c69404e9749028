"""group_norm_conv2d on every backend: against float64, gradients through the statistics, transforms, messages."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conv2d_reference import LAST, interpret_only, on, operands
from conv2d_reference import reference as convolution
from policy import DTYPES, LOW_PRECISION, assert_bitwise, assert_relative, relative_error, run, truth_of
from torch.autograd import gradcheck, gradgradcheck
from transforms import assert_all, assert_compiles

import pynn
from pynn.ops import group_norm_conv2d
from pynn.ops.conv2d import conv2d
from pynn.ops.group_norm_conv2d import coefficients

KERNEL = "group_norm_statistics"
NAMES = ("input", "norm_weight", "norm_bias", "weight", "bias", "residual")


def reference(x, norm_weight, norm_bias, w, b=None, r=None, *, num_groups=4, silu=True, activation=None, **geometry):
    z = F.group_norm(x, num_groups, norm_weight, norm_bias)
    return convolution(F.silu(z) if silu else z, w, b, r, activation, **geometry)


def ours(x, norm_weight, norm_bias, w, b=None, r=None, *, num_groups=4, silu=True, activation=None, **geometry):
    norm_activation = "silu" if silu else None
    return group_norm_conv2d(
        x, num_groups, norm_weight, norm_bias, w, b, **geometry,
        norm_activation=norm_activation, activation=activation, residual=r,
    )  # fmt: skip


def block(shape, outputs, kernel=3, dtype=torch.float32, groups=1):
    x, w, b = operands(shape, (outputs, shape[1] // groups, kernel, kernel), dtype)
    return x, (torch.rand(shape[1]) + 0.5).to(dtype), torch.randn(shape[1]).to(dtype), w, b


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 7, 6), (1, 32, 12, 12), (3, 8, 5, 4)])
@pytest.mark.parametrize("silu", [False, True])
def test_accuracy(backend, shape, dtype, silu):
    """The output: P1; where torch's chain rounds as often as ours, to one per cent, as chance then decides. The
    gradients: the bits of the gradients of the convolution and of group_norm."""
    interpret_only(backend, dtype in (torch.bfloat16, torch.float32) and silu)
    tensors = block(shape, 24, dtype=dtype)
    truth, _ = truth_of(lambda *t: reference(*t, silu=silu, padding=1), *tensors)
    peer, _ = run(lambda *t: reference(*t, silu=silu, padding=1), *tensors)
    dy = torch.randn(truth.shape).to(dtype)
    for memory_format in (torch.contiguous_format, LAST):
        x, *rest = on(backend, tensors[0].to(memory_format=memory_format), *tensors[1:])
        dy_ = dy.to(x.device)
        y, grads = run(lambda *t: ours(*t, silu=silu, padding=1), x, *rest, grad_output=dy_)
        if dtype in LOW_PRECISION and not silu:
            assert relative_error(y.cpu(), truth) <= 1.01 * relative_error(peer, truth)
        else:
            assert_relative(y.cpu(), truth, [peer], what=f"output {memory_format}")
        mean, rstd = backend.ops.group_norm_statistics(x, 4, 1e-5)
        image = backend.ops.conv2d_prologue_fwd(x, *coefficients(mean, rstd, *rest[:2], shape[1]), 3 if silu else 0)
        _, parts = run(lambda x, w, b: conv2d(x, w, b, padding=1), image, *rest[2:], grad_output=dy_)
        expected = *backend.ops.group_norm_bwd(parts[0], x, *rest[:2], mean, rstd, 4, silu), *parts[1:]
        for name, got, value in zip(NAMES, grads, expected, strict=False):
            assert_bitwise(got, value, f"gradient of {name} {memory_format}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 9, 7), (1, 4, 130, 90), (3, 24, 1, 1), (2, 64, 33, 20)])
def test_statistics(backend, shape, dtype):
    """Where the groups fit registers, and where not; a mean far from 0."""
    for offset, last in itertools.product((0, 30), (False, True)):
        x = (torch.randn(shape) + offset).to(dtype)
        wide = x.double().reshape(shape[0], 4, -1)
        (x,) = on(backend, x.to(memory_format=LAST) if last else x)
        mean, rstd = backend.ops.group_norm_statistics(x, 4, 1e-5)
        tight = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 3e-6, "atol": 1e-6}
        torch.testing.assert_close(mean.cpu().double(), wide.mean(-1), **tight)
        expected = (wide.var(-1, unbiased=False) + 1e-5).rsqrt()
        torch.testing.assert_close(rstd.cpu().double(), expected, **tight)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_gradcheck(cpu_kernels, silu, affine):
    """Through mean and rstd, once and twice."""
    x, *norm, w, b = block((2, 4, 3, 3), 2, 2, torch.float64)
    r = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in ((x, *norm, w, b, r) if affine else (x, w, b, r))]

    def fn(x, *t):
        norm = t[:2] if affine else (None, None)
        return ours(x, *norm, *t[2 if affine else 0 :], num_groups=2, silu=silu, activation="silu", padding=1)

    assert gradcheck(fn, tensors)
    assert gradgradcheck(fn, tensors)


def test_second_derivative_of_the_weight(cpu_kernels):
    """The gradient of the weight depends on the input through the statistics too."""
    tensors = [t.requires_grad_() for t in block((2, 4, 4, 3), 3, dtype=torch.float64)]
    results = []
    for fn in (ours, reference):
        (dw,) = torch.autograd.grad(fn(*tensors).square().sum(), tensors[3], create_graph=True)
        results.append(torch.autograd.grad(dw.square().sum(), tensors[:4]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("wanted", list(itertools.product((0, 1), repeat=3))[1:])
def test_partial_gradients(cpu_kernels, wanted):
    tensors = block((2, 8, 4, 4), 3, dtype=torch.float64)
    chosen = [tensors[i].requires_grad_() for i, v in zip((0, 1, 3), wanted, strict=True) if v]
    with pynn.explain() as ran:
        got = torch.autograd.grad(ours(*tensors).sum(), chosen)
    torch.testing.assert_close(got, torch.autograd.grad(reference(*tensors).sum(), chosen))
    into_norm = wanted[0] or wanted[1]
    expected = ["group_norm_statistics", "prologue_conv2d_fwd"] + ["conv2d_prologue_fwd"] * wanted[2]
    expected += ["conv2d_bwd_input"] * into_norm + ["conv2d_bwd_weight"] * wanted[2] + ["group_norm_bwd"] * into_norm
    assert [call.op for call in ran] == expected


@pytest.mark.parametrize("silu", [False, True])
def test_transforms(cpu_kernels, silu):
    tensors = block((2, 4, 5, 5), 6, dtype=torch.float64, groups=2)
    assert_all(lambda *t: ours(*t, silu=silu, num_groups=2, groups=2, padding=1, activation="relu"), *tensors)


def test_inductor(cpu_kernels):
    assert_compiles(lambda *t: ours(*t, padding=1) * 2, *block((2, 8, 5, 5), 6), backend="inductor")


def test_half_precision_with_wide_parameters(cpu_kernels):
    """Parameters of the norm in float32, as under autocast."""
    x, norm_weight, norm_bias, w, b = block((2, 8, 6, 5), 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x, norm_weight.requires_grad_(), norm_bias, w, b)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), reference(x, norm_weight, norm_bias, w, b), rtol=3e-2, atol=3e-2)
    y.sum().backward()
    assert norm_weight.grad.dtype is torch.float32


def test_opcheck():
    for x in (torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4).to(memory_format=LAST)):
        torch.library.opcheck(torch.ops.pynn.group_norm_statistics.default, (x, 4, 1e-5))


def test_messages():
    x, *norm, w, _ = block((2, 8, 5, 5), 6)
    with pytest.raises(ValueError, match='expected norm_activation to be None or "silu"'):
        group_norm_conv2d(x, 4, *norm, w, norm_activation="relu")
    with pytest.raises(RuntimeError, match="divisible by num_groups"):
        group_norm_conv2d(x, 3, *norm, w)
    with pytest.raises(RuntimeError, match="greater than 0"):
        group_norm_conv2d(x, 0, *norm, w)
    with pytest.raises(RuntimeError, match=r"expected norm_bias of shape \[8\], got \[7\]"):
        group_norm_conv2d(x, 4, norm[0], norm[1][:7], w)
    with pytest.raises(RuntimeError, match="expected 4-dimensional input"):
        group_norm_conv2d(x[0], 4, *norm, w)
    with pytest.raises(RuntimeError, match="to have 8 channels, but got 4 channels"):
        group_norm_conv2d(x[:, :4], 4, norm[0][:4], norm[1][:4], w)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        group_norm_conv2d(x[:1, :4, :1, :1], 4, None, None, torch.randn(2, 4, 1, 1))
