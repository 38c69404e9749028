"""Training of plain convolutions: where torch's convolution with torch's own autograd is the fastest, it runs."""

from __future__ import annotations

import torch

from .. import backends
from . import _conv2d_cases
from ._conv2d_layout import is_channels_last


def fastest_in_torch(input, weight, bias, geometry) -> bool:
    """Whether forward and backward together were measured to be faster in torch than with our Functions around them,
    whatever backend each pass would take: for calls on CPU tensors that record gradients of input and weight.
    """
    if torch.compiler.is_compiling() or not (input.is_cpu and input.requires_grad and weight.requires_grad):
        return False
    if torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled():
        return False
    if input.dim() != 4 or weight.dim() != 4:
        return False
    return backends.fastest_in_torch("conv2d", input, _conv2d_cases.conv2d_fwd(input, weight, bias, None, *geometry))


def conv2d(input, weight, bias, geometry) -> torch.Tensor:
    """torch's, with our layout of the result. Its derivatives of every order are torch's too."""
    last = is_channels_last(input) or is_channels_last(weight)
    y = torch.conv2d(input, weight, bias, geometry.stride, geometry.padding[:2], geometry.dilation, geometry.groups)
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
