"""conv2d's CUDA C++ kernels that are not implicit GEMMs: depthwise, few channels, the general ones, folding."""

from __future__ import annotations

import pytest
import torch
from conv2d_reference import LAST, operands, ours, output_like, reference, run_on
from generated import generated
from hypothesis import strategies as st
from policy import assert_bitwise, integers, truth_of

KERNEL = "conv2d_fwd"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, LAST)


@pytest.fixture(autouse=True)
def _cuda_source(backend):
    if backend.name not in ("sim", "cuda"):
        pytest.skip(f"{backend.name}: not the CUDA C++ kernels")


def depthwise(shape, kernel, multiplier=1, **geometry):
    channels = shape[1]
    return shape, (channels * multiplier, 1, *kernel), {"groups": channels, **geometry}


# What a shape reaches: (input, weight, geometry).
REACHES = {
    "depthwise 3x3": depthwise((2, 12, 9, 11), (3, 3), padding=1),
    "depthwise 3x3, many channels": depthwise((1, 136, 5, 6), (3, 3), padding=1),
    "depthwise 3x3, more tiles than a block has": depthwise((3, 4, 21, 40), (3, 3), padding=1),
    "depthwise 3x3, stride 2": depthwise((2, 12, 10, 13), (3, 3), padding=1, stride=2),
    "depthwise 3x3, stride 2, no padding": depthwise((2, 12, 11, 12), (3, 3), stride=2),
    "depthwise 3x3, dilation 2": depthwise((2, 12, 11, 10), (3, 3), padding=2, dilation=2),
    "depthwise 3x3, dilation and stride 2": depthwise((2, 12, 12, 11), (3, 3), padding=2, dilation=2, stride=2),
    "depthwise 3x3, dilation (3, 1), stride 2": depthwise((2, 8, 13, 11), (3, 3), padding=1, dilation=(3, 1), stride=2),
    "depthwise 5x5": depthwise((2, 12, 9, 11), (5, 5), padding=2),
    "depthwise 5x5, stride 2": depthwise((2, 12, 11, 14), (5, 5), padding=2, stride=2),
    "depthwise 7x7": depthwise((2, 12, 10, 9), (7, 7), padding=3),
    "depthwise 7x7, stride 2": depthwise((2, 12, 13, 12), (7, 7), padding=3, stride=2),
    "depthwise 3x4": depthwise((2, 12, 9, 8), (3, 4), padding=1),
    "depthwise 13x11": depthwise((1, 8, 15, 14), (13, 11), padding=6),
    "depthwise of unequal strides": depthwise((2, 8, 10, 11), (3, 3), padding=1, stride=(1, 2)),
    "depthwise, multiplier 3": depthwise((2, 5, 9, 8), (3, 3), multiplier=3, padding=1),
    "depthwise, reflect": depthwise((2, 8, 9, 8), (3, 3), padding=1, padding_mode="reflect"),
    "head": ((2, 19, 11, 35), (3, 19, 3, 3), {"padding": 1}),
    "head of six": ((2, 24, 7, 9), (6, 24, 3, 3), {"padding": 1}),
    "head 1x1": ((2, 70, 6, 7), (2, 70, 1, 1), {}),
    "stem of one": ((2, 1, 12, 14), (9, 1, 3, 3), {"padding": 1}),
    "stem of two, stride 2": ((2, 2, 13, 14), (8, 2, 5, 5), {"padding": 2, "stride": 2}),
    "stem of three": ((2, 3, 12, 14), (16, 3, 3, 3), {"padding": 1}),
    "groups of four": ((2, 16, 9, 8), (16, 4, 3, 3), {"padding": 1, "groups": 4}),
    "groups of five, dilated": ((1, 15, 9, 8), (18, 5, 3, 2), {"padding": 1, "groups": 3, "dilation": 2}),
    "groups, stride 2": ((2, 16, 9, 8), (24, 8, 3, 3), {"padding": 1, "groups": 2, "stride": 2}),
    "filter of half the image": ((1, 2, 40, 37), (2, 2, 20, 19), {}),
    "circular": ((2, 3, 6, 5), (4, 3, 3, 3), {"padding": (2, 1), "padding_mode": "circular"}),
    "replicate": ((2, 4, 6, 5), (4, 2, 3, 3), {"padding": 2, "groups": 2, "padding_mode": "replicate"}),
}


