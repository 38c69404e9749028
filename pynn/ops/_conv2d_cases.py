"""What the choice of a backend for a convolution depends on, see pynn.choices."""

from __future__ import annotations

import functools

from ..choices import Case
from ._conv2d_layout import is_channels_last


@functools.lru_cache(maxsize=4096)
def _case(shape, outputs: int, kernel, stride, padding, dilation, groups: int, padding_mode: int, last: bool):
    if len(shape) != 4 or tuple(map(len, (kernel, stride, padding, dilation))) != (2, 2, 4, 2) or groups < 1:
        return None  # the op's validation will say what is wrong
    if padding_mode or padding[:2] != padding[2:] or min(stride) < 1:
        return None  # the library would copy the image first
    batch, channels, *size = shape
    kind = "dense" if groups == 1 else "depthwise" if groups == channels else "grouped"
    positions = 1
    for extent, k, s, p, d in zip(size, kernel, stride, padding[:2], dilation, strict=True):
        positions *= (extent + 2 * p - d * (k - 1) - 1) // s + 1
    text = [f"{name}{h}x{w}" for name, (h, w) in (("k", kernel), ("s", stride), ("d", dilation))]
    category = " ".join((kind, *text, "NHWC" if last else "NCHW"))
    map_size = round(max(positions, 0) ** 0.5)  # borders matter where maps are small
    widths = groups if kind == "depthwise" else channels // groups, outputs // groups
    return Case(category, (*widths, batch * positions, map_size))


def conv2d_fwd(input, weight, bias, residual, stride, padding, dilation, groups, padding_mode, *_) -> Case | None:
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups, padding_mode
    return _case(input.shape, weight.shape[0], weight.shape[2:], *geometry, is_channels_last(input))


def prologue_conv2d_fwd(input, scale, shift, input_activation, *convolution) -> Case | None:
    """As the convolution behind the prologue: the pass before it costs every backend about the same."""
    return conv2d_fwd(input, *convolution)


def conv2d_bwd_input(grad, weight, input_shape, stride, padding, dilation, groups, padding_mode, *_) -> Case | None:
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups, padding_mode
    return _case(tuple(input_shape), weight.shape[0], weight.shape[2:], *geometry, is_channels_last(grad))


def conv2d_bwd_weight(grad, input, kernel, stride, padding, dilation, groups, padding_mode, *_) -> Case | None:
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups, padding_mode
    return _case(input.shape, grad.shape[1], tuple(kernel), *geometry, is_channels_last(input))


def conv_transpose2d_fwd(
    input, weight, bias, residual, stride, padding, output_padding, dilation, groups, *_
) -> Case | None:
    """As the input gradient it is, of the convolution with output_padding more at the far end."""
    if input.dim() != 4 or weight.dim() != 4 or any(len(v) != 2 for v in (stride, padding, output_padding, dilation)):
        return None
    size = [
        (input.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (weight.shape[2 + d] - 1) + 1
        for d in (0, 1)
    ]
    shape = (input.shape[0], weight.shape[1] * groups, *size)
    geometry = tuple(stride), (*padding, *padding), tuple(dilation), groups, 0
    return _case(shape, weight.shape[0], weight.shape[2:], *geometry, is_channels_last(input))
