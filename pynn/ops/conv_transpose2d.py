"""conv_transpose2d: y = activation(transposed conv(x, w) + bias + residual) in one pass over memory.

    x (N, C, H, W), w (C, O / groups, KH, KW), bias (O), residual broadcastable to y (N, O, OH, OW)
    y[n, o, i s - pad + a d, j s - pad + b d] += x[n, c, i, j] w[c, o, a, b]   for every c, i, j, a, b

and then f(y + bias + residual), with stride s and dilation d. It is the input gradient of conv2d, computed by the same
kernels: its input gradient is a conv2d, its weight gradient that of conv2d with input and grad_output exchanged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import backends
from . import _conv2d_vmap
from ._conv2d_activation import ACTIVATIONS, check_activation
from ._conv2d_functions import (
    Conv2d,
    ConvGradients,
    Geometry,
    convolve,
    gradient_of_residual,
    gradient_of_sum,
    save_forward,
)
from ._conv2d_layout import allows_tf32
from ._function import autocast, call, eager
from .conv2d import pair


class TransposedGeometry(NamedTuple):
    """The arguments of conv_transpose2d_fwd after its tensors, in their order."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    allow_tf32: bool

    def convolution(self, grad: torch.Tensor) -> tuple[torch.Tensor, Geometry]:
        """The convolution whose input gradient this is, and as much of grad as it reads.

        An output_padding of the stride or more (dilation permits it) takes from the padding at the far end: else the
        convolution had more outputs than this has inputs.
        """
        far = [
            p - max(0, extra - (s - 1))
            for p, extra, s in zip(self.padding, self.output_padding, self.stride, strict=True)
        ]
        for dim, padding in zip((2, 3), far, strict=True):
            if padding < 0:
                grad = grad.narrow(dim, 0, grad.shape[dim] + padding)
        sides = (*self.padding, *(max(0, p) for p in far))
        return grad, Geometry(self.stride, sides, self.dilation, self.groups, 0, self.allow_tf32)


@eager
class ConvTranspose2d(torch.autograd.Function):
    """(y, the value before the activation if save_pre else an empty tensor)."""

    @staticmethod
    def forward(input, weight, bias, residual, geometry, activation, save_pre):
        number = ACTIVATIONS.index(activation)
        return backends.call("conv_transpose2d_fwd", input, weight, bias, residual, *geometry, number, save_pre)

    @staticmethod
    def setup_context(ctx, inputs, output):
        save_forward(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad_output, grad_pre):
        input, weight, saved = ctx.saved_tensors
        grad = gradient_of_sum(ctx, grad_output, grad_pre, saved)
        if grad is None:
            return (None,) * 7
        read, geometry = ctx.geometry.convolution(grad)
        grad_input = grad_weight = None
        if min(read.shape[2:]) == 0:  # every tap falls into the padding
            grad_input, grad_weight = torch.zeros_like(input), torch.zeros_like(weight)
        else:
            if ctx.needs_input_grad[0]:
                grad_input = call(Conv2d, read, weight, None, None, geometry, None, False)[0]
            if ctx.needs_input_grad[1]:
                grad_weight = call(ConvGradients, input, read, weight, geometry, (False, True, False))[1]
        grad_bias = grad.sum((0, 2, 3)) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, gradient_of_residual(ctx, grad), None, None, None

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, residual, geometry, activation, save_pre):
        def apply(*operands):
            *tensors, groups = operands
            return call(ConvTranspose2d, *tensors, geometry._replace(groups=groups), activation, save_pre)

        return _conv2d_vmap.forward(
            apply, info.batch_size, in_dims[:4], (input, weight, bias, residual), geometry.groups, True
        )


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """2-D transposed convolution, with bias, residual and activation in the same pass.

    Args:
        input: (N, C, H, W) or (C, H, W); float64, float32, float16 or bfloat16, any strides.
        weight: (C, O / groups, KH, KW). bias: (O).
        stride, padding, output_padding, groups, dilation: as in torch.nn.functional.conv_transpose2d.
        activation: relu, leaky_relu (slope 0.01), silu, gelu (exact), gelu_tanh, sigmoid or tanh.
        residual: broadcastable to the output; zero strides are read as they are, without a copy.
    Float32 is computed in float32; torch.set_float32_matmul_precision("high") allows TF32 tensor cores.
    Returns:
        (N, O, OH, OW) or (O, OH, OW) with OH = (H - 1) stride - 2 padding + dilation (KH - 1) + output_padding + 1;
        channels_last when input or weight is.
    Raises:
        RuntimeError: shapes, dtypes or values do not fit; the messages are torch's.
        ValueError: unknown activation.
    """
    check_activation("conv_transpose2d", activation)
    input, weight, bias, residual = autocast(input, weight, bias, residual)
    geometry = TransposedGeometry(
        pair(stride),
        pair(padding),
        pair(output_padding),
        pair(dilation),
        groups,
        input.is_cuda and allows_tf32(),
    )
    return convolve(ConvTranspose2d, input, weight, bias, residual, geometry, activation)
