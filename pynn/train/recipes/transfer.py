"""Recipes of what is built on trained models: transfer and ensembles."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynn.models.cnn import LeNet
from pynn.models.ensemble import Ensemble
from pynn.models.mlp import MLP

from .. import data
from ..fit import Batch, Settings, fit
from ._recipe import Members, Recipe, accuracy
from .mlp import Mlp

_PER_CLASS = 5


class FewShotScratch(Recipe):
    """Five MNIST digits of each class to train on, LeNet from nothing."""

    name = "few_shot"
    summary = "LeNet learns MNIST from five images of each class"
    settings = Settings(steps=150, batch_size=50, learning_rate=1e-3)
    metric, gate = "accuracy", 0.63

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        images = data.load("mnist")
        order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))
        index = torch.cat(
            [order[images.train_labels[order] == label][:_PER_CLASS] for label in range(data.NUM_CLASSES)]
        )
        self.x, self.y = images.train[index], images.train_labels[index]
        self.images = images

    def model(self) -> nn.Module:
        return LeNet()

    def batch(self, step: int) -> Batch:
        index = self.indices(len(self.x), step)
        return self.x[index], self.y[index]

    def loss(self, model, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(model(x), y)

    def evaluate(self, model) -> dict[str, float]:
        return {"accuracy": accuracy(model, self.images.test, labels=self.images.test_labels)}


class FewShotTransfer(FewShotScratch):
    name = "transfer"
    summary = "the same after training on scikit-learn's digits, enlarged to 28 x 28"
    gate = 0.72
    better_than: ClassVar[str | None] = "few_shot"
    first = Settings(steps=440, batch_size=64, learning_rate=2e-3)

    def model(self) -> nn.Module:
        digits = data.load("digits")
        x = F.interpolate(digits.train, size=(20, 20), mode="bilinear")
        x = F.pad(x, (4, 4, 4, 4), value=-1.0)  # MNIST's margin

        def batch(step: int) -> Batch:
            index = next(data.batches(len(x), self.first.batch_size, seed=self.seed, first_step=step))
            return x[index], digits.train_labels[index]

        model = LeNet()
        fit(model, self.loss, batch, self.first, name="digits")
        return model


class MlpEnsemble(Mlp):
    """Five MLPs together against the mean of the five."""

    name = "ensemble"
    summary = "five MLPs on MNIST vote, against the mean of the five"
    settings = Settings(steps=630, batch_size=64, learning_rate=2e-3)
    metric, gate = "gain", 0.0

    def model(self) -> nn.Module:
        return Members(MLP([784, 64, 10]) for _ in range(5))

    def loss(self, model, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """The mean of the members' own losses: none learns from the others."""
        logits = model(x)
        return F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)))

    def evaluate(self, model) -> dict[str, float]:
        labels = self.images.test_labels
        together = accuracy(Ensemble(model), self.test, labels=labels)
        singles = [accuracy(member, self.test, labels=labels) for member in model]
        return {"gain": together - sum(singles) / len(singles), "accuracy": together}


RECIPES: tuple[type[Recipe], ...] = (FewShotScratch, FewShotTransfer, MlpEnsemble)
