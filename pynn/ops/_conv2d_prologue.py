"""The prologue of conv2d, x' = activation(x * scale + shift) per channel, and the convolution that applies it.

The backward computes x' again instead of keeping it: gradients of x' and of the weight are those of the convolution
without prologue, and one more pass gives those of x, scale and shift:

    u = x * scale + shift,  dx = dx' f'(u) scale,  dscale = sum of dx' f'(u) x,  dshift = sum of dx' f'(u)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import backends
from ._conv2d_activation import ACTIVATIONS
from ._conv2d_functions import Conv2d, ConvGradients, gradient_of_residual, gradient_of_sum, save_forward
from ._conv2d_vmap import batch_first
from ._function import call, call_in_backward, compute_dtype, double_backward, eager

_FUNCTIONS = {
    None: lambda u: u,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "silu": lambda u: u * u.sigmoid(),
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _composite(activation):
    """The prologue in differentiable torch operations."""

    def formula(input, scale, shift):
        u = input.to(compute_dtype(input))
        if scale is not None:
            u = u * scale[..., None, None]
        if shift is not None:
            u = u + shift[..., None, None]
        return _FUNCTIONS[activation](u).to(input.dtype)

    return formula


def _fold(values: torch.Tensor | None, dim: int | None, size: int, samples: int) -> torch.Tensor | None:
    """A scale or shift for B samples of N images: (C) as it is, otherwise (B * N, C)."""
    if values is None or (dim is None and values.dim() == 1):
        return values
    values = batch_first(values, dim, size)
    values = values if values.dim() == 3 else values.unsqueeze(1)
    return values.expand(size, samples, -1).flatten(0, 1)


@eager
class PrologueGradient(torch.autograd.Function):
    """Gradients of input, scale and shift of Prologue; its own gradient comes from torch operations."""

    @staticmethod
    def forward(grad, input, scale, shift, activation, mask):
        sums = mask[1] or mask[2]
        op = backends.op("conv2d_prologue_bwd", input)
        grad_input, both = op(grad, input, scale, shift, ACTIVATIONS.index(activation), sums)
        grads = [
            (both[i] if given.dim() == 2 else both[i].sum(0)).to(given.dtype) if wanted else both.new_empty(0)
            for i, (given, wanted) in enumerate(zip((scale, shift), mask[1:], strict=True))
        ]
        return grad_input, *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, input, scale, shift, ctx.activation, ctx.mask = inputs
        ctx.save_for_backward(grad, input, scale, shift)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grad_grads):
        grad, *inputs = ctx.saved_tensors
        seeds = [g if wanted else None for g, wanted in zip(grad_grads, ctx.mask, strict=True)]
        to_grad, to_inputs = double_backward(_composite(ctx.activation), grad, inputs, seeds)
        return to_grad, *to_inputs, None, None

    @staticmethod
    def vmap(info, in_dims, grad, input, scale, shift, activation, mask):
        size = info.batch_size
        grad, input = batch_first(grad, in_dims[0], size), batch_first(input, in_dims[1], size)
        samples = input.shape[1]
        # a gradient for every image: those of a sample are added below
        given = [
            None if t is None else _fold(batch_first(t, d, size), 0, size, samples)
            for t, d in zip((scale, shift), in_dims[2:4], strict=True)
        ]
        results = call(PrologueGradient, grad.flatten(0, 1), input.flatten(0, 1), *given, activation, mask)
        outputs, dims = (
            [results[0].unflatten(0, (size, samples))],
            [0 if wanted else None for wanted in (True, *mask[1:])],
        )
        for result, t, d, wanted in zip(results[1:], (scale, shift), in_dims[2:4], mask[1:], strict=True):
            if wanted:
                result = result.unflatten(0, (size, samples))
                if t.dim() - (d is not None) == 1:
                    result = result.sum(1)
            outputs.append(result)
        return tuple(outputs), tuple(dims)


def gradients_of_prologue(grad, input, scale, shift, activation, needed):
    """(input's, scale's, shift's), None where it is not needed."""
    if not any(needed):
        return None, None, None
    mask = needed[0], *(n and t is not None for n, t in zip(needed[1:], (scale, shift), strict=True))
    inputs = grad, input, scale, shift, activation, mask
    grads = call_in_backward(PrologueGradient, *inputs)
    return tuple(g if wanted else None for g, wanted in zip(grads, mask, strict=True))


@eager
class Prologue(torch.autograd.Function):
    """x'."""

    @staticmethod
    def forward(input, scale, shift, activation):
        return backends.op("conv2d_prologue_fwd", input)(input, scale, shift, ACTIVATIONS.index(activation))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, scale, shift, ctx.activation = inputs
        ctx.save_for_backward(input, scale, shift)

    @staticmethod
    def backward(ctx, grad):
        input, scale, shift = ctx.saved_tensors
        return *gradients_of_prologue(grad, input, scale, shift, ctx.activation, ctx.needs_input_grad[:3]), None

    @staticmethod
    def vmap(info, in_dims, input, scale, shift, activation):
        size = info.batch_size
        images = batch_first(input, in_dims[0], size)
        given = [_fold(t, d, size, images.shape[1]) for t, d in zip((scale, shift), in_dims[1:3], strict=True)]
        return call(Prologue, images.flatten(0, 1), *given, activation).unflatten(0, images.shape[:2]), 0


@eager
class PrologueConv2d(torch.autograd.Function):
    """Conv2d of Prologue."""

    @staticmethod
    def forward(input, weight, bias, residual, geometry, activation, save_pre, scale, shift, input_activation):
        return backends.call(
            "prologue_conv2d_fwd", input, scale, shift, ACTIVATIONS.index(input_activation),
            weight, bias, residual, *geometry, ACTIVATIONS.index(activation), save_pre,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, scale, shift, ctx.input_activation = inputs
        save_forward(ctx, inputs[:7], output, scale, shift)

    @staticmethod
    def backward(ctx, grad_output, grad_pre):
        input, weight, saved, scale, shift = ctx.saved_tensors
        grad = gradient_of_sum(ctx, grad_output, grad_pre, saved)
        if grad is None:
            return (None,) * 10
        needed = ctx.needs_input_grad
        into_prologue = needed[0], needed[7], needed[8]
        mask = (any(into_prologue), needed[1], ctx.has_bias and needed[2])
        gradients = (None,) * 3
        if any(mask):
            image = call(Prologue, input, scale, shift, ctx.input_activation) if mask[1] else input
            gradients = call(ConvGradients, grad, image, weight, ctx.geometry, mask)
        grad_image, grad_weight, grad_bias = (g if m else None for g, m in zip(gradients, mask, strict=True))
        grad_input, grad_scale, grad_shift = gradients_of_prologue(
            grad_image, input, scale, shift, ctx.input_activation, into_prologue
        )
        grad_residual = gradient_of_residual(ctx, grad)
        return grad_input, grad_weight, grad_bias, grad_residual, None, None, None, grad_scale, grad_shift, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        prologue, dims = (inputs[0], *inputs[7:]), (in_dims[0], *in_dims[7:])
        if dims == (None,) * 4:
            image, dim = call(Prologue, *prologue), None
        else:
            image, dim = Prologue.vmap(info, dims, *prologue)
        return Conv2d.vmap(info, (dim, *in_dims[1:7]), image, *inputs[1:7])
