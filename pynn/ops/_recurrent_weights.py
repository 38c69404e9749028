"""Weights of cells in a graph: the weight gradients of all its steps as one product.

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
from . import _recurrent_schemas  # noqa: F401 (defines the ops)
from ._function import plain_apply

ROWS = 256  # that wait at most before their products are made
current_task = torch._C._current_graph_task_id
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
        if self.count >= ROWS:
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
        waiting = ctx.waiting.pop(current_task(), None)
        if waiting is None:
            return None, *grads
        sums = list(waiting.finish())
        if waiting.cell != 1:  # one gradient, of the sum of the biases
            sums[3] = sums[2]
        needed = ctx.needs_input_grad[1:]
        # Steps that did not wait, as those of a graph of which a graph is made, have gradients of their own.
        total = (s if g is None else s + g for s, g in zip(sums, grads, strict=True))
        return None, *(t if n else None for t, n in zip(total, needed, strict=True))


class Weights:
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
            task = current_task()
            waiting = self.waiting.get(task)
            if waiting is None:
                waiting = self.waiting[task] = _Waiting(self.cell, self.mask)
            waiting.add((gradients, input, state))


_share = plain_apply(_Source)
_of_graphs: dict[int, weakref.ref] = {}  # id of a weight_hh -> its Weights, as long as a graph has them


def weights_of(cell: int, given: tuple[Tensor | None, ...]) -> Weights:
    """What the steps of living graphs with these weights share, or new ones where there is none."""
    key = id(given[1])
    reference = _of_graphs.get(key)
    weights = None if reference is None else reference()
    if weights is None or not weights.serve(cell, given):
        weights = Weights(cell, given)

        def forget(reference):
            if _of_graphs.get(key) is reference:
                del _of_graphs[key]

        _of_graphs[key] = weakref.ref(weights, forget)
    return weights
