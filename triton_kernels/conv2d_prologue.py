"""conv2d with a prologue in Triton: the convolution of activation(input * scale + shift). See conv2d_prologue.h.

The matrix product applies the prologue to each block of the input that it has loaded, where that repeats little of it;
elsewhere, and before the kernels for few channels, it is a pass of its own.
"""

from __future__ import annotations

import torch
import triton

from ..ops._conv2d_layout import is_channels_last
from ..ops._function import compute_dtype
from . import conv2d_configs as configs
from .conv2d import conv2d_fwd, elementwise, empty, with_epilogue
from .conv2d_launch import (
    Layout,
    add_splits,
    axes,
    compute_type,
    index_type,
    kind_of,
    launch,
    levels_of,
    multiplies,
    pack_of,
)
from .conv2d_prologue_kernels import prologue_gradient_kernel, prologue_kernel

_STEPS = 4  # blocks of pixels of a program of the gradient


def _coefficients(input: torch.Tensor, scale, shift) -> dict[str, object]:
    """scale and shift in the type that is computed in, as the kernels take them."""
    dtype = compute_dtype(input)
    scale, shift = (None if t is None else t.to(dtype).contiguous() for t in (scale, shift))
    per_sample = {f"{name}_SAMPLES": t is not None and t.dim() == 2 for name, t in (("SCALE", scale), ("SHIFT", shift))}
    return {"scale": scale, "shift": shift, **per_sample}


def conv2d_prologue_fwd(input, scale, shift, activation):
    """conv2d_prologue_fwd(Tensor input, Tensor? scale, Tensor? shift, int activation) -> Tensor"""
    y = empty(input, input.shape, is_channels_last(input))
    if y.numel():
        elementwise(prologue_kernel, y, input, KIND=activation, **_coefficients(input, scale, shift))
    return y


def conv2d_prologue_bwd(grad_output, input, scale, shift, activation, with_sums):
    """conv2d_prologue_bwd(Tensor grad_output, Tensor input, Tensor? scale, Tensor? shift, int activation,
    bool with_sums) -> (Tensor, Tensor)"""
    dx = empty(input, input.shape, is_channels_last(input))
    batch, channels, height, width = input.shape
    sums = input.new_empty((2, batch, channels) if with_sums else 0, dtype=compute_dtype(input))
    if not dx.numel():
        return dx, sums.zero_()
    tile = configs.sum_tile(channels, input.element_size(), 4096 // input.element_size())
    splits = triton.cdiv(height * width, tile.pixels * _STEPS)
    partials = sums.new_empty((splits, *sums.shape)) if with_sums else None
    layout, y_layout, s_layout = (Layout.of(t) for t in (dx, grad_output, input))
    pack = pack_of(input, channels)
    launch(
        prologue_gradient_kernel, batch * splits * triton.cdiv(channels, tile.channels), input,
        dx, partials, grad_output, input, *y_layout.strides, *s_layout.strides, *layout.strides,
        batch, height, width, channels // pack, _STEPS, splits,
        **_coefficients(input, scale, shift), KIND=activation, X_UNIT=layout.unit, X_PACK=layout.pack,
        Y_UNIT=y_layout.unit, Y_PACK=y_layout.pack, S_UNIT=s_layout.unit, S_PACK=s_layout.pack, PACK=pack,
        INDEX=index_type(height * width + tile.pixels * _STEPS, dx, grad_output, input), COMPUTE=compute_type(input),
        BLOCK_P=tile.pixels, BLOCK_C=tile.channels, LEVELS=levels_of(tile.pixels), options=tile.options,
    )  # fmt: skip
    if partials is not None:
        add_splits(sums, partials, 1, 1)
    return dx, sums


def prologue_conv2d_fwd(
    input, scale, shift, input_activation, weight, bias, residual, stride, padding, dilation, groups, padding_mode,
    allow_tf32, activation, save_pre,
):  # fmt: skip
    """prologue_conv2d_fwd(Tensor input, Tensor? scale, Tensor? shift, int input_activation, Tensor weight,
    Tensor? bias, Tensor? residual, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups,
    int padding_mode, bool allow_tf32, int activation, bool save_pre) -> (Tensor, Tensor)"""
    h, w = axes(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    per_sample = any(t is not None and t.dim() == 2 for t in (scale, shift))
    if not _applies_in_kernel(input, weight, h, w, groups, allow_tf32, per_sample):
        image = conv2d_prologue_fwd(input, scale, shift, input_activation)
        return conv2d_fwd(
            image, weight, bias, residual, stride, padding, dilation, groups, padding_mode, allow_tf32, activation,
            save_pre,
        )  # fmt: skip
    shape = (input.shape[0], weight.shape[0], h.out, w.out)
    last = is_channels_last(input) or is_channels_last(weight)
    return with_epilogue(
        shape, last, save_pre, input, weight, h, w, groups, padding_mode, allow_tf32,
        transposed=False, bias=bias, residual=residual, activation=activation,
        prologue={"PROLOGUE": input_activation, **_coefficients(input, scale, shift)},
    )  # fmt: skip


def _applies_in_kernel(input, weight, h, w, groups, allow_tf32, per_sample) -> bool:
    """Whether the matrix product applies the prologue: each tap and block of output channels that reads a pixel does it
    again, which costs little next to a pass where those are few, or where the GPU is not full. Coefficients of each
    sample are read where a block of pixels has one sample."""
    outputs, reduced = weight.shape[0] // groups, weight.shape[1]
    if not multiplies(reduced, outputs):
        return False
    tile = configs.product_tile(kind_of(input, allow_tf32), outputs)
    if per_sample and h.out * w.out % tile.pixels:
        return False
    columns = triton.cdiv(outputs, tile.channels)
    programs = triton.cdiv(input.shape[0] * h.out * w.out, tile.pixels) * columns * groups
    return h.kernel * w.kernel * columns <= configs.MOST_REPEATS or programs < configs.PROGRAMS // 2
