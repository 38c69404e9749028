"""Schemas of the conv2d family, and their shapes and layouts for tracing; csrc/ops/conv*2d.cpp validate."""

from __future__ import annotations

import torch

from . import _conv2d_cases as cases
from . import _conv2d_library as library
from ._conv2d_layout import is_channels_last
from ._function import compute_dtype
from ._registry import define

_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, int padding_mode, bool allow_tf32"


def _empty(like: torch.Tensor, shape, channels_last: bool) -> torch.Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


@define(
    f"conv2d_fwd(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, {_GEOMETRY}, int activation, "
    "bool save_pre) -> (Tensor, Tensor)",
    triton="conv2d",
    library=library.conv2d_fwd,
    case=cases.conv2d_fwd,
)
def _forward(
    input, weight, bias, residual, stride, padding, dilation, groups, padding_mode, allow_tf32, activation, save_pre
):
    torch._check(input.dim() == 4 and weight.dim() == 4, lambda: "conv2d: expected 4-dimensional input and weight")
    size = [
        (input.shape[2 + d] + padding[d] + padding[2 + d] - dilation[d] * (weight.shape[2 + d] - 1) - 1) // stride[d]
        + 1
        for d in (0, 1)
    ]
    shape = (input.shape[0], weight.shape[0], *size)
    last = is_channels_last(input) or is_channels_last(weight)
    return _empty(input, shape, last), _empty(input, shape, last) if save_pre else input.new_empty(0)


@define(
    "prologue_conv2d_fwd(Tensor input, Tensor? scale, Tensor? shift, int input_activation, Tensor weight, "
    f"Tensor? bias, Tensor? residual, {_GEOMETRY}, int activation, bool save_pre) -> (Tensor, Tensor)",
    triton="conv2d_prologue",
    library=library.prologue_conv2d_fwd,
    case=cases.prologue_conv2d_fwd,
    measured_as="conv2d_fwd",
)
def _(input, scale, shift, input_activation, *convolution):
    return _forward(input, *convolution)


@define(
    "conv2d_prologue_fwd(Tensor input, Tensor? scale, Tensor? shift, int activation) -> Tensor",
    triton="conv2d_prologue",
    library=library.conv2d_prologue_fwd,
)
def _(input, scale, shift, activation):
    return _empty(input, input.shape, is_channels_last(input))


@define(
    "conv2d_prologue_bwd(Tensor grad_output, Tensor input, Tensor? scale, Tensor? shift, int activation, "
    "bool with_sums) -> (Tensor, Tensor)",
    triton="conv2d_prologue",
    library=library.conv2d_prologue_bwd,
)
def _(grad_output, input, scale, shift, activation, with_sums):
    sums = input.new_empty((2, *input.shape[:2]) if with_sums else 0, dtype=compute_dtype(input))
    return _empty(input, input.shape, is_channels_last(input)), sums


@define(
    f"conv2d_bwd_input(Tensor grad_output, Tensor weight, SymInt[] input_shape, {_GEOMETRY}, bool channels_last) "
    "-> Tensor",
    triton="conv2d",
    library=library.conv2d_bwd_input,
    case=cases.conv2d_bwd_input,
)
def _(grad_output, weight, input_shape, stride, padding, dilation, groups, padding_mode, allow_tf32, channels_last):
    return _empty(grad_output, input_shape, channels_last)


@define(
    f"conv2d_bwd_weight(Tensor grad_output, Tensor input, SymInt[] kernel_size, {_GEOMETRY}, bool with_bias) "
    "-> (Tensor, Tensor)",
    triton="conv2d",
    library=library.conv2d_bwd_weight,
    case=cases.conv2d_bwd_weight,
)
def _(grad_output, input, kernel_size, stride, padding, dilation, groups, padding_mode, allow_tf32, with_bias):
    shape = (grad_output.shape[1], input.shape[1] // groups, *kernel_size)
    return input.new_empty(shape), input.new_empty(grad_output.shape[1] if with_bias else 0)


@define(
    "conv2d_bwd_activation(Tensor grad_output, Tensor saved, int activation) -> Tensor",
    triton="conv2d",
    library=library.conv2d_bwd_activation,
)
def _(grad_output, saved, activation):
    return _empty(saved, saved.shape, is_channels_last(saved))


@define("conv2d_epilogue(Tensor(a!) sum, Tensor? bias, Tensor? residual, int activation, Tensor(b!)? output) -> ()")
def _(sum, bias, residual, activation, output):
    pass


@define(
    "conv_transpose2d_fwd(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] stride, "
    "SymInt[] padding, SymInt[] output_padding, SymInt[] dilation, SymInt groups, bool allow_tf32, int activation, "
    "bool save_pre) -> (Tensor, Tensor)",
    triton="conv2d",
    library=library.conv_transpose2d_fwd,
    case=cases.conv_transpose2d_fwd,
)
def _(
    input, weight, bias, residual, stride, padding, output_padding, dilation, groups, allow_tf32, activation, save_pre
):
    torch._check(input.dim() == 4 and weight.dim() == 4, lambda: "conv_transpose2d: expected 4-dimensional operands")
    size = [
        (input.shape[2 + d] - 1) * stride[d]
        - 2 * padding[d]
        + dilation[d] * (weight.shape[2 + d] - 1)
        + output_padding[d]
        + 1
        for d in (0, 1)
    ]
    shape = (input.shape[0], weight.shape[1] * groups, *size)
    last = is_channels_last(input) or is_channels_last(weight)
    return _empty(input, shape, last), _empty(input, shape, last) if save_pre else input.new_empty(0)
