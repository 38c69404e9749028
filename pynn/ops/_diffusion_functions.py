"""Schemas, shape rules and autograd of the diffusion ops; `diffusion.py` documents them."""

from __future__ import annotations

import torch

from .. import backends
from . import _diffusion_formulas as formulas
from ._function import call, double_backward, eager, loop_vmap
from ._registry import define

_KEY = "Tensor? noise, Tensor? key"
_REVERSE = f"Tensor x, Tensor output, Tensor? variance, Tensor t, Tensor table, float? low, float? high, {_KEY}"
_LOSS = f"Tensor output, Tensor x0, Tensor t, Tensor table, {_KEY}"
_JUMP = f"Tensor x, Tensor t, Tensor? s, Tensor table, {_KEY}"


def _like(x, wanted=True):
    return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)


@define(f"forward_jump_fwd({_JUMP}, bool noise_out) -> (Tensor, Tensor)", triton="diffusion")
def _(x, t, s, table, noise, key, noise_out):
    return _like(x), _like(x, noise_out)


@define("forward_jump_bwd(Tensor dy, Tensor t, Tensor? s, Tensor table, bool of_noise) -> Tensor", triton="diffusion")
def _(dy, t, s, table, of_noise):
    return _like(dy)


@define(f"reverse_step_fwd({_REVERSE}, bool x0_out) -> (Tensor, Tensor)", triton="diffusion")
def _(x, output, variance, t, table, low, high, noise, key, x0_out):
    return _like(x), _like(x, x0_out)


@define(f"reverse_step_bwd(Tensor dy, {_REVERSE}) -> (Tensor, Tensor, Tensor)", triton="diffusion")
def _(dy, x, output, variance, t, table, low, high, noise, key):
    return _like(x), _like(x), _like(x, variance is not None)


@define(f"diffusion_loss_fwd({_LOSS}) -> Tensor", triton="diffusion")
def _(output, x0, t, table, noise, key):
    return output.new_empty(output.shape[:1], dtype=formulas.accumulate_dtype(output))


@define(f"diffusion_loss_bwd(Tensor dloss, {_LOSS}, bool dx0) -> (Tensor, Tensor)", triton="diffusion")
def _(dloss, output, x0, t, table, noise, key, dx0):
    return _like(output), _like(output, dx0)


@eager
class ForwardJump(torch.autograd.Function):
    @staticmethod
    def forward(x, t, s, table, noise, key, noise_out):
        return backends.op("forward_jump_fwd", x)(x, t, s, table, noise, key, noise_out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:4])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, dy, _):
        index = ctx.saved_tensors
        dx = call(ForwardJumpBackward, dy, *index, False) if ctx.needs_input_grad[0] else None
        dnoise = call(ForwardJumpBackward, dy, *index, True) if ctx.needs_input_grad[4] else None
        return dx, None, None, None, dnoise, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(ForwardJump, info, in_dims, *inputs)


@eager
class ForwardJumpBackward(torch.autograd.Function):
    """dy times the scale of x or of the noise. Linear, so it is its own backward."""

    @staticmethod
    def forward(dy, t, s, table, of_noise):
        return backends.op("forward_jump_bwd", dy)(dy, t, s, table, of_noise)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:4])
        ctx.of_noise = inputs[4]

    @staticmethod
    def backward(ctx, ddx):
        return call(ForwardJumpBackward, ddx, *ctx.saved_tensors, ctx.of_noise), None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(ForwardJumpBackward, info, in_dims, *inputs)


@eager
class ReverseStep(torch.autograd.Function):
    @staticmethod
    def forward(x, output, variance, t, table, low, high, noise, key, x0_out):
        args = x, output, variance, t, table, low, high, noise, key, x0_out
        return backends.op("reverse_step_fwd", x)(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, model_output, variance, t, table, ctx.low, ctx.high, noise, key, _ = inputs
        ctx.save_for_backward(x, model_output, variance, t, table, noise, key)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, dy, _):
        x, output, variance, t, table, noise, key = ctx.saved_tensors
        grads = call(ReverseStepBackward, dy, x, output, variance, t, table, ctx.low, ctx.high, noise, key)
        return *grads[:2], grads[2] if variance is not None else None, *[None] * 7

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(ReverseStep, info, in_dims, *inputs)


@eager
class ReverseStepBackward(torch.autograd.Function):
    @staticmethod
    def forward(dy, x, output, variance, t, table, low, high, noise, key):
        args = dy, x, output, variance, t, table, low, high, noise, key
        return backends.op("reverse_step_bwd", x)(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, model_output, variance, t, table, ctx.low, ctx.high, noise, key = inputs
        ctx.save_for_backward(dy, x, model_output, variance, t, table, noise, key)

    @staticmethod
    def backward(ctx, *grad_grads):
        dy, x, output, variance, t, table, noise, key = ctx.saved_tensors
        z = formulas.noise_of(x, noise, key)

        def formula(x, output, variance):
            return formulas.reverse_step(x, output, variance, t, table, ctx.low, ctx.high, z)

        ddy, grads = double_backward(formula, dy, (x, output, variance), grad_grads)
        return ddy, *grads, *[None] * 6

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(ReverseStepBackward, info, in_dims, *inputs)


@eager
class DiffusionLoss(torch.autograd.Function):
    @staticmethod
    def forward(output, x0, t, table, noise, key):
        return backends.op("diffusion_loss_fwd", output)(output, x0, t, table, noise, key)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dloss):
        grads = call(DiffusionLossBackward, dloss, *ctx.saved_tensors, ctx.needs_input_grad[1])
        return grads[0], grads[1] if ctx.needs_input_grad[1] else None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(DiffusionLoss, info, in_dims, *inputs)


@eager
class DiffusionLossBackward(torch.autograd.Function):
    @staticmethod
    def forward(dloss, output, x0, t, table, noise, key, need_x0):
        return backends.op("diffusion_loss_bwd", output)(dloss, output, x0, t, table, noise, key, need_x0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7])
        ctx.need_x0 = inputs[7]

    @staticmethod
    def backward(ctx, ddoutput, ddx0):
        dloss, output, x0, t, table, noise, key = ctx.saved_tensors
        z = formulas.noise_of(output, noise, key)

        def formula(output, x0):
            return formulas.diffusion_loss(output, x0, t, table, z)

        grad_grads = ddoutput, ddx0 if ctx.need_x0 else None
        ddloss, grads = double_backward(formula, dloss, (output, x0), grad_grads)
        return ddloss, *grads, *[None] * 5

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return loop_vmap(DiffusionLossBackward, info, in_dims, *inputs)
