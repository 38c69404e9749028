"""Derivatives of conv2d; see conv2d.py for the formula."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends
from . import _conv2d_schemas  # noqa: F401  defines the ops
from ._conv2d_layout import is_channels_last
from ._function import call, eager, loop_vmap

ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh")  # csrc/include/conv2d.h
FROM_INPUT = ("silu", "gelu", "gelu_tanh")  # derivative from the input of the activation


@eager
class Conv2d(torch.autograd.Function):
    """(y, the value before the activation if save_pre else an empty tensor)."""

    @staticmethod
    def forward(input, weight, bias, residual, geometry, activation, save_pre):
        number = ACTIVATIONS.index(activation)
        return backends.call("conv2d_fwd", input, weight, bias, residual, *geometry, number, save_pre)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, residual, ctx.geometry, ctx.activation, ctx.save_pre = inputs
        saved = None if ctx.activation is None else output[1] if ctx.save_pre else output[0]
        ctx.save_for_backward(input, weight, saved)
        ctx.has_bias, ctx.residual_shape = bias is not None, None if residual is None else residual.shape
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output, grad_pre):
        input, weight, saved = ctx.saved_tensors
        grad: Any = grad_output
        if grad_output is not None and ctx.activation is not None:
            grad = call(ActivationGradient, grad_output, saved, ctx.activation)
        if grad_pre is not None and ctx.save_pre:
            grad = grad_pre if grad is None else grad + grad_pre
        if grad is None:
            return (None,) * 7
        mask = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2])
        gradients = call(ConvGradients, grad, input, weight, ctx.geometry, mask) if any(mask) else (None,) * 3
        grad_input, grad_weight, grad_bias = (g if m else None for g, m in zip(gradients, mask, strict=True))
        grad_residual = grad.sum_to_size(ctx.residual_shape) if ctx.needs_input_grad[3] else None
        return grad_input, grad_weight, grad_bias, grad_residual, None, None, None

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, residual, *rest):
        if in_dims[1] is not None or in_dims[2] is not None:
            return loop_vmap(Conv2d, info, in_dims, input, weight, bias, residual, *rest)
        size = info.batch_size
        folded = _batch_first(input, in_dims[0], size)  # (B, N, C, H, W)
        count = folded.shape[1]
        if residual is not None:
            residual = _batch_first(residual, in_dims[3], size)
            residual = residual.reshape(size, *(1,) * (5 - residual.dim()), *residual.shape[1:])
            residual = residual.expand(size, count, *residual.shape[2:]).flatten(0, 1)
        y, pre = call(Conv2d, folded.flatten(0, 1), weight, bias, residual, *rest)
        y = y.unflatten(0, (size, count))
        return (y, pre.unflatten(0, (size, count)) if rest[-1] else pre), (0, 0 if rest[-1] else None)


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
        parts = []
        if ctx.needs_input_grad[0]:
            if into_input is not None:
                parts.append(call(Conv2d, into_input, weight, None, None, ctx.geometry, None, False)[0])
            if into_weight is not None:
                parts.append(call(Conv2d, input, into_weight, None, None, ctx.geometry, None, False)[0])
            if into_bias is not None:
                parts.append(into_bias.view(1, -1, 1, 1).expand(grad.shape))
        to_grad = sum(parts[1:], parts[0]) if parts else None
        to_input = to_weight = None
        if into_weight is not None and ctx.needs_input_grad[1]:
            to_input = call(ConvGradients, grad, input, into_weight, ctx.geometry, (True, False, False))[0]
        if into_input is not None and ctx.needs_input_grad[2]:
            to_weight = call(ConvGradients, grad, into_input, weight, ctx.geometry, (False, True, False))[1]
        return to_grad, to_input, to_weight, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(ConvGradients, info, in_dims, *inputs)


@eager
class ActivationGradient(torch.autograd.Function):
    """grad * activation'(saved), in saved's layout."""

    @staticmethod
    def forward(grad, saved, activation):
        return backends.op("conv2d_bwd_activation", grad)(grad, saved, ACTIVATIONS.index(activation))

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, saved, ctx.activation = inputs
        ctx.save_for_backward(grad, saved)

    @staticmethod
    def backward(ctx, grad_grad):
        grad, saved = ctx.saved_tensors
        to_grad = call(ActivationGradient, grad_grad, saved, ctx.activation) if ctx.needs_input_grad[0] else None
        return to_grad, grad_grad * grad * _second_factor(saved, ctx.activation), None

    @staticmethod
    def vmap(info, in_dims, grad, saved, activation):
        grad = _batch_first(grad, in_dims[0], info.batch_size)
        saved = _batch_first(saved, in_dims[1], info.batch_size)
        result = call(ActivationGradient, grad.flatten(0, 1), saved.flatten(0, 1), activation)
        return result.unflatten(0, grad.shape[:2]), 0


def _second_factor(s: torch.Tensor, activation: str) -> torch.Tensor:
    """How the factor of ActivationGradient changes with what was saved."""
    if activation == "sigmoid":
        return 1 - 2 * s
    if activation == "tanh":
        return -2 * s
    if activation == "silu":
        p = s.sigmoid()
        return p * (1 - p) * (2 + s * (1 - 2 * p))
    if activation == "gelu":
        return (2 - s * s) * torch.exp(-0.5 * s * s) * (2 * torch.pi) ** -0.5
    if activation == "gelu_tanh":
        k, a = (2 / torch.pi) ** 0.5, 0.044715
        t, first, second = torch.tanh(k * (s + a * s**3)), k * (1 + 3 * a * s * s), 6 * a * k * s
        return (1 - t * t) * (first + 0.5 * s * (second - 2 * t * first * first))
    return torch.zeros_like(s)


def _batch_first(x: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
