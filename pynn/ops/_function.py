"""Calling a torch.autograd.Function: fast in eager, right under torch.func, torch.compile and torch.export."""

from __future__ import annotations

from typing import Any

import torch


def eager(cls):
    """Adds cls.apply_eager: the same Function in the calling form that skips setup_context's signature inspection."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = cls.forward(*inputs)
            cls.setup_context(ctx, inputs, output)
            return output

        backward = cls.backward

    Eager.__name__ = Eager.__qualname__ = cls.__name__
    cls.apply_eager = plain_apply(Eager)
    return cls


def plain_apply(cls):
    """cls.apply without what it does first in Python, for torch.func and for setup_context: 4 us that are not needed
    where `call` has found neither."""
    return super(torch.autograd.Function, cls).apply


def call(cls, *inputs: Any):
    """Applies a Function decorated with `eager` in the cheapest form that is right here.

    Raises:
        NotImplementedError: for torch.compile around torch.func transforms, where torch drops the backward of an
            autograd.Function without a word (pytorch issue 193279).
    """
    compiling = torch.compiler.is_compiling()
    if torch._C._are_functorch_transforms_active():
        if compiling:
            raise NotImplementedError("pynn: put torch.compile inside torch.func.grad/vmap, not outside")
        return cls.apply(*inputs)
    if compiling:
        return cls.apply(*inputs)  # Dynamo traces the setup_context form
    return cls.apply_eager(*inputs) if torch.is_grad_enabled() and requires_grad(inputs) else cls.forward(*inputs)


def runs_eagerly() -> bool:
    """Whether neither torch.func nor torch.compile takes part."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def records_eagerly(inputs: tuple) -> bool:
    """Whether a call is recorded for a backward pass, and neither torch.func nor torch.compile takes part."""
    return runs_eagerly() and torch.is_grad_enabled() and requires_grad(inputs)


def call_in_backward(cls, *inputs: Any):
    """call() of what a backward pass consists of; a compiled one has no backward of its own."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()):
        return cls.forward(*inputs)
    return call(cls, *inputs)


def recorded(inputs: tuple) -> bool:
    """Whether a call has to go through its Function, which keeps what backward reads, instead of straight to the op."""
    return torch._C._are_functorch_transforms_active() or (
        torch.is_grad_enabled() and requires_grad(inputs) and not torch.compiler.is_exporting()
    )


def requires_grad(inputs: tuple) -> bool:
    """Whether one of the inputs is a tensor that does."""
    for value in inputs:  # noqa: SIM110 (any() of a generator takes longer)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return True
    return False


def autocast(first: torch.Tensor, *others: torch.Tensor | None):
    """The tensors in autocast's dtype when autocast is on for the first one's device, otherwise unchanged."""
    tensors, device = (first, *others), first.device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype is not torch.float64 else t for t in tensors
    )


def compute_dtype(input: torch.Tensor) -> torch.dtype:
    """What a kernel computes in, and keeps its statistics in: float64 for float64, otherwise float32."""
    return torch.float64 if input.dtype is torch.float64 else torch.float32


def check_devices(op: str, *operands: torch.Tensor | None) -> None:
    """For shape rules: an operand on meta beside real ones comes to them instead of the kernel."""
    if len({t.device for t in operands if t is not None}) > 1:
        raise RuntimeError(f"{op}: expected all operands to be on the same device")


def loop_vmap(cls, info, in_dims, *inputs):
    """vmap rule for any Function: one call per slice, results stacked. Right for every op, never the fastest."""
    slices = [
        call(cls, *(_slice(x, dim, i) for x, dim in zip(inputs, in_dims, strict=True))) for i in range(info.batch_size)
    ]
    if isinstance(slices[0], torch.Tensor):
        return torch.stack(slices), 0
    return tuple(torch.stack(parts) for parts in zip(*slices, strict=True)), (0,) * len(slices[0])


def fold_leading(info, in_dims, inputs, *, shared, mask):
    """The inputs with the mapped dimension as one more leading dimension of all, for ops that take any number of them.

    Args:
        shared: place of the input that is not mapped, and has no leading dimensions. The one before has all of them.
        mask: place of an input that has some of them.
    """
    folded = list(inputs)
    rank = inputs[shared - 1].dim() + (in_dims[shared - 1] is None)
    for i, (x, dim) in enumerate(zip(inputs, in_dims, strict=True)):
        if not isinstance(x, torch.Tensor) or i == shared or (i == mask and dim is None):
            continue
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        folded[i] = x.reshape(len(x), *(1,) * (rank - x.dim()), *x.shape[1:]) if i == mask else x
    return folded


def _slice(value, dim, index):
    return value.select(dim, index) if isinstance(value, torch.Tensor) and dim is not None else value


def double_backward(formula, dy, inputs, grad_grads):
    """Gradients of a backward pass by differentiating a composite formula of the op a second time.

    Args:
        formula: the op in torch operations; takes `inputs`, returns the output (or a tuple of outputs).
        dy: gradient of the output (or the tuple of them).
        inputs: tensors, or None for absent optional ones.
        grad_grads: gradient of each input's gradient, None where there is none.
    Returns:
        (gradient of dy, gradients of inputs), None for absent inputs.
    """
    present = [i for i, x in enumerate(inputs) if x is not None]

    def first(dy, *tensors):
        full = list(inputs)
        for i, tensor in zip(present, tensors, strict=True):
            full[i] = tensor
        return torch.func.vjp(lambda *xs: formula(*_replace(full, present, xs)), *tensors)[1](dy)

    tensors = [inputs[i] for i in present]
    grads, second = torch.func.vjp(first, dy, *tensors)  # type: ignore[misc]
    seeds = tuple(
        torch.zeros_like(g) if grad_grads[i] is None else grad_grads[i] for i, g in zip(present, grads, strict=True)
    )
    ddy, *dinputs = second(seeds)
    return ddy, tuple(_replace([None] * len(inputs), present, dinputs))


def _replace(values, positions, new):
    result = list(values)
    for position, value in zip(positions, new, strict=True):
        result[position] = value
    return result
