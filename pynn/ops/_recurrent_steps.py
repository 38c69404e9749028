"""Steps of cells that are recorded for a backward pass: the weight gradients of all steps of a graph as one product.

A cell in a loop takes its weights at every step. If each step returned a gradient of the weights, autograd would add as
many matrices as there are steps, which takes longer than the products. So the steps have their weights from one node of
the graph. The backward pass of a step leaves the gradients of its pre-activations with that node; autograd calls it
after the last step, and it makes the products with the rows of all of them.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from .. import backends
from ._function import eager, plain_apply, requires_grad
from ._recurrent_call import apply_gru, apply_lstm, apply_rnn
from ._recurrent_functions import GRU, LSTM, RNN

_ROWS = 256  # that wait at most before their products are made
# Weights that are worth it: they have more elements than this, and so many times as many as the rows of a step.
_SIZE, _TIMES = 1 << 18, 8
_current_task = torch._C._current_graph_task_id
_will_run = torch._C._will_engine_execute_node


class _Waiting:
    """Rows of steps whose products are still to be made, and the sums of those that are made, of one backward pass."""

    def __init__(self, cell: int, mask: list[bool]) -> None:
        self.cell, self.mask = cell, mask
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []  # gradients of pre-activations, input, state
        self.count = 0
        self.sums: tuple[Tensor, ...] | None = None

    def add(self, rows: tuple[Tensor, Tensor, Tensor]) -> None:
        self.rows.append(rows)
        self.count += len(rows[0])
        if self.count >= _ROWS:
            self.finish()

    def finish(self) -> tuple[Tensor, ...]:
        """The gradients of weight_ih, weight_hh, bias_ih and bias_hh of all rows so far."""
        if self.rows:
            rows = self.rows[0] if len(self.rows) == 1 else map(torch.cat, zip(*self.rows, strict=True))
            new = backends.op("recurrent_weights_bwd", self.rows[0][0])(*rows, self.cell, self.mask)
            if self.sums is not None:
                for total, part in zip(self.sums, new, strict=True):
                    total.add_(part)
            else:
                self.sums = new
            self.rows, self.count = [], 0
        assert self.sums is not None
        return self.sums


class _Source(torch.autograd.Function):
    """The node that a graph's steps have their weights from; None for those without a gradient."""

    @staticmethod
    def forward(ctx, waiting: dict[int, _Waiting], *weights: Tensor | None):
        ctx.waiting = waiting  # graph task -> what waits in it
        ctx.set_materialize_grads(False)
        return tuple(None if w is None else w.detach() for w in weights)

    @staticmethod
    def backward(ctx, *grads):
        waiting = ctx.waiting.pop(_current_task(), None)
        if waiting is None:
            return None, *grads
        sums = list(waiting.finish())
        if waiting.cell != 1:  # one gradient, of the sum of the biases
            sums[3] = sums[2]
        needed = ctx.needs_input_grad[1:]
        # Steps that did not wait, as those of a graph of which a graph is made, have gradients of their own.
        total = (s if g is None else s + g for s, g in zip(sums, grads, strict=True))
        return None, *(t if n else None for t, n in zip(total, needed, strict=True))


class _Weights:
    """The weights of the steps of a graph: held by each of them, so that they live as long as the graph."""

    __slots__ = ("__weakref__", "cell", "given", "mask", "node", "taken", "waiting", "wanted")

    def __init__(self, cell: int, given: tuple[Tensor | None, ...]) -> None:
        self.cell, self.given = cell, given
        self.waiting: dict[int, _Waiting] = {}
        self.wanted = wanted = [w is not None and w.requires_grad for w in given]
        self.mask = [wanted[0], wanted[1], wanted[2] or wanted[3]]
        shared = _share(self.waiting, *(w if n else None for w, n in zip(given, wanted, strict=True)))
        self.taken = tuple(w if s is None else s for w, s in zip(given, shared, strict=True))
        self.node = next(s.grad_fn for s in shared if s is not None)

    def serve(self, cell: int, given: tuple[Tensor | None, ...]) -> bool:
        """Whether these are still the same: neither replaced nor frozen since, nor in other memory."""
        for now, before, taken, wanted in zip(given, self.given, self.taken, self.wanted, strict=True):
            if now is not before:
                return False
            if now is not None and taken is not None and not (now.requires_grad is wanted and taken.is_set_to(now)):
                return False
        return cell == self.cell

    def leave(self, gradients: Tensor, input: Tensor, state: Tensor) -> None:
        """A step's rows for the products, if this backward pass comes to the weights at all."""
        if _will_run(self.node):
            task = _current_task()
            waiting = self.waiting.get(task)
            if waiting is None:
                waiting = self.waiting[task] = _Waiting(self.cell, self.mask)
            waiting.add((gradients, input, state))


