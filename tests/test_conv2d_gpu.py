"""conv2d's CUDA C++ kernels, each of them: shapes that choose every tile, every way to split a sum, every tail."""

from __future__ import annotations

import pytest
import torch
from conv2d_reference import LAST, ours, output_like, reference, run_on
from generated import generated
from hypothesis import strategies as st
from policy import assert_bitwise, integers, truth_of

KERNEL = "conv2d_fwd"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _cuda_source(backend):
    if backend.name not in ("sim", "cuda"):
        pytest.skip(f"{backend.name}: not the CUDA C++ kernels")


def assert_exact(backend, shape, weight_shape, geometry, dtype, inputs=LAST, gradients=LAST, weights=LAST):
    """Small integers through conv2d, ReLU and residual, and back: every sum is exact, so every bit is known."""
    x = integers(shape, dtype).contiguous(memory_format=inputs)
    w = integers(weight_shape, dtype, low=-1, high=1).contiguous(memory_format=weights)
    b = integers(weight_shape[:1], dtype)
    z = output_like(x, w, **geometry)
    r = integers(z.shape, dtype)
    dy = integers(z.shape, dtype, low=-1, high=1).contiguous(memory_format=gradients)
    truth, truths = truth_of(lambda *t: reference(*t, "relu", **geometry), x, w, b, r, grad_output=dy)
    y, got = run_on(backend, lambda *t: ours(*t, "relu", **geometry), x, w, b, r, grad_output=dy)
    assert_bitwise(y, truth.to(dtype), "output")
    for i, (a, e) in enumerate(zip(got, truths, strict=True)):
        assert_bitwise(a, e.to(dtype), f"gradient {i}")


