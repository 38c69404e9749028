"""conv2d on PyTorch's own convolution (oneDNN, cuDNN), with bias, residual and activation in one pass of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ._conv2d_layout import PADDING_MODES, is_channels_last


def conv2d_fwd(
    input,
    weight,
    bias,
    residual,
    stride,
    padding,
    dilation,
    groups,
    padding_mode,
    allow_tf32,
    activation,
    save_pre,
):
    last = is_channels_last(input) or is_channels_last(weight)
    if any(padding[d] != padding[d + 2] for d in (0, 1)) or padding_mode:
        input, padding = _pad(input, padding, padding_mode), (0, 0)
    geometry = stride, padding[:2], dilation, False, (0, 0), groups
    return _finished(input, weight, bias, residual, geometry, allow_tf32, activation, save_pre, last)


def prologue_conv2d_fwd(input, scale, shift, input_activation, *convolution):
    """The prologue as a pass of ours, then the convolution."""
    return conv2d_fwd(conv2d_prologue_fwd(input, scale, shift, input_activation), *convolution)


def conv_transpose2d_fwd(
    input,
    weight,
    bias,
    residual,
    stride,
    padding,
    output_padding,
    dilation,
    groups,
    allow_tf32,
    activation,
    save_pre,
):
    last = is_channels_last(input) or is_channels_last(weight)
    geometry = stride, padding, dilation, True, output_padding, groups
    return _finished(input, weight, bias, residual, geometry, allow_tf32, activation, save_pre, last)


def _finished(input, weight, bias, residual, geometry, allow_tf32: bool, activation: int, save_pre: bool, last: bool):
    fuse_bias = bias is not None and input.is_cuda  # there the convolution would add it in a pass of its own
    with _precision(input, allow_tf32):
        sum = torch.convolution(input, weight, None if fuse_bias else bias, *geometry)  # cheaper than through torch.ops
    sum = sum.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    output = torch.empty_like(sum) if save_pre else None
    if fuse_bias or activation or residual is not None:
        if residual is not None and residual.dim() < sum.dim():
            residual = residual[(None,) * (sum.dim() - residual.dim())]
        torch.ops.pynn.conv2d_epilogue.default(sum, bias if fuse_bias else None, residual, activation, output)
    elif output is not None:
        output.copy_(sum)
    return (sum, input.new_empty(0)) if output is None else (output, sum)


def conv2d_bwd_input(
    grad_output,
    weight,
    input_shape,
    stride,
    padding,
    dilation,
    groups,
    padding_mode,
    allow_tf32,
    channels_last,
):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if any(padding[d] != padding[d + 2] for d in (0, 1)) or padding_mode:
        height, width = (input_shape[2 + d] + padding[d] + padding[2 + d] for d in (0, 1))
        inner = conv2d_bwd_input(
            grad_output,
            weight,
            (*input_shape[:2], height, width),
            stride,
            (0,) * 4,
            dilation,
            groups,
            0,
            allow_tf32,
            channels_last,
        )
        return _unpad(inner, padding, padding_mode).contiguous(memory_format=memory_format)
    image = torch.empty(
        input_shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format
    )  # only its shape and layout are read
    mask = (True, False, False)
    with _precision(grad_output, allow_tf32):
        grad = torch.ops.aten.convolution_backward.default(
            grad_output, image, weight, None, stride, padding[:2], dilation, False, (0, 0), groups, mask
        )[0]
    return grad.contiguous(memory_format=memory_format)


def conv2d_bwd_weight(
    grad_output,
    input,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    padding_mode,
    allow_tf32,
    with_bias,
):
    if any(padding[d] != padding[d + 2] for d in (0, 1)) or padding_mode:
        input, padding = _pad(input, padding, padding_mode), (0, 0)
    channels = grad_output.shape[1]
    weight = grad_output.new_empty(channels, input.shape[1] // groups, *kernel_size)  # only its shape is read
    mask = (False, True, with_bias)
    with _precision(grad_output, allow_tf32):
        _, grad, grad_bias = torch.ops.aten.convolution_backward.default(
            grad_output, input, weight, [channels], stride, padding[:2], dilation, False, (0, 0), groups, mask
        )
    return grad.contiguous(), grad_bias if with_bias else grad.new_empty(0)


def conv2d_bwd_activation(grad_output, saved, activation):
    """No library has this as one pass: the kernel of the tensor's device."""
    return torch.ops.pynn.conv2d_bwd_activation.default(grad_output, saved, activation)


def conv2d_prologue_fwd(input, scale, shift, activation):
    """Like the other passes that no library has: the kernel of the tensor's device."""
    return torch.ops.pynn.conv2d_prologue_fwd.default(input, scale, shift, activation)


def conv2d_prologue_bwd(grad_output, input, scale, shift, activation, with_sums):
    """Likewise."""
    return torch.ops.pynn.conv2d_prologue_bwd.default(grad_output, input, scale, shift, activation, with_sums)


def _pad(image: torch.Tensor, padding, padding_mode: int) -> torch.Tensor:
    top, left, bottom, right = padding
    mode = "constant" if padding_mode == 0 else PADDING_MODES[padding_mode]
    return F.pad(image, (left, right, top, bottom), mode=mode)


def _unpad(grad: torch.Tensor, padding, padding_mode: int) -> torch.Tensor:
    """The gradient of an image from that of the padded image."""
    top, left, bottom, right = padding
    height, width = grad.shape[2] - top - bottom, grad.shape[3] - left - right
    if PADDING_MODES[padding_mode] == "circular":
        return _unroll(_unroll(grad, 2, top, bottom), 3, left, right)
    center = grad[:, :, top : top + height, left : left + width]
    if PADDING_MODES[padding_mode] == "zeros":
        return center
    name = "reflection" if PADDING_MODES[padding_mode] == "reflect" else "replication"
    return getattr(torch.ops.aten, f"{name}_pad2d_backward").default(
        grad.contiguous(), center, (left, right, top, bottom)
    )


def _unroll(grad: torch.Tensor, dim: int, before: int, after: int) -> torch.Tensor:
    size = grad.shape[dim] - before - after
    center = grad.narrow(dim, before, size).clone()
    center.narrow(dim, size - before, before).add_(grad.narrow(dim, 0, before))
    center.narrow(dim, 0, after).add_(grad.narrow(dim, before + size, after))
    return center


_AS_IT_IS = contextlib.nullcontext()
_SETTING = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # of convolutions alone


def _precision(tensor: torch.Tensor, allow_tf32: bool):
    """Where torch would compute float32 convolutions in TF32 though the caller did not ask for it: forbids that."""
    if not tensor.is_cuda or tensor.dtype is not torch.float32:
        return _AS_IT_IS
    wanted = "tf32" if allow_tf32 else "ieee"
    return _AS_IT_IS if _SETTING.fp32_precision == wanted else _convolving_in(wanted)


@contextlib.contextmanager
def _convolving_in(precision: str) -> Iterator[None]:
    """cudnn.flags changes more, and refuses where convolutions and recurrent layers differ."""
    before, _SETTING.fp32_precision = _SETTING.fp32_precision, precision
    try:
        yield
    finally:
        _SETTING.fp32_precision = before
