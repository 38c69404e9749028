"""conv2d: y = activation(conv(x, w) + bias + residual) in one pass over memory.

    x (N, C, H, W), w (O, C / groups, KH, KW), bias (O), residual broadcastable to y (N, O, OH, OW)
    y[n, o, i, j] = f(bias[o] + residual[n, o, i, j]
                      + sum over c, a, b of w[o, c, a, b] x[n, c, i s - pad + a d, j s - pad + b d])

with stride s and dilation d. Convolution is bilinear, so every derivative of every order is made of the same three ops:
forward, input gradient and weight gradient. silu and gelu save the activation's input, the others their output.
"""

from __future__ import annotations

import torch

from ._conv2d_functions import ACTIVATIONS, FROM_INPUT, Conv2d
from ._function import autocast, call


def _pair(value) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _geometry(weight: torch.Tensor, stride, padding, dilation, groups: int, tf32: bool):
    """(stride, (top, left, bottom, right), dilation, groups, padding_mode, allow_tf32)."""
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise RuntimeError(f"Invalid padding string: '{padding}'")
        if padding == "valid" or weight.dim() != 4 or len(dilation) != 2:
            return stride, (0,) * 4, dilation, groups, 0, tf32
        if any(s != 1 for s in stride):
            raise RuntimeError("padding='same' is not supported for strided convolutions")
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        before = [t // 2 for t in total]
        return stride, (*before, *(t - b for t, b in zip(total, before, strict=True))), dilation, groups, 0, tf32
    padding = _pair(padding)
    if len(padding) != 2:
        raise RuntimeError(
            "expected padding to be a single integer value or a list of 2 values to match the convolution dimensions, "
            f"but got padding={list(padding)}"
        )
    return stride, padding * 2, dilation, groups, 0, tf32


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """2-D convolution, with bias, residual and activation in the same pass: activation(conv + bias + residual).

    Args:
        input: (N, C, H, W) or (C, H, W); float64, float32, float16 or bfloat16, any strides.
        weight: (O, C / groups, KH, KW). bias: (O).
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d, "same" and "valid" included.
        activation: relu, leaky_relu (slope 0.01), silu, gelu (exact), gelu_tanh, sigmoid or tanh.
        residual: broadcastable to the output; zero strides are read as they are, without a copy.
    Float32 is computed in float32; torch.set_float32_matmul_precision("high") allows TF32 tensor cores.
    Returns:
        (N, O, OH, OW) or (O, OH, OW); channels_last when input or weight is.
    Raises:
        RuntimeError: shapes, dtypes or values do not fit; the messages are torch's.
        ValueError: unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv2d: expected activation to be one of {ACTIVATIONS}, got {activation!r}")
    tensors = input, weight, bias, residual = autocast(input, weight, bias, residual)
    tf32 = input.is_cuda and torch.get_float32_matmul_precision() != "highest"
    geometry = _geometry(weight, stride, padding, dilation, groups, tf32)
    batched = input.dim() != 3
    tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    wants_grad = tracing or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
    save_pre = activation in FROM_INPUT and wants_grad
    y = call(Conv2d, input if batched else input.unsqueeze(0), weight, bias, residual, geometry, activation, save_pre)[
        0
    ]
    return y if batched else y.squeeze(0)