# What a shape reaches: (input, weight, geometry). Tiles are chosen by how many of them there are.
REACHES = {
    "small tiles, K tail": ((2, 24, 9, 7), (72, 24, 3, 3), {"padding": 1}),
    "medium tiles": ((2, 16, 136, 128), (40, 16, 1, 1), {}),
    "large tiles": ((2, 16, 136, 128), (132, 16, 1, 1), {}),
    "large tiles of dW": ((2, 16, 9, 8), (72, 16, 3, 3), {"padding": 1}),
    "one block of the sum": ((1, 8, 5, 5), (16, 8, 1, 1), {}),
    "as many blocks as stages": ((1, 32, 5, 5), (16, 32, 2, 2), {}),
    "split sums": ((2, 256, 6, 6), (72, 256, 3, 3), {"padding": 1}),
    "phases": ((2, 24, 9, 10), (32, 24, 4, 4), {"padding": 1, "stride": 2}),
    "phases without taps": ((2, 16, 10, 11), (16, 16, 2, 1), {"stride": 3}),
    "dilated phases": ((2, 16, 11, 10), (24, 16, 3, 3), {"padding": 2, "stride": (2, 4), "dilation": (3, 2)}),
    "few channels": ((2, 3, 15, 14), (24, 3, 7, 7), {"padding": 3, "stride": 2}),
    "odd channels": ((2, 13, 8, 9), (19, 13, 3, 3), {"padding": 1}),
    "groups": ((2, 48, 7, 6), (72, 16, 3, 3), {"padding": 1, "groups": 3}),
    "odd groups": ((2, 57, 6, 5), (51, 19, 3, 3), {"padding": 1, "groups": 3}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reached", REACHES)
def test_reached(backend, reached, dtype):
    assert_exact(backend, *REACHES[reached], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layouts", range(8))
def test_layouts_of_operands(backend, layouts, dtype):
    formats = [LAST if layouts >> i & 1 else torch.contiguous_format for i in range(3)]
    assert_exact(backend, (2, 24, 9, 7), (40, 24, 3, 3), {"padding": 1, "stride": 2}, dtype, *formats)


def test_chunks_in_one_block(backend):
    """A sum that is split between blocks where the grid is small, and still added in chunks where it is not."""
    x, w = integers((66, 1024, 16, 16), torch.bfloat16), integers((16, 1024, 1, 1), torch.bfloat16)
    x, w = x.to(backend.device, memory_format=LAST), w.to(backend.device)
    y = ours(x, w)
    truth = torch.einsum("nchw,oc->nohw", x.cpu().float(), w.cpu().float()[..., 0, 0])
    assert_bitwise(y.cpu(), truth.to(torch.bfloat16), "output")
    assert_bitwise(ours(x[3:4], w), y[3:4], "one sample")


@pytest.mark.parametrize(
    "reached", ["small tiles, K tail", "large tiles of dW", "split sums", "phases", "odd channels"]
)
def test_tf32(backend, reached):
    shape, weight_shape, geometry = REACHES[reached]
    padding, stride = geometry.get("padding", 0), geometry.get("stride", 1)
    x = integers(shape).contiguous(memory_format=LAST)
    w = integers(weight_shape, low=-1, high=1)
    dy = integers(output_like(x, w, **geometry).shape, low=-1, high=1)
    truth, truths = truth_of(lambda *t: reference(*t, **geometry), x, w, grad_output=dy)
    x, w, dy = (t.to(backend.device) for t in (x, w, dy))
    shared = [stride] * 2, [padding] * 4, [1, 1], 1, 0, True
    y, _ = backend.ops.conv2d_fwd(x, w, None, None, *shared, 0, False)
    dx = backend.ops.conv2d_bwd_input(dy, w, shape, *shared, True)
    dw, _ = backend.ops.conv2d_bwd_weight(dy, x, weight_shape[2:], *shared, False)
    for name, got, expected in zip(("output", "input", "weight"), (y, dx, dw), (truth, *truths), strict=True):
        assert_bitwise(got.cpu(), expected.float(), name)


def test_copies_in_slices(backend):
    """Images that are copied for their layout pass through scratch a few at a time."""
    x, w = integers((3, 8, 1024, 1024), torch.bfloat16), integers((8, 8, 1, 1), torch.bfloat16)
    dy = integers((3, 8, 128, 128), torch.bfloat16, low=-1, high=1)
    seen = x[:, :, ::8, ::8].float()
    x, w = x.to(backend.device), w.to(backend.device)
    truth = torch.einsum("nchw,oc->nohw", seen, w.cpu().float()[..., 0, 0])
    assert_bitwise(ours(x, w, stride=8).cpu(), truth.to(torch.bfloat16), "output")
    shared = [8, 8], [0] * 4, [1, 1], 1, 0, False
    dw, _ = backend.ops.conv2d_bwd_weight(dy.to(backend.device), x, [1, 1], *shared, False)
    truth = torch.einsum("nchw,nohw->oc", seen, dy.float())
    assert_bitwise(dw[..., 0, 0].cpu(), truth.to(torch.bfloat16), "weight gradient")


@st.composite
def calls(draw):
    groups = draw(st.sampled_from((1, 1, 1, 2)))
    channels = draw(st.sampled_from((3, 8, 9, 16, 31, 32, 40, 64, 65) if groups == 1 else (16, 17, 24)))
    outputs = draw(st.sampled_from((8, 15, 16, 63, 64, 65, 72, 129) if groups == 1 else (16, 20, 33)))
    kernel = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    geometry = {
        "groups": groups,
        "dilation": (draw(st.integers(1, 3)), draw(st.integers(1, 2))),
        "stride": (draw(st.integers(1, 3)), draw(st.integers(1, 4))),
        "padding_mode": draw(st.sampled_from(("zeros", "zeros", "reflect", "replicate", "circular"))),
    }
    reach = [d * (k - 1) + 1 for d, k in zip(geometry["dilation"], kernel, strict=True)]
    size = [draw(st.integers(2, 9)) for _ in reach]
    needed = [max(0, (r - s + 1) // 2) for r, s in zip(reach, size, strict=True)]
    size = [max(s, n + 1) for s, n in zip(size, needed, strict=True)]
    geometry["padding"] = tuple(draw(st.integers(n, min(n + 2, s - 1))) for n, s in zip(needed, size, strict=True))
    formats = st.sampled_from((LAST, LAST, torch.contiguous_format))
    return (
        (draw(st.integers(1, 5)), channels * groups, *size),
        (outputs * groups, channels, *kernel),
        geometry,
        draw(st.sampled_from(DTYPES)),
        draw(formats),
        draw(formats),
        draw(formats),
    )


@generated(calls())
def test_tails(backend, call):
    assert_exact(backend, *call)