def layouts_of(t):
    """The tensor in both dense layouts, and where no vector of channels can be read."""
    yield t.contiguous()
    yield t.contiguous(memory_format=LAST)
    padded = torch.zeros(t.shape[0], t.shape[2], t.shape[3] + 1, t.shape[1] + 1, dtype=t.dtype).permute(0, 3, 1, 2)
    padded[:, 1:, :, 1:] = t
    yield padded[:, 1:, :, 1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reached", REACHES)
def test_reached(backend, reached, dtype):
    """Small integers, so that every sum is exact."""
    shape, weight_shape, geometry = REACHES[reached]
    x, w, b = integers(shape, dtype), integers(weight_shape, dtype, low=-1, high=1), integers(weight_shape[:1], dtype)
    z = reference(x, w, b, **geometry)
    r, dy = integers(z.shape, dtype), integers(z.shape, dtype, low=-1, high=1)
    truth, truths = truth_of(lambda *t: reference(*t, "relu", **geometry), x, w, b, r, grad_output=dy)
    for memory_format in FORMATS:
        operands = [t.contiguous(memory_format=memory_format) for t in (x, w)]
        dy = dy.contiguous(memory_format=memory_format)
        y, got = run_on(backend, lambda *t: ours(*t, "relu", **geometry), *operands, b, r, grad_output=dy)
        assert_bitwise(y, truth.to(dtype), "output")
        for i, (a, e) in enumerate(zip(got, truths, strict=True)):
            assert_bitwise(a, e.to(dtype), f"gradient {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reached", REACHES)
def test_layouts(backend, reached, dtype):
    """Every layout and vector width gives the same bits, though other threads add other products."""
    shape, weight_shape, geometry = REACHES[reached]
    x, w, b = operands(shape, weight_shape, dtype)
    dy = torch.randn(reference(x, w, b, **geometry).shape).to(dtype)
    results = []
    for a, g in zip(layouts_of(x), layouts_of(dy), strict=True):
        y, grads = run_on(backend, lambda *t: ours(*t, activation="silu", **geometry), a, w, b, grad_output=g)
        results.append((y, *grads))
    for other in results[1:]:
        for i, (a, e) in enumerate(zip(other, results[0], strict=True)):
            assert_bitwise(a, e, f"result {i}")


@st.composite
def depthwise_calls(draw):
    channels, multiplier = draw(st.sampled_from((2, 3, 4, 8, 17, 40))), draw(st.sampled_from((1, 1, 1, 2)))
    kernel = draw(st.sampled_from(((3, 3), (5, 5), (7, 7), (1, 2), (4, 4), (2, 9))))
    geometry = {
        "dilation": draw(st.sampled_from((1, 1, 2, (1, 3)))),
        "stride": draw(st.sampled_from((1, 1, 2, 3))),
        "padding_mode": draw(st.sampled_from(("zeros", "zeros", "reflect", "replicate", "circular"))),
    }
    dilation = geometry["dilation"] if isinstance(geometry["dilation"], tuple) else (geometry["dilation"],) * 2
    size, padding = [], []
    for k, d in zip(kernel, dilation, strict=True):
        reach = d * (k - 1) + 1
        padding.append(draw(st.integers(0, reach // 2 + 1)))
        size.append(draw(st.integers(max(reach - 2 * padding[-1], padding[-1] + 1), reach + 12)))
    call = depthwise((draw(st.integers(1, 3)), channels, *size), kernel, multiplier, padding=tuple(padding), **geometry)
    return *call, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(FORMATS)), draw(st.sampled_from(FORMATS))


@generated(depthwise_calls())
def test_depthwise(backend, call):
    shape, weight_shape, geometry, dtype, inputs, gradients = call
    x = integers(shape, dtype).contiguous(memory_format=inputs)
    w, b = integers(weight_shape, dtype, low=-1, high=1), integers(weight_shape[:1], dtype)
    z = reference(x, w, b, **geometry)
    dy = integers(z.shape, dtype, low=-1, high=1).contiguous(memory_format=gradients)
    truth, truths = truth_of(lambda *t: reference(*t, "relu", **geometry), x, w, b, grad_output=dy)
    y, got = run_on(backend, lambda *t: ours(*t, activation="relu", **geometry), x, w, b, grad_output=dy)
    assert_bitwise(y, truth.to(dtype), "output")
    for i, (a, e) in enumerate(zip(got, truths, strict=True)):
        assert_bitwise(a, e.to(dtype), f"gradient {i}")


def test_large_depthwise_gradient(backend):
    """More partial sums of a weight than one thread adds."""
    shape, weight_shape, geometry = depthwise((2, 3, 130, 135), (3, 3), padding=1)
    x, w = integers(shape), integers(weight_shape)
    dy = integers(output_like(x, w, **geometry).shape, low=-1, high=1)
    _, truths = truth_of(lambda *t: reference(*t, **geometry), x, w, grad_output=dy)
    _, got = run_on(backend, lambda *t: ours(*t, **geometry), x, w, grad_output=dy)
    for a, e in zip(got, truths, strict=True):
        assert_bitwise(a, e.float(), "gradient")
