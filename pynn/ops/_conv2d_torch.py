"""Plain convolutions where torch's own function was measured to be the fastest: it runs as it is, nothing around it."""

from __future__ import annotations

import torch

from .. import backends
from . import _conv2d_cases
from ._conv2d_layout import is_channels_last
from ._function import requires_grad


def is_fastest(input, weight, bias, geometry) -> bool:
    """Whether to run torch's function and, where gradients are recorded, torch's autograd.

    For training that is what the table says of forward and backward together, whatever backend each pass would take
    with our Functions around them; only such calls were measured as record gradients of input and weight. On a GPU the
    library's float32 would be TF32 as torch's switches say at the time of each pass, not as ours did.
    """
    if torch.compiler.is_compiling() or not input.is_cpu or torch._C._are_functorch_transforms_active():
        return False
    if input.dim() != 4 or weight.dim() != 4:
        return False
    if not (torch.is_grad_enabled() and requires_grad((input, weight, bias))):
        op = "conv2d_fwd"
    elif input.requires_grad and weight.requires_grad:
        op = "conv2d"
    else:
        return False
    return backends.fastest_in_torch(op, input, _conv2d_cases.conv2d_fwd(input, weight, bias, None, *geometry))


def conv2d(input, weight, bias, geometry) -> torch.Tensor:
    """torch's, with our layout of the result. Its derivatives of every order are torch's too."""
    last = is_channels_last(input) or is_channels_last(weight)
    y = torch.conv2d(input, weight, bias, geometry.stride, geometry.padding[:2], geometry.dilation, geometry.groups)
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
