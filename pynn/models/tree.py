"""Models on trees: RecursiveNet, and TreeClassifier on it or on TreeLSTM.

Trees are given by `parents` (N), the parent of each of the N nodes of all trees and -1 for roots. Gradients through
them are backpropagation through structure (Goller and Kuechler 1996).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..nn.tree import TreeLSTM
from ..ops.tree_lstm import Forest
from .rnn import check_ids, check_sizes


class RecursiveNet(nn.Module):
    """h_n = tanh(W x_n + sum_k U_k h_(child k of n) + b), with weights of its own for the first child, the second, ...

    Socher et al., "Parsing natural scenes and natural language with recursive neural networks" (ICML 2011). All nodes
    of one height are computed at once.

    Args:
        input_size: I, width of a node's input. hidden_size: H, width of its state.
        children: largest number of children of a node.
    Raises:
        ValueError: sizes below 1, input of another shape, or a node with more children.
    """

    def __init__(self, input_size: int, hidden_size: int, children: int = 2) -> None:
        super().__init__()
        check_sizes("RecursiveNet", input_size=input_size, hidden_size=hidden_size, children=children)
        self.children_limit = children
        self.input = nn.Linear(input_size, hidden_size)
        bound = 1 / math.sqrt(children * hidden_size)
        self.weight = nn.Parameter(torch.empty(children * hidden_size, hidden_size).uniform_(-bound, bound))

    def forward(self, input: Tensor, parents: Tensor) -> Tensor:
        """States of all nodes.

        Args:
            input: (N, I). parents: (N) integers; the children of a node are ordered by their numbers.
        Returns:
            (N, H).
        """
        if input.dim() != 2 or input.shape[1] != self.input.in_features or len(input) != len(parents):
            expected = (len(parents), self.input.in_features)
            raise ValueError(f"RecursiveNet: expected input of shape {expected}, got {tuple(input.shape)}")
        forest = Forest.from_parents(parents, input.device)
        x = self.input(input)[forest.order]  # (N, H), level by level from the leaves
        slots = self._slots(forest, parents.to(input.device))  # (N, children)
        h = x.new_zeros(1, x.shape[1])  # what a missing child counts for
        for first, last in zip(forest.levels[:-1], forest.levels[1:], strict=True):
            below = h[slots[first:last]].flatten(1)  # (nodes of the level, children * H)
            h = torch.cat((h, torch.tanh(x[first:last] + below @ self.weight)))
        return h[1:][forest.place]

    def _slots(self, forest: Forest, parents: Tensor) -> Tensor:
        """1 + the place of each child in the order of the levels, 0 where there is none."""
        slots = parents.new_zeros((len(parents), self.children_limit), dtype=torch.int64)
        nodes = torch.argsort(parents, stable=True)
        nodes = nodes[parents[nodes] >= 0]  # children, by parent and then by their own number
        counts = torch.bincount(parents[nodes], minlength=len(parents))
        if len(nodes) and int(counts.max()) > self.children_limit:
            raise ValueError(
                f"RecursiveNet: expected at most {self.children_limit} children of a node, got {int(counts.max())}"
            )
        starts = counts.cumsum(0) - counts
        rank = torch.arange(len(nodes), device=parents.device) - starts[parents[nodes]]
        slots[forest.place[parents[nodes]], rank] = forest.place[nodes] + 1
        return slots


class TreeClassifier(nn.Module):
    """A class for every node of trees of tokens, from the subtree below it (Tai et al. 2015, arXiv 1503.00075).

    Args:
        vocab: number of tokens. hidden: H. classes: C.
        cell: "lstm", the child-sum tree LSTM, to which the order of children is nothing, or "recursive".
        embedding: width of a token's vector. children: largest number of children, of "recursive" only.
    Raises:
        ValueError: an unknown cell, or sizes below 1.
    """

    def __init__(
        self, vocab: int, hidden: int, classes: int, cell: str = "lstm", embedding: int = 64, children: int = 2
    ) -> None:
        super().__init__()
        check_sizes("TreeClassifier", vocab=vocab, hidden=hidden, classes=classes, embedding=embedding)
        if cell not in ("lstm", "recursive"):
            raise ValueError(f"TreeClassifier: expected cell to be 'lstm' or 'recursive', got {cell!r}")
        self.embedding = nn.Embedding(vocab, embedding)
        self.tree = TreeLSTM(embedding, hidden) if cell == "lstm" else RecursiveNet(embedding, hidden, children)
        self.head = nn.Linear(hidden, classes)

    def forward(self, ids: Tensor, parents: Tensor) -> Tensor:
        """Logits (N, C) of nodes with tokens ids (N) and parents (N)."""
        check_ids("TreeClassifier", "ids", ids, rank=1)
        h = self.tree(self.embedding(ids), parents)
        return self.head(h[0] if isinstance(h, tuple) else h)
