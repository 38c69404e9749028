"""Memory layouts and paddings of images."""

from __future__ import annotations

import torch

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")  # csrc/include/conv2d.h


def is_channels_last(x: torch.Tensor) -> bool:
    """Torch's rule: a size of 1 does not decide, and NCHW wins a tie."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    if last != x.is_contiguous():
        return last
    least = 0
    if x.stride(1) == 0:
        return False
    for d in (1, 3, 2, 0):
        if x.shape[d] == 0 or x.stride(d) < least or (d == 0 and least == x.stride(1)):
            return False
        least = x.stride(d) * x.shape[d]
    return True


def allows_tf32() -> bool:
    """Whether float32 products may be computed in TF32: by torch.set_float32_matmul_precision, or by what is newer,
    torch.backends.cuda.matmul.fp32_precision, after which the older getter raises."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# torch.compiler.assume_constant_result without its import of Dynamo, which takes longer than that of torch. Dynamo
# compiles anew where the setting is another.
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
