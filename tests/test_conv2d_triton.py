"""conv2d's Triton kernels where they branch: every kernel, its tails, stride phases, layouts, wide indices, splits.

test_conv2d.py asks the same of every backend; here shapes are chosen for the tiles of these kernels.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from policy import assert_bitwise, assert_relative, integers

import pynn
from pynn.ops.conv2d import conv2d

KERNEL = "conv2d_fwd"
LAST = torch.channels_last
MODES = ("zeros", "reflect", "replicate", "circular")


@pytest.fixture(autouse=True)
def _only_triton(backend):
    if backend.name not in ("triton", "interpret"):
        pytest.skip("not a Triton backend")


def gradients(fn, *tensors, grad_output):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = fn(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad_output.to(y.dtype))


def assert_exact(backend, x, w, b, geometry, groups=1, mode="zeros"):
    """y and all gradients of integers equal those in float64, bit for bit."""
    pad = geometry.get("padding", (0, 0))

    def reference(x, w, b):
        if mode == "zeros":
            return F.conv2d(x, w, b, groups=groups, **geometry)
        x = F.pad(x, (pad[1], pad[1], pad[0], pad[0]), mode=mode)
        return F.conv2d(x, w, b, groups=groups, **{**geometry, "padding": 0})

    truth = reference(x.double(), w.double(), b.double())
    dy = integers(truth.shape, x.dtype, low=-1, high=1)
    expected = gradients(reference, x.double(), w.double(), b.double(), grad_output=dy)
    operands = [t.to(backend.device) for t in (x, w, b)]
    got = gradients(
        lambda *t: conv2d(*t, groups=groups, padding_mode=mode, **geometry),
        *operands,
        grad_output=dy.to(backend.device),
    )
    for name, a, e in zip(("output", "input", "weight", "bias"), got, expected, strict=True):
        assert_bitwise(a.cpu(), e.to(x.dtype), f"{name} of {tuple(x.shape)}, {tuple(w.shape)}, {geometry}")


def integer_operands(shape, weight_shape, dtype, channels_last):
    x, w = integers(shape, dtype), integers(weight_shape, dtype, low=-1, high=1)
    return x.to(memory_format=LAST) if channels_last else x, w, integers(weight_shape[:1], dtype)


# (x shape, weight shape, groups, geometry)
KERNELS = {
    "product, several blocks of pixels and channels": ((2, 40, 11, 13), (70, 40, 3, 3), 1, {"padding": (1, 1)}),
    "product, 1 x 1, aligned rows": ((2, 64, 8, 16), (64, 64, 1, 1), 1, {}),
    "product of groups, odd channels": ((2, 21, 6, 5), (27, 7, 3, 2), 3, {"padding": (1, 0), "stride": (2, 1)}),
    "few inputs": ((2, 3, 14, 15), (20, 3, 7, 7), 1, {"padding": (3, 3), "stride": (2, 2)}),
    "few outputs": ((2, 37, 7, 9), (3, 37, 3, 3), 1, {"padding": (1, 1)}),
    "few outputs of groups": ((2, 18, 6, 5), (4, 9, 3, 3), 2, {"padding": (1, 1)}),
    "groups of few inputs": ((2, 12, 7, 6), (20, 3, 3, 3), 4, {"padding": (1, 1)}),
    "depthwise 3": ((3, 70, 7, 9), (70, 1, 3, 3), 70, {"padding": (1, 1)}),
    "depthwise 7, stride": ((2, 9, 12, 11), (9, 1, 7, 7), 9, {"padding": (3, 3), "stride": (2, 2)}),
    "depthwise, multiplier": ((2, 6, 8, 7), (18, 1, 3, 5), 6, {"padding": (1, 2)}),
    "depthwise, wide rows": ((1, 3, 4, 21), (3, 1, 2, 19), 3, {"padding": (1, 9)}),
    "one pixel": ((5, 33, 1, 1), (34, 33, 1, 1), 1, {}),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", KERNELS)
def test_kernels(backend, case, channels_last):
    shape, weight_shape, groups, geometry = KERNELS[case]
    dtype = torch.bfloat16 if channels_last else torch.float32
    x, w, b = integer_operands(shape, weight_shape, dtype, channels_last)
    assert_exact(backend, x, w, b, geometry, groups)


@pytest.mark.parametrize("channels", [(6, 5), (1, 1), (5, 2)])
def test_stride_phases(backend, channels):
    """Taps that reach a phase, for strides and dilations with all kinds of common divisors; phases without taps."""
    inputs, outputs = channels
    for stride, dilation, kernel, pad in (
        (2, 1, 3, 1),
        (3, 2, 2, 0),
        (4, 6, 3, 5),
        (6, 4, 2, 3),
        (5, 5, 2, 1),
        (7, 3, 1, 2),
    ):
        geometry = {"stride": (stride, 1), "dilation": (dilation, 2), "padding": (pad, 1)}
        x, w, b = integer_operands((2, inputs, 14, 4), (outputs, inputs, kernel, 2), torch.float32, False)
        assert_exact(backend, x, w, b, geometry)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("channels_last", [False, True])
def test_padding_modes(backend, mode, groups, channels_last):
    shape, weight_shape = (2, 8, 5, 4), (8, 8 // groups, 3, 2)
    x, w, b = integer_operands(shape, weight_shape, torch.float16, channels_last)
    assert_exact(backend, x, w, b, {"padding": (3, 2), "stride": (1, 2)}, groups, mode)


def test_wide_indices(backend, monkeypatch):
    """Tensors beyond 2^31 elements take 64-bit offsets and plain divisions: the same numbers here."""
    from pynn.triton_kernels import conv2d_launch as module

    monkeypatch.setattr(module, "index_type", lambda *_: module.tl.int64)
    monkeypatch.setattr(module, "FAST_DIVISION", 0)
    for case in ("product of groups, odd channels", "groups of few inputs", "few outputs"):
        shape, weight_shape, groups, geometry = KERNELS[case]
        assert_exact(backend, *integer_operands(shape, weight_shape, torch.float32, True), geometry, groups)
    x, w, b = integer_operands((2, 8, 5, 4), (8, 1, 3, 2), torch.float32, False)
    assert_exact(backend, x, w, b, {"padding": (1, 1)}, 8, "circular")


def test_division():
    """p // d by a product and a shift, for all p below 2^31."""
    from pynn.triton_kernels import conv2d_launch as module

    for d in (1, 2, 3, 7, 49, 224 * 224, 2**16 - 1, 2**16, 2**30 - 1, 2**30 + 1, 2**31 - 1):
        magic, shift = module.magic_of(d)
        assert 2**31 <= magic <= 2**32
        for p in {0, 1, d - 1, d, d + 1, 5 * d - 1, 5 * d, (2**31 - 1) // d * d - 1, (2**31 - 1) // d * d, 2**31 - 1}:
            if 0 <= p < 2**31:
                assert p * magic < 2**63
                assert p * magic >> shift == p // d


def test_layouts_of_residual_and_gradient(backend):
    """Operands of different layouts in one call: whole channels, whole rows, neither, and zero strides."""
    x, w, b = integer_operands((2, 16, 6, 8), (24, 16, 3, 3), torch.float16, True)
    base = F.conv2d(x.double(), w.double(), b.double(), padding=1)
    residual = integers(base.shape, torch.float16)
    forms = {
        "channels first": residual,
        "channels last": residual.to(memory_format=LAST),
        "columns first": residual.transpose(2, 3).contiguous().transpose(2, 3),
        "of channels": residual[:, :, :1, :1],
        "of columns": residual[:1, :1, :1],
        "one": residual[:1, :1, :1, :1],
    }
    for (name, r), last in itertools.product(forms.items(), (False, True)):
        memory_format = LAST if last else torch.contiguous_format
        y = conv2d(
            *(t.to(backend.device) for t in (x.contiguous(memory_format=memory_format), w, b)),
            padding=1,
            residual=r.to(backend.device),
            activation="relu",
        )
        assert_bitwise(y.cpu(), (base + r).relu().half(), f"residual {name}")
    for name, dy in list(forms.items())[:3]:
        operands = [t.to(backend.device) for t in (x, w, b)]
        got = gradients(lambda *t: conv2d(*t, padding=1), *operands, grad_output=dy.to(backend.device))
        expected = gradients(lambda *t: F.conv2d(*t, padding=1), x.double(), w.double(), b.double(), grad_output=dy)
        for a, e in zip(got[1:3], expected[1:3], strict=True):
            assert_bitwise(a.cpu(), e.half(), f"gradient {name}")


def test_splits(backend):
    """The weight gradient of many pixels: split, in every dtype as good as torch's."""
    for dtype, channels_last in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True)):
        for shape, weight_shape, groups in (((6, 16, 17, 16), (16, 16, 1, 3), 1), ((6, 8, 17, 16), (8, 1, 3, 3), 8)):
            x, w = torch.randn(shape).to(dtype), torch.randn(weight_shape).to(dtype)
            x = x.to(memory_format=LAST) if channels_last else x
            dy = torch.randn(F.conv2d(x.double(), w.double(), groups=groups).shape).to(dtype)
            reference = lambda *t, groups=groups: F.conv2d(*t, groups=groups)  # noqa: E731
            ours = lambda *t, groups=groups: conv2d(*t, groups=groups)  # noqa: E731
            _, _, truth = gradients(reference, x.double(), w.double(), grad_output=dy)
            _, _, peer = gradients(reference, x, w, grad_output=dy)
            _, _, got = gradients(ours, x.to(backend.device), w.to(backend.device), grad_output=dy.to(backend.device))
            assert_relative(got.cpu(), truth, [peer], kind="gradient", what=f"{dtype} {weight_shape}")


def test_tf32(backend):
    """Ten bits of each factor where TF32 is allowed, otherwise all."""
    x, w = torch.randn(2, 32, 6, 6), torch.randn(32, 32, 3, 3)
    truth = F.conv2d(x.double(), w.double(), padding=1)
    op = getattr(torch.ops, pynn.backends.namespace_of(backend.name)).conv2d_fwd
    for allowed, low, high in ((False, 0.0, 3e-7), (True, 5e-5, 1e-3)):
        geometry = [1, 1], [1, 1, 1, 1], [1, 1], 1, 0, allowed
        y, _ = op(x.to(backend.device), w.to(backend.device), None, None, *geometry, 0, False)
        error = ((y.cpu() - truth).norm() / truth.norm()).item()
        assert low <= error <= high, f"allow_tf32={allowed}: {error:.2e}"
