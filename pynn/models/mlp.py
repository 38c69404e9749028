"""Perceptron, MLP, RBFNet and KNNClassifier: classifiers of feature vectors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def _check_features(name: str, x: Tensor, features: int) -> None:
    if x.dim() != 2 or x.shape[1] != features:
        raise ValueError(f"{name}: expected x of shape (B, {features}), got {tuple(x.shape)}")


class Perceptron(nn.Module):
    """One layer of threshold units, trained by its own rule instead of by gradients through a loss.

    The perceptron rule changes a unit only where its thresholded output is wrong, w += lr (y - step(w x + b)) x, and
    ends with a separating plane whenever there is one (Rosenblatt 1958). The delta rule is gradient descent on the
    squared error of sigmoid units, w += lr (y - s) s (1 - s) x with s = sigmoid(w x + b) (Widrow and Hoff 1960).
    Neither can learn XOR: one layer draws one plane per unit (Minsky and Papert 1969).

    Args:
        in_features: I. out_features: O, the number of units.
        rule: "perceptron" or "delta".
    Shape:
        x (B, I) to (B, O): 0 or 1 of a threshold unit, in (0, 1) of a sigmoid unit.
    Raises:
        ValueError: an unknown rule, or sizes below 1.
    """

    def __init__(self, in_features: int, out_features: int, rule: str = "perceptron") -> None:
        super().__init__()
        if rule not in ("perceptron", "delta"):
            raise ValueError(f"Perceptron: expected rule to be 'perceptron' or 'delta', got {rule!r}")
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"Perceptron: expected {name} of at least 1, got {size}")
        self.rule = rule
        self.linear = nn.Linear(in_features, out_features)
        self.requires_grad_(False)  # its rule is the only thing that changes it

    def forward(self, x: Tensor) -> Tensor:
        _check_features("Perceptron", x, self.linear.in_features)
        s = self.linear(x)
        return s.sigmoid() if self.rule == "delta" else (s > 0).to(s.dtype)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, learning_rate: float) -> None:
        """One step of the rule on the samples x (B, I) with targets y (B, O), their changes added up."""
        output = self(x)
        if y.shape != output.shape:
            raise ValueError(f"Perceptron: expected y of shape {tuple(output.shape)}, got {tuple(y.shape)}")
        delta = y - output  # (B, O)
        if self.rule == "delta":
            delta = delta * output * (1 - output)
        self.linear.weight.addmm_(delta.T, x, alpha=learning_rate)
        self.linear.bias.add_(delta.sum(0), alpha=learning_rate)

    def fit(self, x: Tensor, y: Tensor, epochs: int = 100, learning_rate: float = 1.0) -> Perceptron:
        """Applies the rule to one sample after the other, in the order given, and returns the module.

        Args:
            x: (N, I). y: (N, O) in {0, 1}.
            epochs: passes over the samples; the perceptron rule ends early when nothing is wrong any more.
            learning_rate: lr of the rule.
        """
        for _ in range(epochs):
            if self.rule == "perceptron" and torch.equal(self(x), y.to(x.dtype)):
                break
            for i in range(len(x)):
                self.update(x[i : i + 1], y[i : i + 1], learning_rate)
        return self


class MLP(nn.Sequential):
    """Fully connected layers with an activation between them (Rumelhart, Hinton and Williams 1986).

    Args:
        dims: sizes of the input, the hidden layers and the output, at least two.
        activation: one of "relu", "tanh", "sigmoid", "gelu", "silu".
    Shape:
        (..., dims[0]) to (..., dims[-1]), the logits.
    Raises:
        ValueError: fewer than two sizes, a size below 1, or an unknown activation.
    """

    def __init__(self, dims: Sequence[int], activation: str = "relu") -> None:
        if len(dims) < 2 or min(dims) < 1:
            raise ValueError(f"MLP: expected dims to be at least two positive sizes, got {list(dims)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"MLP: expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        layers: list[nn.Module] = []
        for size, following in itertools.pairwise(dims):
            layers += [nn.Linear(size, following), ACTIVATIONS[activation]()]
        super().__init__(*layers[:-1])


class RBFNet(nn.Module):
    """Radial basis functions and a linear layer: W phi + b, phi_j = exp(-|x - c_j|^2 / (2 s_j^2)).

    Broomhead and Lowe, "Multivariable functional interpolation and adaptive networks" (1988). Centres and widths are
    learnt with the rest.

    Args:
        in_features: I. num_centers: J. out_features: O.
        centers: (J, I) where to start, best the means of k-means over the training data; drawn from a standard normal
            when None. Every width starts as the mean distance of a centre to its nearest neighbour.
    Shape:
        x (B, I) to (B, O).
    Raises:
        ValueError: sizes below 1, or centers of another shape.
    """

    def __init__(self, in_features: int, num_centers: int, out_features: int, centers: Tensor | None = None) -> None:
        super().__init__()
        if min(in_features, num_centers, out_features) < 1:
            raise ValueError(f"RBFNet: expected sizes of at least 1, got {(in_features, num_centers, out_features)}")
        if centers is None:
            centers = torch.randn(num_centers, in_features)
        if centers.shape != (num_centers, in_features):
            raise ValueError(
                f"RBFNet: expected centers of shape {(num_centers, in_features)}, got {tuple(centers.shape)}"
            )
        self.centers = nn.Parameter(centers.detach().clone().to(torch.get_default_dtype()))
        distances = torch.cdist(self.centers.detach(), self.centers.detach()).fill_diagonal_(torch.inf)
        nearest = distances.min(1).values.mean() if num_centers > 1 else torch.tensor(1.0)
        self.log_width = nn.Parameter(torch.full((num_centers,), nearest.clamp(min=1e-3).log().item()))
        self.linear = nn.Linear(num_centers, out_features)

    def forward(self, x: Tensor) -> Tensor:
        _check_features("RBFNet", x, self.centers.shape[1])
        # |x - c|^2 by one matrix product; rounding can take a distance of 0 below it
        distance = x.square().sum(1, keepdim=True) - 2 * x @ self.centers.T + self.centers.square().sum(1)  # (B, J)
        return self.linear(torch.exp(-0.5 * distance.clamp(min=0) * torch.exp(-2 * self.log_width)))


class KNNClassifier:
    """The most frequent class among the k nearest training samples by Euclidean distance (Cover and Hart 1967).

    Of samples at the same distance the earlier one counts as nearer.

    Args:
        k: number of neighbours. chunk: queries compared at once, to bound the memory.
    Raises:
        ValueError: k below 1 or above the number of samples; a shape that does not fit.
    """

    def __init__(self, k: int = 5, chunk: int = 1024) -> None:
        if k < 1 or chunk < 1:
            raise ValueError(f"KNNClassifier: expected k and chunk of at least 1, got {k} and {chunk}")
        self.k, self.chunk = k, chunk
        self.x = self.y = torch.empty(0)

    def fit(self, x: Tensor, y: Tensor) -> KNNClassifier:
        """Keeps the samples x (N, I) and their classes y (N), int64 from 0."""
        if x.dim() != 2 or y.shape != x.shape[:1] or y.dtype != torch.int64:
            raise ValueError(
                f"KNNClassifier: expected x (N, I) and int64 y (N), got {tuple(x.shape)} and {tuple(y.shape)} {y.dtype}"
            )
        if len(x) < self.k:
            raise ValueError(f"KNNClassifier: expected at least k = {self.k} samples, got {len(x)}")
        self.x, self.y = x, y
        return self

    def predict_proba(self, x: Tensor) -> Tensor:
        """Shares of the classes among the neighbours of x (B, I): (B, classes), in x's dtype."""
        if not len(self.x):
            raise ValueError("KNNClassifier: expected fit() before predict()")
        _check_features("KNNClassifier", x, self.x.shape[1])
        neighbours = [
            torch.cdist(part, self.x, compute_mode="donot_use_mm_for_euclid_dist").argsort(stable=True)[:, : self.k]
            for part in x.split(self.chunk)
        ]
        votes = torch.nn.functional.one_hot(self.y[torch.cat(neighbours)], int(self.y.max()) + 1)  # (B, k, classes)
        return votes.sum(1).to(x.dtype) / self.k

    def predict(self, x: Tensor) -> Tensor:
        """Classes (B) int64 of x (B, I); the smallest of several as frequent."""
        return self.predict_proba(x).argmax(1)
