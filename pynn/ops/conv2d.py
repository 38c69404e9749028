"""conv2d: y = activation(conv(x, w) + bias + residual) in one pass over memory.

    x (N, C, H, W), w (O, C / groups, KH, KW), bias (O), residual broadcastable to y (N, O, OH, OW)
    y[n, o, i, j] = f(bias[o] + residual[n, o, i, j]
                      + sum over c, a, b of w[o, c, a, b] x[n, c, i s - pad + a d, j s - pad + b d])

with stride s and dilation d. Outside the image x is 0, or the image continued as padding_mode says. Convolution is
bilinear, so every derivative of every order is made of the same three ops: forward, input gradient and weight gradient.
silu and gelu save the activation's input, the others their output.

With a prologue, x' = f(x scale[c] + shift[c]) stands in place of x, as after a normalisation: see _conv2d_prologue.py.
"""

from __future__ import annotations

import torch

from . import _conv2d_torch
from ._conv2d_activation import ACTIVATIONS, check_activation
from ._conv2d_functions import Conv2d, Geometry, convolve
from ._conv2d_layout import PADDING_MODES, allows_tf32
from ._conv2d_prologue import PrologueConv2d
from ._function import autocast

__all__ = ["ACTIVATIONS", "PADDING_MODES", "conv2d"]


def pair(value) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _padding(weight: torch.Tensor, stride, padding, dilation) -> tuple[int, ...]:
    """(top, left, bottom, right)."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise RuntimeError(f"Invalid padding string: '{padding}'")
        if padding == "valid" or weight.dim() != 4 or len(dilation) != 2:
            return (0,) * 4
        if any(s != 1 for s in stride):
            raise RuntimeError("padding='same' is not supported for strided convolutions")
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        before = [t // 2 for t in total]
        return *before, *(t - b for t, b in zip(total, before, strict=True))
    padding = pair(padding)
    if len(padding) != 2:
        raise RuntimeError(
            "expected padding to be a single integer value or a list of 2 values to match the convolution dimensions, "
            f"but got padding={list(padding)}"
        )
    return padding * 2


def geometry_of(input, weight, stride, padding, dilation, groups, padding_mode) -> Geometry:
    """The arguments of torch.nn.functional.conv2d as the ops take them.

    Raises:
        ValueError: unknown padding_mode. RuntimeError: a padding that is none.
    """
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"conv2d: expected padding_mode to be one of {PADDING_MODES}, got {padding_mode!r}")
    stride, dilation = pair(stride), pair(dilation)
    return Geometry(
        stride,
        _padding(weight, stride, padding, dilation),
        dilation,
        groups,
        PADDING_MODES.index(padding_mode),
        input.is_cuda and allows_tf32(),
    )


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    input_shift: torch.Tensor | None = None,
    input_activation: str | None = None,
) -> torch.Tensor:
    """2-D convolution, with bias, residual and activation in the same pass: activation(conv + bias + residual).

    Args:
        input: (N, C, H, W) or (C, H, W); float64, float32, float16 or bfloat16, any strides.
        weight: (O, C / groups, KH, KW). bias: (O).
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d, "same" and "valid" included.
        padding_mode: what stands in the padding: zeros, or the image's own pixels by reflect, replicate or circular,
            as in torch.nn.Conv2d. No padded copy of the input is made.
        activation: relu, leaky_relu (slope 0.01), silu, gelu (exact), gelu_tanh, sigmoid or tanh.
        residual: broadcastable to the output; zero strides are read as they are, without a copy.
        input_scale, input_shift: (C) or (N, C), in input's dtype or, for half precision, in float32. The convolution
            is that of input_activation(input * input_scale + input_shift), which the padding "zeros" continues with
            zeros: they are neither shifted nor activated. What it convolves is not kept for the backward pass.
            The matrix products on a GPU apply it to what they load, or in the copy of a few images that they read;
            the CPU, the library and the kernels for few channels read what a pass over the input wrote.
        input_activation: as activation; may be given without the other two.
    Float32 is computed in float32; torch.set_float32_matmul_precision("high") allows TF32 tensor cores.
    Returns:
        (N, O, OH, OW) or (O, OH, OW); channels_last when input or weight is.
    Raises:
        RuntimeError: shapes, dtypes or values do not fit; the messages are torch's.
        ValueError: unknown activation, input_activation or padding_mode.
    """
    check_activation("conv2d", activation)
    input, weight, bias, residual = autocast(input, weight, bias, residual)
    geometry = geometry_of(input, weight, stride, padding, dilation, groups, padding_mode)
    if input_scale is None and input_shift is None and input_activation is None:
        if activation is None and residual is None and _conv2d_torch.is_fastest(input, weight, bias, geometry):
            return _conv2d_torch.conv2d(input, weight, bias, geometry)
        return convolve(Conv2d, input, weight, bias, residual, geometry, activation)
    check_activation("conv2d", input_activation, "input_activation")
    prologue = input_scale, input_shift, input_activation
    return convolve(PrologueConv2d, input, weight, bias, residual, geometry, activation, *prologue)
