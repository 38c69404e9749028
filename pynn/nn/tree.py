"""Recurrent layers over trees."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.tree_lstm import Forest, tree_lstm


class TreeLSTM(torch.nn.Module):
    """Child-sum tree LSTM, computed by pynn.ops.tree_lstm.

    Parameters are named and initialised as torch.nn.LSTMCell's, `weight_ih` (4H, I) and `weight_hh` (4H, H) with rows
    i f g o, with one `bias` (4H): a chain of nodes is an LSTM.

    Args:
        input_size: I, width of a node's input. hidden_size: H, width of its state.
        bias: whether there is one. device, dtype: of the parameters.
    Shape:
        input (N, I) for the N nodes of all trees, and parents (N), the parent of each node and -1 for roots, or a
        `pynn.ops.tree_lstm.Forest` made of it once; to h (N, H) and c (N, H).
    Raises:
        ValueError: input_size or hidden_size is not positive, or parents are not those of trees.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if size <= 0:
                raise ValueError(f"TreeLSTM: expected {name} greater than 0, got {size}")
        self.input_size, self.hidden_size = input_size, hidden_size
        options = {"device": device, "dtype": dtype}
        self.weight_ih = torch.nn.Parameter(torch.empty((4 * hidden_size, input_size), **options))
        self.weight_hh = torch.nn.Parameter(torch.empty((4 * hidden_size, hidden_size), **options))
        self.bias = torch.nn.Parameter(torch.empty(4 * hidden_size, **options)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor, parents: Tensor | Forest) -> tuple[Tensor, Tensor]:
        """(h, c) of every node.

        Args:
            input: (N, input_size). parents: (N) integers, or a Forest, which is worth keeping for trees seen again.
        """
        forest = parents if isinstance(parents, Forest) else Forest.from_parents(parents, input.device)
        return tree_lstm(input, forest, self.weight_ih, self.weight_hh, self.bias)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias is not None else ", bias=False")
