"""How a dimension of torch.vmap disappears into the operands of a convolution: no loop, no copy of shared operands.

Where the weight is shared, samples are more images. Where it is not, samples are more groups; and where only the input
is shared, samples are more output channels of each group.
"""

from __future__ import annotations

import torch


def batch_first(x: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def merge_channels(x: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """(B, N, groups * C, H, W) -> (N, groups * B * C, H, W)."""
    return x.unflatten(2, (groups, -1)).permute(1, 2, 0, 3, 4, 5).flatten(1, 3)


def split_channels(y: torch.Tensor, size: int, groups: int = 1) -> torch.Tensor:
    """(N, groups * B * C, H, W) -> (B, N, groups * C, H, W)."""
    return y.unflatten(1, (groups, size, -1)).permute(2, 0, 1, 3, 4, 5).flatten(2, 3)


def merge_weights(weight: torch.Tensor, groups: int, transposed: bool) -> torch.Tensor:
    """(B, groups * O, C, KH, KW) -> (groups * B * O, C, KH, KW); transposed (B, C, O, KH, KW) -> (C, B * O, KH, KW)."""
    if transposed:
        return weight.movedim(0, 1).flatten(1, 2)
    return weight.unflatten(1, (groups, -1)).movedim(0, 1).flatten(0, 2)


def forward(apply, size: int, in_dims, tensors, groups: int, transposed: bool = False):
    """The vmap rule of a fused convolution.

    Args:
        apply: (input, weight, bias, residual, groups) -> (y, pre), with pre of y's shape or empty.
        in_dims, tensors: of input, weight, bias, residual. groups: of one sample.
    """
    (input, weight, bias, residual), (input_dim, weight_dim, bias_dim, residual_dim) = tensors, in_dims
    if input_dim is not None:
        input = input.movedim(input_dim, 0)  # (B, N, C, H, W)
    count = input.shape[-4]  # images of a sample
    if residual is not None:
        residual = batch_first(residual, residual_dim, size)
        residual = residual.reshape(size, *(1,) * (5 - residual.dim()), *residual.shape[1:])
    if weight_dim is None and bias_dim is None:
        input = batch_first(input, None if input_dim is None else 0, size).flatten(0, 1)
        if residual is not None:
            residual = residual.expand(size, count, *residual.shape[2:]).flatten(0, 1)
        results = apply(input, weight, bias, residual, groups)
        split = lambda y: y.unflatten(0, (size, count))  # noqa: E731
    else:
        weight = batch_first(weight, weight_dim, size)
        outputs = weight.shape[2] * groups if transposed else weight.shape[1]
        shared = groups if input_dim is None else 1
        if input_dim is None:
            weight = merge_weights(weight, groups, transposed)
        else:
            input, weight, groups = merge_channels(input), weight.flatten(0, 1), groups * size
        if bias is not None:
            bias = merge_channels(batch_first(bias, bias_dim, size)[:, None, :, None, None], shared).flatten()
        if residual is not None:
            residual = merge_channels(residual.expand(-1, -1, outputs, -1, -1), shared)
        results = apply(input, weight, bias, residual, groups)
        split = lambda y: split_channels(y, size, shared)  # noqa: E731
    y, pre = results
    return (split(y), split(pre) if pre.dim() == 4 else pre), (0, 0 if pre.dim() == 4 else None)
