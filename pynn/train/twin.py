"""The same model on torch.nn's layers, and the time of a training step of both."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .. import nn
from ..models import _transformer
from ..models._transformer import Attention
from ..models.rnn import Alignment
from .fit import build_optimizer
from .recipes import Recipe

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class _Activated:
    """Before a torch.nn layer: the extras of pynn's, one pass over memory after the other."""

    activation: str | None

    def forward(self, input, residual=None):
        output = super().forward(input)  # type: ignore[misc]
        if residual is not None:
            output = output + residual
        return output if self.activation is None else _ACTIVATIONS[self.activation](output)


class _Conv2d(_Activated, torch.nn.Conv2d):
    pass


class _ConvTranspose2d(_Activated, torch.nn.ConvTranspose2d):
    pass


class _GroupNorm(_Activated, torch.nn.GroupNorm):
    pass


class _Lengths:
    """Before a recurrent layer of torch.nn: `lengths` by way of a PackedSequence."""

    batch_first: bool

    def forward(self, input, hx=None, *, lengths=None):
        if lengths is None:
            return super().forward(input, hx)  # type: ignore[misc]
        packed = pack_padded_sequence(input, lengths.cpu(), self.batch_first, enforce_sorted=False)
        output, state = super().forward(packed, hx)  # type: ignore[misc]
        steps = input.shape[1 if self.batch_first else 0]
        return pad_packed_sequence(output, self.batch_first, total_length=steps)[0], state


class _LSTM(_Lengths, torch.nn.LSTM):
    pass


class _GRU(_Lengths, torch.nn.GRU):
    pass


class _RNN(_Lengths, torch.nn.RNN):
    pass


class _TorchAttention:
    """The op as models call it in training, where queries and keys are the same tokens.

    torch takes either a mask or causality: the two are joined once for all layers of a step.
    """

    def __init__(self):
        self.mask = self.joined = None

    def __call__(self, query, key, value, mask, dropout, *, scale, window, alignment):
        is_causal = window == (-1, 0)
        if is_causal and mask is not None:
            if mask is not self.mask:
                self.mask, self.joined = mask, _causal(mask, query.shape[2], key.shape[2])
            mask, is_causal = self.joined, False
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, scale=scale)


def _causal(mask, queries, keys):
    seen = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)


_torch_attention = _TorchAttention()


class _Attention(Attention):
    """The layer as it is, but for the op it takes from its module."""

    def forward(self, *arguments, **options):
        with mock.patch.object(_transformer, "scaled_dot_product_attention", _torch_attention):
            return super().forward(*arguments, **options)


class _Alignment(Alignment):
    """Additive attention too by way of its scores."""

    def forward(self, query, key, mask=None):
        return self.mean(self.scores(query, key), key, mask)


_TWINS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    nn.Conv2d: _Conv2d,
    nn.ConvTranspose2d: _ConvTranspose2d,
    nn.GroupNorm: _GroupNorm,
    nn.MultiheadAttention: torch.nn.MultiheadAttention,
    nn.LSTM: _LSTM,
    nn.GRU: _GRU,
    nn.RNN: _RNN,
    Attention: _Attention,
    Alignment: _Alignment,
}


def torch_twin(model: torch.nn.Module) -> torch.nn.Module | None:
    """A copy of a model on torch.nn's layers; None when no layer of it is pynn's, or one has no counterpart there."""
    twin = copy.deepcopy(model)
    changed = 0
    for module in twin.modules():
        kind = type(module)
        if kind is nn.TreeLSTM:
            return None
        if kind in _TWINS:
            module.__class__ = _TWINS[kind]
            changed += 1
    return twin if changed else None


@dataclasses.dataclass(frozen=True)
class StepRatio:
    """Medians in seconds of whole training steps: CPU time of one thread, wall time of several and on a GPU."""

    pynn: float
    torch: float

    @property
    def ratio(self) -> float:
        """pynn / torch; below 1 pynn is faster."""
        return self.pynn / self.torch


def compare_step(recipe: Recipe, *, rounds: int = 20, device: str = "cpu") -> StepRatio | None:
    """Times training steps of a recipe's model and of its torch twin, in turn, from the same weights and batches.

    Args:
        recipe: the recipe. rounds: timed steps of each, after three to warm up. device: where to run.
    Returns:
        The medians, None when the model has no twin.
    """
    model = recipe.build().to(device)
    twin = torch_twin(model)
    if twin is None or not recipe.settings.steps:
        return None
    opponents: list[tuple[torch.nn.Module, Any, list[float]]] = [
        (net.train(), build_optimizer(net.parameters(), recipe.run), []) for net in (model, twin)
    ]
    for number in range(rounds + 3):
        batch = [tensor.to(device) for tensor in recipe.batch(number)]
        for net, optimizer, times in opponents:
            seconds = _step_time(net, optimizer, recipe, batch)
            if number >= 3:
                times.append(seconds)
        opponents.reverse()
    medians = {net is model: statistics.median(times) for net, _, times in opponents}
    return StepRatio(pynn=medians[True], torch=medians[False])


def _step_time(model: torch.nn.Module, optimizer: Any, recipe: Recipe, batch: list[torch.Tensor]) -> float:
    start = _now(batch[0])
    loss = recipe.loss(model, *batch)
    loss.backward()
    if recipe.settings.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.settings.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return _now(batch[0]) - start


def _now(x: torch.Tensor) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
        return time.perf_counter()
    # Of one thread the time it computes, which other work on the machine changes least.
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
