"""Derivatives of conv2d; see conv2d.py for the formula."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import backends
from . import _conv2d_schemas, _conv2d_vmap  # noqa: F401  the first defines the ops
from ._conv2d_activation import ACTIVATIONS, FROM_INPUT, ActivationGradient
from ._conv2d_layout import is_channels_last
from ._conv2d_vmap import batch_first, merge_channels, split_channels
from ._function import call, eager, requires_grad


class Geometry(NamedTuple):
    """The arguments that all ops of the family share, in their order. padding is (top, left, bottom, right)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: int
    allow_tf32: bool


@eager
class Conv2d(torch.autograd.Function):
    """(y, the value before the activation if save_pre else an empty tensor)."""

    @staticmethod
    def forward(input, weight, bias, residual, geometry, activation, save_pre):
        number = ACTIVATIONS.index(activation)
        return backends.call("conv2d_fwd", input, weight, bias, residual, *geometry, number, save_pre)

    @staticmethod
    def setup_context(ctx, inputs, output):
        save_forward(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad_output, grad_pre):
        input, weight, saved = ctx.saved_tensors
        grad = gradient_of_sum(ctx, grad_output, grad_pre, saved)
        if grad is None:
            return (None,) * 7
        mask = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2])
        gradients = call(ConvGradients, grad, input, weight, ctx.geometry, mask) if any(mask) else (None,) * 3
        grad_input, grad_weight, grad_bias = (g if m else None for g, m in zip(gradients, mask, strict=True))
        return grad_input, grad_weight, grad_bias, gradient_of_residual(ctx, grad), None, None, None

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, residual, geometry, activation, save_pre):
        def apply(*operands):
            *tensors, groups = operands
            return call(Conv2d, *tensors, geometry._replace(groups=groups), activation, save_pre)

        tensors = input, weight, bias, residual
        return _conv2d_vmap.forward(apply, info.batch_size, in_dims[:4], tensors, geometry.groups)


def save_forward(ctx, inputs, output, *others) -> None:
    """What the backward of a fused convolution needs, and other tensors."""
    input, weight, bias, residual, ctx.geometry, ctx.activation, ctx.save_pre = inputs
    saved = None if ctx.activation is None else output[1] if ctx.save_pre else output[0]
    ctx.save_for_backward(input, weight, saved, *others)
    ctx.has_bias, ctx.residual_shape = bias is not None, None if residual is None else residual.shape
    ctx.set_materialize_grads(False)


def gradient_of_sum(ctx, grad_output, grad_pre, saved):
    """The gradient of conv + bias + residual, or None."""
    grad: Any = grad_output
    if grad_output is not None and ctx.activation is not None:
        grad = call(ActivationGradient, grad_output, saved, ctx.activation)
    if grad_pre is not None and ctx.save_pre:
        grad = grad_pre if grad is None else grad + grad_pre
    return grad


def gradient_of_residual(ctx, grad):
    return grad.sum_to_size(ctx.residual_shape) if ctx.needs_input_grad[3] else None


@eager
class ConvGradients(torch.autograd.Function):
    """Gradients of input, weight and bias; an empty tensor where the mask is False."""

    @staticmethod
    def forward(grad, input, weight, geometry, mask):
        if mask[0]:
            last = is_channels_last(input)
            grad_input = backends.call("conv2d_bwd_input", grad, weight, input.shape, *geometry, last)
        else:
            grad_input = grad.new_empty(0)
        if mask[1]:
            return grad_input, *backends.call("conv2d_bwd_weight", grad, input, weight.shape[2:], *geometry, mask[2])
        return grad_input, grad.new_empty(0), grad.sum((0, 2, 3)) if mask[2] else grad.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, input, weight, ctx.geometry, ctx.mask = inputs
        ctx.save_for_backward(grad, input, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_input, grad_weight, grad_bias):
        grad, input, weight = ctx.saved_tensors
        into_input, into_weight, into_bias = (
            g if m else None for g, m in zip((grad_input, grad_weight, grad_bias), ctx.mask, strict=True)
        )
        to_grad = to_input = to_weight = None
        if ctx.needs_input_grad[0]:  # one convolution is the other's residual
            if into_bias is not None:
                to_grad = into_bias.view(1, -1, 1, 1).expand(grad.shape)
            for x, w in ((into_input, weight), (input, into_weight)):
                if x is not None and w is not None:
                    to_grad = call(Conv2d, x, w, None, to_grad, ctx.geometry, None, False)[0]
        if into_weight is not None and ctx.needs_input_grad[1]:
            to_input = call(ConvGradients, grad, input, into_weight, ctx.geometry, (True, False, False))[0]
        if into_input is not None and ctx.needs_input_grad[2]:
            to_weight = call(ConvGradients, grad, into_input, weight, ctx.geometry, (False, True, False))[1]
        return to_grad, to_input, to_weight, None, None

    @staticmethod
    def vmap(info, in_dims, grad, input, weight, geometry, mask):
        size, (grad_dim, input_dim, weight_dim) = info.batch_size, in_dims[:3]
        if mask[0] and any(mask[1:]) and weight_dim is None:  # each in its own best form
            rest, dims = ConvGradients.vmap(info, in_dims, grad, input, weight, geometry, (False, *mask[1:]))
            first, _ = ConvGradients.vmap(info, in_dims, grad, input, weight, geometry, (True, False, False))
            return (first[0], *rest[1:]), (0, *dims[1:])
        grad = batch_first(grad, grad_dim, size)  # (B, N, O, OH, OW)
        dims = tuple(0 if wanted else None for wanted in mask)
        if weight_dim is None and not any(mask[1:]):
            if input_dim is None:  # only its shape is of interest
                images = input.new_empty(()).expand(size * input.shape[0], *input.shape[1:])
            else:
                images = input.movedim(input_dim, 0).flatten(0, 1)
            result = call(ConvGradients, grad.flatten(0, 1), images, weight, geometry, mask)
            return (result[0].unflatten(0, (size, -1)), *result[1:]), dims
        input, weight = batch_first(input, input_dim, size), batch_first(weight, weight_dim, size)
        geometry = geometry._replace(groups=geometry.groups * size)
        operands = merge_channels(grad), merge_channels(input), weight.flatten(0, 1)
        to_input, to_weight, to_bias = call(ConvGradients, *operands, geometry, mask)
        if mask[0]:
            to_input = split_channels(to_input, size)
        to_weight, to_bias = (
            t.unflatten(0, (size, -1)) if wanted else t
            for t, wanted in zip((to_weight, to_bias), mask[1:], strict=True)
        )
        return (to_input, to_weight, to_bias), dims


def convolve(function, input, weight, bias, residual, geometry, activation, *others) -> torch.Tensor:
    """Applies a fused convolution to a batch or to one image; `others` are what the function takes beside."""
    tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    wants_grad = tracing or (torch.is_grad_enabled() and requires_grad((input, weight, bias, residual, *others)))
    save_pre = activation in FROM_INPUT and wants_grad
    batched = input.dim() != 3
    images = input if batched else input.unsqueeze(0)
    y = call(function, images, weight, bias, residual, geometry, activation, save_pre, *others)[0]
    return y if batched else y.squeeze(0)