_share = plain_apply(_Source)
_of_graphs: dict[int, weakref.ref] = {}  # id of a weight_hh -> its _Weights, as long as a graph has them


def _weights(cell: int, given: tuple[Tensor | None, ...]) -> _Weights:
    key = id(given[1])
    reference = _of_graphs.get(key)
    weights = None if reference is None else reference()
    if weights is None or not weights.serve(cell, given):
        weights = _Weights(cell, given)

        def forget(reference):
            if _of_graphs.get(key) is reference:
                del _of_graphs[key]

        _of_graphs[key] = weakref.ref(weights, forget)
    return weights


def _step(function, states: int):
    """The Function of one step: a sequence's, with the step's _Weights as one more input."""
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
            if torch.is_grad_enabled() or not _may_wait(input) or _current_task() < 0:
                return *function.backward(ctx, *grads), None
            wants = [needed[0], any(needed[1:count])]
            first = [*grads] if states == 2 else [*grads, None]
            operands = [*saved[:count]] if states == 2 else [*saved[:count], None]
            kept = (
                [*saved[-3:]] if states == 2 else [*saved[-2:], None] if weights.cell == 1 else [saved[-1], None, None]
            )
            op = backends.op("recurrent_step_bwd", input)
            results = op(*first, *operands, *saved[count : count + 2], *kept, weights.cell, wants)
            weights.leave(results[3], input[0], operands[1].view(-1, operands[1].shape[-1]))
            given = (r if n else None for r, n in zip(results[:count], needed, strict=False))
            return *given, *(None,) * (len(needed) - count)

    return eager(Step).apply_eager


_apply_lstm, _apply_gru, _apply_rnn = _step(LSTM, 2), _step(GRU, 1), _step(RNN, 1)


def _may_wait(input: Tensor) -> bool:
    """Whether the CPU kernels run, in eager, for types in which gradients of pre-activations are not rounded."""
    return (
        (input.dtype is torch.float32 or input.dtype is torch.float64)
        and backends.chooses_cpu(input)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"))
    )


def _waits(input: Tensor, weights: tuple[Tensor | None, ...]) -> bool:
    """Whether a step may leave its weight gradients to be made with those of other steps, and gains by it."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not requires_grad(weights):
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
    shared = _weights(0, weights)
    return _apply_lstm(input, h, c, *shared.taken, None, None, False, True, shared)[1:3]


def gru_step(input: Tensor, h: Tensor, weights: tuple[Tensor | None, ...]) -> Tensor:
    """h after one step of gru; as in lstm_step."""
    if not _waits(input, weights):
        return apply_gru(input, h, weights, None, False)[1]
    shared = _weights(1, weights)
    return _apply_gru(input, h, *shared.taken, None, False, True, shared)[1]


def rnn_step(input: Tensor, h: Tensor, weights: tuple[Tensor | None, ...], relu: bool) -> Tensor:
    """h after one step of rnn; as in lstm_step."""
    if not _waits(input, weights):
        return apply_rnn(input, h, weights, None, relu, False)[1]
    shared = _weights(3 if relu else 2, weights)
    return _apply_rnn(input, h, *shared.taken, None, relu, False, shared)[1]
