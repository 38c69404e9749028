"""conv2d in Triton: y = activation(conv(x, w) + bias + residual), and its gradients. See csrc/include/conv2d.h.

Forward and input gradient are one computation, a correlation that the gradient runs for each stride phase. A matrix
product (conv2d_gemm.py) does it where the channels of a group fill one, otherwise plain sums (conv2d_direct.py). Every
sum is made in an order that only the shape of a sample and the kernel decide (the weight gradient: the whole shape).
Tensors are read with the strides they have; weights, which are small, are brought into the order of the sums first.
"""

from __future__ import annotations

import torch
import triton

from ..ops._conv2d_layout import is_channels_last
from . import conv2d_configs as configs
from .conv2d_launch import (
    Axis,
    Layout,
    add_splits,
    axes,
    compute_type,
    correlate,
    index_type,
    launch,
    levels_of,
    pack_of,
    splits_of,
    weight_gradient,
)
from .conv2d_sums import activation_kernel, channel_sums_kernel, fold_kernel


def empty(like: torch.Tensor, shape, channels_last: bool) -> torch.Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def conv2d_fwd(
    input, weight, bias, residual, stride, padding, dilation, groups, padding_mode, allow_tf32, activation, save_pre
):
    """conv2d_fwd(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] stride, SymInt[] padding,
    SymInt[] dilation, SymInt groups, int padding_mode, bool allow_tf32, int activation, bool save_pre)
    -> (Tensor, Tensor)"""
    h, w = axes(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    shape = (input.shape[0], weight.shape[0], h.out, w.out)
    last = is_channels_last(input) or is_channels_last(weight)
    return with_epilogue(
        shape, last, save_pre, input, weight, h, w, groups, padding_mode, allow_tf32,
        transposed=False, bias=bias, residual=residual, activation=activation,
    )  # fmt: skip


def with_epilogue(shape, channels_last, save_pre, input, *geometry, residual, **rest):
    """The result and, if save_pre, its value before the activation."""
    y = empty(input, shape, channels_last)
    pre = torch.empty_like(y) if save_pre else None
    if y.numel():
        residual = None if residual is None else residual.expand(shape)
        correlate(input, geometry[0], y, *geometry[1:], pre=pre, residual=residual, **rest)
    return y, input.new_empty(0) if pre is None else pre


def conv2d_bwd_input(
    grad_output, weight, input_shape, stride, padding, dilation, groups, padding_mode, allow_tf32, channels_last
):
    """conv2d_bwd_input(Tensor grad_output, Tensor weight, SymInt[] input_shape, SymInt[] stride, SymInt[] padding,
    SymInt[] dilation, SymInt groups, int padding_mode, bool allow_tf32, bool channels_last) -> Tensor"""
    dx = empty(grad_output, input_shape, channels_last)
    if not dx.numel():
        return dx
    h, w = axes(input_shape[2:], weight.shape[2:], stride, padding, dilation)
    arguments = groups, 0, allow_tf32
    if padding_mode == 0 or not any(padding):
        correlate(grad_output, weight, dx, h, w, *arguments, transposed=True)
        return dx
    shape = (*input_shape[:2], h.size + h.before + h.after, w.size + w.before + w.after)
    dtype = torch.float64 if dx.dtype is torch.float64 else torch.float32
    padded = empty(grad_output.new_empty(0, dtype=dtype), shape, channels_last)
    correlate(grad_output, weight, padded, h.padded(), w.padded(), *arguments, transposed=True)
    elementwise(
        fold_kernel, dx, padded,
        more=(h.before, h.after, w.before, w.after), PADDING=padding_mode,
    )  # fmt: skip
    return dx


def elementwise(kernel, x, *others, more=(), **constants) -> None:
    """Runs kernel(x, *others, strides of others and of x, sizes, *more, ...) on blocks of pixels and channels of x."""
    layout = Layout.of(x)
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    tile = (
        configs.row_tile(channels)
        if pixels == 1
        else configs.direct_tile(channels, layout.unit == 1, x.element_size(), 2048)
    )
    blocks, pack = triton.cdiv(pixels, tile.pixels), pack_of(x, channels)
    layouts = [Layout.of(t) for t in others]
    for name, other in zip("YS", layouts, strict=False):
        constants |= {f"{name}_UNIT": other.unit, f"{name}_PACK": other.pack}
    launch(
        kernel, blocks * triton.cdiv(channels, tile.channels), x,
        x, *others, *(stride for each in layouts for stride in each.strides), *layout.strides,
        batch, height, width, channels // pack, *more,
        **constants, X_UNIT=layout.unit, X_PACK=layout.pack, PACK=pack, INDEX=index_type(pixels, x, *others),
        COMPUTE=compute_type(x), BLOCK_P=tile.pixels, BLOCK_C=tile.channels, options=tile.options,
    )  # fmt: skip


def conv2d_bwd_activation(grad_output, saved, activation):
    """conv2d_bwd_activation(Tensor grad_output, Tensor saved, int activation) -> Tensor"""
    dz = empty(saved, saved.shape, is_channels_last(saved))
    if not dz.numel():
        return dz
    x, dy, s = dz, grad_output, saved
    if dz.stride() == grad_output.stride() == saved.stride():  # one row
        x, dy, s = (t.as_strided((1, t.numel(), 1, 1), (0, 1, 0, 0)) for t in (dz, grad_output, saved))
    elementwise(activation_kernel, x, dy, s, KIND=activation)
    return dz


def _bias_gradient(dy: torch.Tensor) -> torch.Tensor:
    layout = Layout.of(dy)
    batch, channels, height, width = dy.shape
    pixels, pack = batch * height * width, pack_of(dy, channels)
    tile = configs.sum_tile(channels, dy.element_size(), 2048)
    c_blocks = triton.cdiv(channels, tile.channels)
    splits, steps = splits_of(pixels, tile.pixels, c_blocks)
    compute = torch.float64 if dy.dtype is torch.float64 else torch.float32
    partials, dbias = dy.new_empty((splits, channels), dtype=compute), dy.new_empty(channels)
    launch(
        channel_sums_kernel, splits * c_blocks, dy,
        partials, dy, *layout.strides, batch, height, width, channels // pack, steps,
        X_UNIT=layout.unit, X_PACK=layout.pack, PACK=pack, INDEX=index_type(pixels + steps * tile.pixels, dy),
        COMPUTE=compute_type(dy), BLOCK_P=tile.pixels, BLOCK_C=tile.channels, LEVELS=levels_of(tile.pixels),
        options=tile.options,
    )  # fmt: skip
    add_splits(dbias, partials, 1, 1)
    return dbias


def conv2d_bwd_weight(
    grad_output, input, kernel_size, stride, padding, dilation, groups, padding_mode, allow_tf32, with_bias
):
    """conv2d_bwd_weight(Tensor grad_output, Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding,
    SymInt[] dilation, SymInt groups, int padding_mode, bool allow_tf32, bool with_bias) -> (Tensor, Tensor)"""
    dy, x = grad_output, input
    reduced, outputs = x.shape[1] // groups, dy.shape[1] // groups
    dw = x.new_empty((dy.shape[1], reduced, *kernel_size))
    if not dy.numel():
        return dw.zero_(), x.new_zeros(dy.shape[1] if with_bias else 0)
    if dw.numel():
        h, w = axes(x.shape[2:], kernel_size, stride, padding, dilation)
        weight_gradient(dw, dy, x, h, w, groups, reduced, outputs, padding_mode, allow_tf32)
    return dw, _bias_gradient(dy) if with_bias else x.new_empty(0)


def conv_transpose2d_fwd(
    input, weight, bias, residual, stride, padding, output_padding, dilation, groups, allow_tf32, activation, save_pre
):
    """conv_transpose2d_fwd(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] stride,
    SymInt[] padding, SymInt[] output_padding, SymInt[] dilation, SymInt groups, bool allow_tf32, int activation,
    bool save_pre) -> (Tensor, Tensor)"""
    h, w = (
        Axis(
            (input.shape[2 + d] - 1) * stride[d]
            - 2 * padding[d]
            + dilation[d] * (weight.shape[2 + d] - 1)
            + output_padding[d]
            + 1,
            input.shape[2 + d],
            weight.shape[2 + d],
            stride[d],
            padding[d],
            padding[d],
            dilation[d],
        )
        for d in (0, 1)
    )
    shape = (input.shape[0], weight.shape[1] * groups, h.size, w.size)
    last = is_channels_last(input) or is_channels_last(weight)
    return with_epilogue(
        shape, last, save_pre, input, weight, h, w, groups, 0, allow_tf32,
        transposed=True, bias=bias, residual=residual, activation=activation,
    )  # fmt: skip
