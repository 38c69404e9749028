"""Activations in the epilogue of a convolution, and their derivatives."""

from __future__ import annotations

import torch

from .. import backends
from ._conv2d_vmap import batch_first
from ._function import call, eager

ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh")  # csrc/include/conv2d.h
FROM_INPUT = ("silu", "gelu", "gelu_tanh")  # derivative from the input of the activation


def check_activation(op: str, activation: str | None, argument: str = "activation") -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected {argument} to be one of {ACTIVATIONS}, got {activation!r}")


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
        grad = batch_first(grad, in_dims[0], info.batch_size)
        saved = batch_first(saved, in_dims[1], info.batch_size)
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
