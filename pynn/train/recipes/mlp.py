"""Recipes of the classifiers of feature vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynn.models.mlp import MLP, KNNClassifier, RBFNet

from .. import data
from ..extras import require
from ..fit import Batch, Settings
from ._recipe import Members, Recipe, accuracy, device_of


class Xor(Recipe):
    """How many of 20 MLPs solve what no perceptron can; each has weights, gradients and Adam state of its own."""

    name = "xor"
    summary = "20 MLPs of four hidden units learn XOR"
    settings = Settings(steps=500, batch_size=4, learning_rate=0.1, schedule="constant")
    metric, gate = "solved", 18
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[0.0], [1.0], [1.0], [0.0]])

    def model(self) -> nn.Module:
        return Members(MLP([2, 4, 1], activation="tanh") for _ in range(20))

    def batch(self, step: int) -> Batch:
        return self.x, self.y

    def loss(self, model, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        logits = model(x)
        return F.binary_cross_entropy_with_logits(logits, y.expand_as(logits))

    @torch.no_grad()
    def evaluate(self, model) -> dict[str, float]:
        x, y = (t.to(device_of(model)) for t in (self.x, self.y))
        return {"solved": float(((model(x) > 0) == y.bool()).flatten(1).all(1).sum())}


class _Vectors(Recipe):
    """Classes of images as vectors of pixels."""

    source: str

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.images = data.load(self.source)
        self.train, self.test = (x.flatten(1) * 0.5 + 0.5 for x in (self.images.train, self.images.test))  # 0 .. 1

    def batch(self, step: int) -> Batch:
        index = self.indices(len(self.train), step)
        return self.train[index], self.images.train_labels[index]

    def loss(self, model, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(model(x), y)

    def evaluate(self, model) -> dict[str, float]:
        return {"accuracy": accuracy(model, self.test, labels=self.images.test_labels)}


class Mlp(_Vectors):
    name = "mlp"
    summary = "MLP 784-128-10 on MNIST"
    source = "mnist"
    settings = Settings(steps=630, batch_size=64, learning_rate=2e-3)
    metric, gate = "accuracy", 0.91

    def model(self) -> nn.Module:
        return MLP([784, 128, 10])


class Rbf(_Vectors):
    name = "rbf"
    summary = "RBFNet of 100 k-means centres on scikit-learn's digits"
    source = "digits"
    settings = Settings(steps=660, batch_size=64, learning_rate=1e-2)
    metric, gate = "accuracy", 0.88

    def model(self) -> nn.Module:
        means = require("sklearn.cluster").KMeans(100, n_init=1, random_state=self.seed).fit(self.train.numpy())
        return RBFNet(64, 100, 10, centers=torch.from_numpy(means.cluster_centers_))


class _Neighbours(nn.Module):
    """KNNClassifier as a module that gives shares of classes; it has nothing to train."""

    def __init__(self, train: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)  # tells the device
        self.classifier = KNNClassifier(3).fit(train, labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier.predict_proba(x.cpu()).to(self.anchor.device)


class Knn(_Vectors):
    name = "knn"
    summary = "three nearest neighbours on MNIST, no training"
    source = "mnist"
    settings = Settings(steps=0, batch_size=1)
    metric, gate = "accuracy", 0.91

    def model(self) -> nn.Module:
        return _Neighbours(self.train, self.images.train_labels)


RECIPES: tuple[type[Recipe], ...] = (Xor, Mlp, Rbf, Knn)
