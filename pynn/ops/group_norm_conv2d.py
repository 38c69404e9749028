"""group_norm_conv2d: a convolution of a group norm, and of SiLU of it, that is not kept.

    y = activation(conv(x', w) + bias + residual),    x' = act((x - mean) * rstd * norm_weight + norm_bias)

One read of the input gives mean and rstd; per channel x' is then act(x * scale + shift), the prologue of conv2d. The
backward computes x' again, and its gradient goes to x, norm_weight and norm_bias through the backward of group_norm:
that includes what mean and rstd depend on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ._conv2d_activation import ACTIVATIONS, check_activation
from ._conv2d_functions import Conv2d, ConvGradients, convolve, gradient_of_residual, gradient_of_sum, save_forward
from ._conv2d_prologue import Prologue
from ._function import autocast, call, call_in_backward, eager
from .conv2d import geometry_of
from .group_norm import GroupNorm, GroupNormBackward, check_values


def coefficients(mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, channels: int):
    """scale and shift (N, C) of a group norm with statistics (N, groups), in their dtype."""
    groups = mean.shape[1]
    scale = rstd.unsqueeze(2).expand(-1, -1, channels // groups)
    if weight is not None:
        scale = scale * weight.to(mean.dtype).view(groups, -1)
    shift = -mean.unsqueeze(2) * scale
    if bias is not None:
        shift = shift + bias.to(mean.dtype).view(groups, -1)
    return scale.flatten(1), shift.flatten(1)


@eager
class GroupNormConv2d(torch.autograd.Function):
    """(y, the value before the activation if save_pre else an empty tensor, mean, rstd)."""

    @staticmethod
    def forward(
        input, weight, bias, residual, geometry, activation, save_pre, norm_weight, norm_bias, num_groups, eps, silu
    ):
        mean, rstd = backends.op("group_norm_statistics", input)(input, num_groups, eps)
        scale, shift = coefficients(mean, rstd, norm_weight, norm_bias, input.shape[1])
        y, pre = backends.call(
            "prologue_conv2d_fwd", input, scale, shift, ACTIVATIONS.index("silu" if silu else None),
            weight, bias, residual, *geometry, ACTIVATIONS.index(activation), save_pre,
        )  # fmt: skip
        return y, pre, mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        norm_weight, norm_bias, *ctx.norm = inputs[7:]
        mean, rstd = output[2:]
        ctx.mark_non_differentiable(mean, rstd)
        save_forward(ctx, inputs[:7], output[:2], norm_weight, norm_bias, mean, rstd)

    @staticmethod
    def backward(ctx, grad_output, grad_pre, _mean, _rstd):
        input, weight, saved, norm_weight, norm_bias, mean, rstd = ctx.saved_tensors
        grad = gradient_of_sum(ctx, grad_output, grad_pre, saved)
        if grad is None:
            return (None,) * 12
        needed = ctx.needs_input_grad
        into_norm = needed[0], needed[7], needed[8]
        mask = (any(into_norm), needed[1], ctx.has_bias and needed[2])
        gradients = (None,) * 3
        if any(mask):
            image = _normalised(input, norm_weight, norm_bias, mean, rstd, *ctx.norm) if mask[1] else input
            gradients = call(ConvGradients, grad, image, weight, ctx.geometry, mask)
        grad_image, grad_weight, grad_bias = (g if m else None for g, m in zip(gradients, mask, strict=True))
        norm = (None,) * 3
        if grad_image is not None:
            inputs = grad_image, input, norm_weight, norm_bias, mean, rstd, *ctx.norm
            norm = call_in_backward(GroupNormBackward, *inputs)
            norm = tuple(g if wanted else None for g, wanted in zip(norm, into_norm, strict=True))
        rest = gradient_of_residual(ctx, grad), None, None, None, *norm[1:], None, None, None
        return norm[0], grad_weight, grad_bias, *rest

    @staticmethod
    def vmap(info, in_dims, *inputs):
        operands, dims = (inputs[0], *inputs[7:]), (in_dims[0], *in_dims[7:])
        if all(dim is None for dim in dims):
            (image, *statistics), (dim, *rest) = call(GroupNorm, *operands), (None,) * 3
        else:
            (image, *statistics), (dim, *rest) = GroupNorm.vmap(info, dims, *operands)
        results, out_dims = Conv2d.vmap(info, (dim, *in_dims[1:7]), image, *inputs[1:7])
        return (*results, *statistics), (*out_dims, *rest)


def _normalised(input, weight, bias, mean, rstd, num_groups, eps, silu) -> Tensor:
    """x' for the gradient of the convolution's weight; for a second derivative, mean and rstd are its parts too."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return call(GroupNorm, input, weight, bias, num_groups, eps, silu)[0]
    scale, shift = coefficients(mean, rstd, weight, bias, input.shape[1])
    return call(Prologue, input, scale, shift, "silu" if silu else None)


def group_norm_conv2d(
    input: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    eps: float = 1e-5,
    norm_activation: str | None = None,
    padding_mode: str = "zeros",
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """conv2d(group_norm(input, num_groups, norm_weight, norm_bias, eps, activation=norm_activation), weight, ...).

    The normalised image is neither kept for the backward pass nor, where conv2d applies a prologue to what it reads,
    written. scale and shift are rounded to float32 (float64 for float64): a group whose mean is 2^k standard deviations
    from 0 loses k bits of it, as in torch.nn.functional.group_norm on a CPU, not as in pynn.ops.group_norm.

    Args:
        input: (N, C, H, W), see conv2d. num_groups: of the group norm, a divisor of C.
        norm_weight, norm_bias, eps: as in group_norm. norm_activation: None or "silu".
        weight, bias, stride, padding, dilation, groups, padding_mode, activation, residual: as in conv2d. The padding
            "zeros" is zero after the normalisation and its activation.
    Returns:
        (N, O, OH, OW); channels_last when input or weight is.
    Raises:
        RuntimeError: shapes, dtypes or values do not fit; the messages are torch's.
        ValueError: unknown activation or padding_mode, or a group of a single value.
    """
    if norm_activation not in (None, "silu"):
        raise ValueError(f'group_norm_conv2d: expected norm_activation to be None or "silu", got {norm_activation!r}')
    check_activation("group_norm_conv2d", activation)
    if input.dim() != 4:
        raise RuntimeError(f"group_norm_conv2d: expected 4-dimensional input, got input of size {list(input.shape)}")
    check_values(input.shape, num_groups)
    for name, values in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if values is not None and values.shape != input.shape[1:2]:
            raise RuntimeError(
                f"group_norm_conv2d: expected {name} of shape {list(input.shape[1:2])}, got {list(values.shape)}"
            )
    input, weight, bias, residual = autocast(input, weight, bias, residual)
    geometry = geometry_of(input, weight, stride, padding, dilation, groups, padding_mode)
    norm = norm_weight, norm_bias, num_groups, eps, norm_activation == "silu"
    return convolve(GroupNormConv2d, input, weight, bias, residual, geometry, activation, *norm)
