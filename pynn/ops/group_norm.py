"""group_norm: group normalisation, per-channel affine and an optional SiLU in one pass.

    y = act((x - mean) * rstd * weight + bias),    rstd = 1 / sqrt(variance + eps)

mean and variance are over the channels of a group and all pixels, act is the identity or silu(z) = z * sigmoid(z).
Saved for backward: the inputs, mean and rstd; the normalised value is computed again. The paper: Wu and He, "Group
Normalization", https://arxiv.org/abs/1803.08494.

On the CPU the memory of results of 1 MiB and more is kept for later ones when they are gone, 64 MiB at most: fresh
memory takes the system as long as the op. Such a result is a tensor like any other, but resize_() cannot enlarge it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import backends
from ._function import (
    call,
    call_in_backward,
    compute_dtype,
    double_backward,
    eager,
    loop_vmap,
    plain_apply,
    records_eagerly,
)
from ._registry import define


@define(
    "group_norm_fwd(Tensor input, Tensor? weight, Tensor? bias, SymInt num_groups, float eps, bool silu)"
    " -> (Tensor output, Tensor mean, Tensor rstd)",
    triton="group_norm",
)
def _(input, weight, bias, num_groups, eps, silu):
    output = torch.empty_like(input, memory_format=suggest_memory_format(input))
    statistics = [input.new_empty((input.shape[0], num_groups), dtype=compute_dtype(input)) for _ in range(2)]
    return output, *statistics


@define("group_norm_statistics(Tensor input, SymInt num_groups, float eps) -> (Tensor, Tensor)", triton="group_norm")
def _(input, num_groups, eps):
    mean, rstd = (input.new_empty((input.shape[0], num_groups), dtype=compute_dtype(input)) for _ in range(2))
    return mean, rstd


@define(
    "group_norm_bwd(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " SymInt num_groups, bool silu) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    triton="group_norm",
)
def _(grad_output, input, weight, bias, mean, rstd, num_groups, silu):
    grad_input = torch.empty_like(input, memory_format=suggest_memory_format(input))
    dtypes = [compute_dtype(input) if p is None else p.dtype for p in (weight, bias)]
    return grad_input, *(input.new_empty(input.shape[1], dtype=dtype) for dtype in dtypes)


def _composite(input, weight, bias, num_groups, eps, silu):
    """The op in differentiable torch operations."""
    x = input.to(compute_dtype(input)).reshape(input.shape[0], num_groups, -1)
    centered = x - x.mean(-1, keepdim=True)
    y = (centered * (centered.square().mean(-1, keepdim=True) + eps).rsqrt()).reshape(input.shape)
    channel = (-1, *(1,) * (input.dim() - 2))
    if weight is not None:
        y = y * weight.to(y.dtype).view(channel)
    if bias is not None:
        y = y + bias.to(y.dtype).view(channel)
    return (y * y.sigmoid() if silu else y).to(input.dtype)


@eager
class GroupNormBackward(torch.autograd.Function):
    """(grad_input, grad_weight, grad_bias) of GroupNorm; its own gradient comes from torch operations."""

    @staticmethod
    def forward(grad_output, input, weight, bias, mean, rstd, num_groups, eps, silu):
        op = backends.op("group_norm_bwd", input)
        return op(grad_output, input, weight, bias, mean, rstd, num_groups, silu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.config = inputs[6:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grad_grads):
        grad_output, *inputs = ctx.saved_tensors
        to_grad_output, to_inputs = double_backward(
            lambda *tensors: _composite(*tensors, *ctx.config), grad_output, inputs, grad_grads
        )
        return to_grad_output, *to_inputs, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(GroupNormBackward, info, in_dims, *inputs)


@eager
class GroupNorm(torch.autograd.Function):
    """(output, mean, rstd); only output is differentiable."""

    @staticmethod
    def forward(input, weight, bias, num_groups, eps, silu):
        return backends.op("group_norm_fwd", input)(input, weight, bias, num_groups, eps, silu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, *ctx.config = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx, grad_output, _mean, _rstd):
        if grad_output is None:
            return (None,) * 6
        input, weight, bias, mean, rstd = ctx.saved_tensors
        grads = call_in_backward(GroupNormBackward, grad_output, input, weight, bias, mean, rstd, *ctx.config)
        needed = ctx.needs_input_grad
        return (
            grads[0] if needed[0] else None,
            grads[1] if needed[1] else None,
            grads[2] if needed[2] else None,
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(info, in_dims, *inputs):
        input, *rest = inputs
        if any(d is not None for d in in_dims[1:]) or input.dim() < 3:
            return loop_vmap(GroupNorm, info, in_dims, *inputs)
        folded = input.movedim(in_dims[0], 0).flatten(0, 1)  # (B * N, C, ...)
        outputs = call(GroupNorm, folded, *rest)
        return tuple(o.unflatten(0, (info.batch_size, -1)) for o in outputs), (0, 0, 0)


class _Output(torch.autograd.Function):
    """The first output of GroupNorm, by the shortest way: on a small map calls take longer than kernels."""

    @staticmethod
    def forward(ctx, input, weight, bias, num_groups, eps, silu):
        output, *statistics = GroupNorm.forward(input, weight, bias, num_groups, eps, silu)
        ctx.save_for_backward(input, weight, bias, *statistics)
        ctx.config = num_groups, eps, silu
        return output

    @staticmethod
    def backward(ctx, grad_output):
        return GroupNorm.backward(ctx, grad_output, None, None)


_output = plain_apply(_Output)


def check_values(shape, num_groups: int) -> None:
    """Torch's rule for the values of a group, in its words."""
    if len(shape) >= 2 and 0 < num_groups == shape[0] * shape[1] and math.prod(shape[2:]) == 1:
        size = [1, num_groups, *shape[2:]]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> Tensor:
    """Group normalisation, optionally followed by an activation, as torch.nn.functional.group_norm.

    Args:
        input: (N, C, ...) float64, float32, float16 or bfloat16; contiguous and channels_last are read in place.
        num_groups: the number of groups, a divisor of C.
        weight: (C,) scale, in input's dtype, or float32 for half-precision input.
        bias: (C,) offset, likewise.
        eps: added to the variance.
        activation: None, or "silu" to return silu of the normalised value.
    Returns:
        (N, C, ...) in input's dtype, channels_last where input is, otherwise contiguous.
    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, in torch's words.
        ValueError: activation is unknown, or a group holds a single value and the batch a single sample.
    """
    if activation is not None and activation != "silu":
        raise ValueError(f'group_norm: expected activation to be None or "silu", got {activation!r}')
    check_values(input.shape, num_groups)
    inputs = input, weight, bias, num_groups, eps, activation == "silu"
    return _output(*inputs) if records_eagerly(inputs) else call(GroupNorm, *inputs)[0]
