"""What a recipe is."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from .. import data
from ..extras import require
from ..fit import Batch, Settings


class Recipe:
    """A model, its data, its loss, and the number it has to reach.

    Args:
        seed: of the run, for what a recipe draws beside the weights.

    Attributes:
        name: on the command line. summary: one line. settings: of the run, but for the seed.
        metric: the number judged, a key of what `evaluate` returns. gate: its limit. goal: ">=" or "<=".
        better_than: another recipe that this one's number, of the same seed, has to beat as well.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    settings: ClassVar[Settings]
    metric: ClassVar[str]
    gate: ClassVar[float]
    goal: ClassVar[str] = ">="
    better_than: ClassVar[str | None] = None

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.run = dataclasses.replace(self.settings, seed=seed)

    def model(self) -> torch.nn.Module:
        """A new model, its weights drawn from torch's global generator."""
        raise NotImplementedError

    def batch(self, step: int) -> Batch:
        """The batch of a step: tensors of settings.batch_size samples, which follow from (seed, step)."""
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, *batch: torch.Tensor) -> torch.Tensor:
        """The mean loss over a part of a batch."""
        raise NotImplementedError

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Metrics of a model in evaluation mode on data that it was not trained on."""
        raise NotImplementedError

    def build(self) -> torch.nn.Module:
        """The model of the run's seed."""
        torch.manual_seed(self.seed)
        return self.model()

    @classmethod
    def meets_gate(cls, value: float) -> bool:
        """Whether a value of `metric` is good enough."""
        return value >= cls.gate if cls.goal == ">=" else value <= cls.gate

    def indices(self, count: int, step: int) -> torch.Tensor:
        """The samples of a step out of `count`, by epochs that each are one permutation."""
        return next(data.batches(count, self.settings.batch_size, seed=self.seed, first_step=step))

    def generator(self, step: int) -> torch.Generator:
        """A generator for the batch of a step that is drawn."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)


class Members(torch.nn.ModuleList):
    """Several models of the same input, trained side by side; gives their logits, (members, B, C)."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([model(*inputs) for model in self])


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


@torch.no_grad()
def accuracy(model: torch.nn.Module, *inputs: torch.Tensor, labels: torch.Tensor, batch_size: int = 500) -> float:
    """Share of right classes: logits (B, ..., C) of model(*inputs) against labels (B, ...), -100 left out."""
    device = device_of(model)
    metric: Any = require("torchmetrics").MeanMetric().to(device)
    for *part, target in zip(*(tensor.split(batch_size) for tensor in (*inputs, labels)), strict=True):
        target = target.to(device)
        right = (model(*(x.to(device) for x in part)).argmax(-1) == target).float()
        metric.update(right[target != -100])
    return metric.compute().item()
