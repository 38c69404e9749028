"""Single steps of cells, recorded so that their weight gradients are made together, see _recurrent_weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ._function import eager, records_eagerly, runs_eagerly
from ._recurrent_call import apply_gru, apply_lstm, apply_rnn
from ._recurrent_functions import GRU, LSTM, RNN
from ._recurrent_weights import current_task, weights_of

# Weights that are worth it: they have more elements than this, and so many times as many as the rows of a step.
_SIZE, _TIMES = 1 << 18, 5


def _step(function, states: int):
    """The Function of one step: a sequence's, with the step's Weights as one more input."""
    count = 1 + states  # of input and states

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(*inputs):
            return function.forward(*inputs[:-1])

        @staticmethod
        def setup_context(ctx, inputs, output):
            function.setup_context(ctx, inputs[:-1], output)
            ctx.weights = inputs[-1]

        @staticmethod
        def backward(ctx, *grads):
            grads, needed = grads[:count], ctx.needs_input_grad
            if all(g is None for g in grads):
                return (None,) * len(needed)
            saved = ctx.saved_tensors
            input, weights = saved[0], ctx.weights
            if torch.is_grad_enabled() or not (runs_eagerly() and _may_wait(input)) or current_task() < 0:
                return *function.backward(ctx, *grads), None
            wants = [needed[0], any(needed[1:count])]
            first = [*grads] if states == 2 else [*grads, None]
            operands = [*saved[:count]] if states == 2 else [*saved[:count], None]
            kept = (
                [*saved[-3:]] if states == 2 else [*saved[-2:], None] if weights.cell == 1 else [saved[-1], None, None]
            )
            op = backends.op("recurrent_step_bwd", input)
            results = op(*first, *operands, *saved[count : count + 2], *kept, weights.cell, wants)
            h = saved[1].detach()  # what waits holds no graph: of a backward pass that fails it would hold its own
            weights.leave(results[3], input.detach()[0], h if h.dim() == 2 else h[0])
            given = (r if n else None for r, n in zip(results[:count], needed, strict=False))
            return *given, *(None,) * (len(needed) - count)

    return eager(Step).apply_eager


_apply_lstm, _apply_gru, _apply_rnn = _step(LSTM, 2), _step(GRU, 1), _step(RNN, 1)


def _may_wait(input: Tensor) -> bool:
    """Whether the CPU kernels run, for types in which gradients of pre-activations are not rounded."""
    return (
        (input.dtype is torch.float32 or input.dtype is torch.float64)
        and backends.chooses_cpu(input)
        and not torch.is_autocast_enabled("cpu")
    )


def _waits(input: Tensor, weights: tuple[Tensor | None, ...]) -> bool:
    """Whether a step may leave its weight gradients to be made with those of other steps, and gains by it."""
    if not records_eagerly(weights):
        return False
    of_input, of_state = weights[:2]
    if of_input is None or of_state is None:
        return False
    size, row = of_input.numel() + of_state.numel(), input.shape[2] + sum(of_state.shape)
    if size < _SIZE or size < _TIMES * input.shape[1] * row:
        return False
    for weight in weights:  # what is no leaf may get another history while it stays the same tensor
        if weight is not None and not (weight.is_leaf and backends.chooses_cpu(weight)):
            return False
    return _may_wait(input)


def lstm_step(input: Tensor, h: Tensor, c: Tensor, weights: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """(h, c) after one step of lstm; input is (1, B, I), weights (ih, hh, bias_ih, bias_hh)."""
    if not _waits(input, weights):
        return apply_lstm(input, h, c, (*weights, None), None, False)[1:3]
    shared = weights_of(0, weights)
    return _apply_lstm(input, h, c, *shared.taken, None, None, False, True, shared)[1:3]


def gru_step(input: Tensor, h: Tensor, weights: tuple[Tensor | None, ...]) -> Tensor:
    """h after one step of gru; as in lstm_step."""
    if not _waits(input, weights):
        return apply_gru(input, h, weights, None, False)[1]
    shared = weights_of(1, weights)
    return _apply_gru(input, h, *shared.taken, None, False, True, shared)[1]


def rnn_step(input: Tensor, h: Tensor, weights: tuple[Tensor | None, ...], relu: bool) -> Tensor:
    """h after one step of rnn; as in lstm_step."""
    if not _waits(input, weights):
        return apply_rnn(input, h, weights, None, relu, False)[1]
    shared = weights_of(3 if relu else 2, weights)
    return _apply_rnn(input, h, *shared.taken, None, relu, False, shared)[1]
