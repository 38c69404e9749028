"""What the tests of conv2d share: torch's op with the same epilogue, operands, and the calls to try."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from policy import run

from pynn.ops.conv2d import conv2d

LAST = torch.channels_last
EMULATED = ("sim", "interpret")  # backends where every multiplication costs
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


MODES = ("reflect", "replicate", "circular")


def torch_conv2d(x, w, b=None, padding_mode="zeros", **geometry):
    """F.conv2d; with a padding_mode what torch.nn.Conv2d does, a padded copy."""
    if padding_mode != "zeros":
        padding, dilation = geometry.get("padding", 0), geometry.get("dilation", 1)
        dilation = (dilation, dilation) if isinstance(dilation, int) else dilation
        sides = []  # left, right, top, bottom
        for d in (1, 0):
            total = dilation[d] * (w.shape[2 + d] - 1)
            if padding == "same":
                sides += [total // 2, total - total // 2]
            else:
                sides += [0 if padding == "valid" else padding if isinstance(padding, int) else padding[d]] * 2
        x, geometry = F.pad(x, sides, mode=padding_mode), {**geometry, "padding": 0}
    return F.conv2d(x, w, b, **geometry)


def reference(x, w, b=None, r=None, activation=None, **geometry):
    z = torch_conv2d(x, w, b, **geometry)
    return FUNCTIONS[activation](z if r is None else z + r)


def ours(x, w, b=None, r=None, activation=None, **geometry):
    return conv2d(x, w, b, activation=activation, residual=r, **geometry)


def operands(shape, weight_shape, dtype=torch.float32, bias=True):
    """Input, weight (scaled so that outputs are of size 1) and bias, on the CPU."""
    x, w = torch.randn(shape).to(dtype), torch.randn(weight_shape)
    w = w / (w[0].numel() or 1) ** 0.5
    return x, w.to(dtype), torch.randn(weight_shape[0]).to(dtype) if bias else None


def output_like(x, w, **geometry):
    return torch_conv2d(x.double(), w.double(), **geometry)


def on(backend, *tensors):
    """The tensors on the backend's device, dense layouts kept."""
    return [None if t is None else t.to(backend.device) for t in tensors]


def run_on(backend, fn, *tensors, grad_output=None):
    """policy.run on the backend's device; the results come back to the CPU."""
    *tensors, grad_output = on(backend, *tensors, grad_output)
    y, grads = run(fn, *tensors, grad_output=grad_output)
    return y.cpu(), None if grads is None else [None if g is None else g.cpu() for g in grads]


def interpret_only(backend, wanted: bool) -> None:
    """Triton's interpreter takes seconds for what the others do in milliseconds: there only the wanted cases run."""
    if backend.name == "interpret" and not wanted:
        pytest.skip("left out in the interpreter: its kernels run in other cases of this test")


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
# The same layers at a size that an emulated GPU takes a second for.
SMALL_LAYERS = [
    ((2, 32, 6, 6), (32, 32, 3, 3), {"padding": 1}),
    ((2, 64, 4, 4), (40, 64, 3, 3), {"padding": 1}),
    ((1, 32, 9, 9), (48, 32, 3, 3), {"padding": 1}),
    ((2, 16, 9, 10), (24, 16, 3, 3), {"padding": 1, "stride": 2}),
    ((2, 64, 5, 5), (72, 64, 1, 1), {}),
    ((2, 1, 12, 12), (32, 1, 3, 3), {"padding": 1}),
    ((2, 32, 10, 10), (1, 32, 3, 3), {"padding": 1}),
    ((1, 3, 16, 16), (24, 3, 7, 7), {"padding": 3, "stride": 2}),
    ((2, 32, 6, 6), (32, 8, 3, 3), {"padding": 1, "groups": 4}),
    ((2, 24, 8, 8), (24, 1, 5, 5), {"padding": 2, "groups": 24}),
    ((2, 10, 7, 8), (12, 10, 2, 4), {"padding": (1, 2), "dilation": (2, 1)}),
]


def layers(backend):
    return SMALL_LAYERS if backend.name in EMULATED else LAYERS


# torch's own test samples, and corner cases: x, weight, geometry
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
    ((2, 4, 6, 6), (4, 1, 3, 3), {"groups": 4, "padding": (1, 1)}),
    ((2, 4, 5, 5), (4, 1, 2, 2), {"groups": 4, "dilation": (2, 2)}),
    ((2, 4, 6, 5), (6, 2, 3, 2), {"groups": 2}),
    ((1, 4, 5, 5), (3, 4, 3, 3), {}),
    ((2, 5, 7, 6), (4, 5, 4, 2), {"padding": "same"}),
    ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    ((2, 3, 2, 2), (5, 3, 3, 3), {"padding": 4, "stride": 5}),
    ((1, 2, 33, 32), (2, 1, 31, 31), {"padding": 15, "groups": 2}),
]
# Padding modes: borders up to the size of the image, asymmetric ones, few channels, groups, strides, one pixel
BORDERS = [
    ((3, 17, 7, 9), (20, 17, 3, 3), {"padding": 1, "padding_mode": "reflect"}),
    ((2, 16, 5, 4), (33, 16, 3, 3), {"padding": (4, 3), "padding_mode": "reflect", "dilation": 2}),
    ((2, 18, 5, 4), (6, 18, 4, 2), {"padding": "same", "padding_mode": "circular"}),
    ((2, 5, 4, 6), (7, 5, 2, 4), {"padding": "same", "padding_mode": "reflect"}),
    ((2, 3, 8, 7), (18, 3, 3, 3), {"padding": (0, 2), "padding_mode": "replicate", "stride": 2}),
    ((2, 1, 9, 8), (2, 1, 5, 3), {"padding": (3, 1), "padding_mode": "circular", "stride": (2, 1)}),
    ((2, 19, 6, 5), (19, 1, 3, 3), {"padding": 1, "padding_mode": "circular", "groups": 19}),
    ((2, 8, 6, 5), (16, 1, 5, 5), {"padding": 2, "padding_mode": "reflect", "groups": 8}),
    ((2, 8, 6, 20), (8, 4, 3, 3), {"padding": 1, "padding_mode": "replicate", "groups": 2}),
    ((2, 40, 6, 6), (2, 40, 3, 3), {"padding": 1, "padding_mode": "reflect"}),
    ((2, 4, 1, 1), (4, 4, 3, 3), {"padding": 5, "padding_mode": "replicate"}),
    ((2, 4, 3, 1), (4, 4, 3, 3), {"padding": (3, 1), "padding_mode": "circular"}),
    ((1, 4, 40, 40), (4, 4, 3, 3), {"padding": 1, "padding_mode": "circular"}),
    ((2, 4, 3, 3), (4, 4, 3, 3), {"padding": 0, "padding_mode": "reflect"}),
]
