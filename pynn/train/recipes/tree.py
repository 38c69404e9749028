"""Recipes of the models on trees."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pynn.models.tree import TreeClassifier

from ..extras import require
from ..fit import Batch, Settings
from ._recipe import Recipe, device_of

_NOT, _BINARY = 2, {3: int.__and__, 4: int.__or__, 5: int.__xor__}  # tokens; 0 and 1 are themselves
_VOCAB = 6

Tree = tuple[list[int], list[int], list[int]]  # token, parent and value of each node, the root last


def draw_tree(depth: int, draw: random.Random) -> Tree:
    """A boolean expression whose deepest leaf lies `depth` below the root."""
    tokens: list[int] = []
    parents: list[int] = []
    values: list[int] = []

    def add(token: int, value: int, children: tuple[int, ...] = ()) -> int:
        for child in children:
            parents[child] = len(tokens)
        tokens.append(token)
        values.append(value)
        parents.append(-1)
        return len(tokens) - 1

    def grow(depth: int) -> int:
        if depth == 0:
            value = draw.randrange(2)
            return add(value, value)
        if draw.random() < 0.15:
            child = grow(depth - 1)
            return add(_NOT, 1 - values[child], (child,))
        children = [grow(depth - 1), grow(draw.randrange(depth))]
        draw.shuffle(children)
        token, operation = draw.choice(list(_BINARY.items()))
        return add(token, operation(values[children[0]], values[children[1]]), tuple(children))

    grow(depth)
    return tokens, parents, values


def collate(trees: list[Tree]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Many trees as one forest: tokens, parents and values (N), and the roots' numbers."""
    tokens: list[int] = []
    parents: list[int] = []
    values: list[int] = []
    roots = []
    for own, own_parents, own_values in trees:
        first = len(tokens)
        tokens += own
        parents += [-1 if parent < 0 else parent + first for parent in own_parents]
        values += own_values
        roots.append(len(tokens) - 1)
    return torch.tensor(tokens), torch.tensor(parents), torch.tensor(values), torch.tensor(roots)


class BooleanTree(Recipe):
    """Boolean expressions of depth 1 to 5, judged on the roots of new ones of depth 8."""

    name = "tree"
    summary = "tree LSTM evaluates boolean expressions deeper than any it was trained on"
    settings = Settings(steps=400, batch_size=32, learning_rate=1e-2, clip_norm=1.0)
    metric, gate = "depth_8", 0.99
    cell = "lstm"

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        draw = random.Random(seed)
        self.train = [draw_tree(draw.randint(1, 5), draw) for _ in range(4000)]
        self.test = {depth: [draw_tree(depth, draw) for _ in range(300)] for depth in (5, 8)}

    def model(self) -> nn.Module:
        return TreeClassifier(_VOCAB, 64, 2, self.cell, embedding=16)

    def batch(self, step: int) -> Batch:
        return (self.indices(len(self.train), step),)

    def loss(self, model, index: Tensor) -> Tensor:  # type: ignore[override]
        """The mean over the trees of the mean over their nodes."""
        trees = [self.train[i] for i in index.tolist()]
        tokens, parents, values, _ = (t.to(index.device) for t in collate(trees))
        nodes = torch.tensor([len(tree[0]) for tree in trees], device=index.device)
        weights = (1 / (len(trees) * nodes)).repeat_interleave(nodes)
        return weights @ F.cross_entropy(model(tokens, parents), values, reduction="none")

    @torch.no_grad()
    def evaluate(self, model) -> dict[str, float]:
        result = {}
        for depth, trees in self.test.items():
            tokens, parents, values, roots = (t.to(device_of(model)) for t in collate(trees))
            metric = require("torchmetrics").MeanMetric().to(tokens.device)
            metric.update((model(tokens, parents).argmax(1) == values)[roots].float())
            result[f"depth_{depth}"] = metric.compute().item()
        return result


class RecursiveTree(BooleanTree):
    name = "tree_recursive"
    summary = "the same with a plain recursive net"
    cell = "recursive"
    gate = 0.99


RECIPES: tuple[type[Recipe], ...] = (BooleanTree, RecursiveTree)
