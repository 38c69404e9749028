"""Calls of tree_lstm whose kernels are compiled; see cases.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .labels import LABELS
from .ratchet import Case, Promise


def tree_lstm() -> Iterator[Case]:
    from pynn.triton_kernels.tree_lstm import tree_lstm_bwd, tree_lstm_fwd

    nodes, hidden, levels = 12, 64, [0, 8, 12]
    offsets, children = torch.zeros(nodes + 1, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    for dtype, label in LABELS.items():
        x, weight = torch.zeros(nodes, 8, dtype=dtype), torch.zeros(4 * hidden, 8, dtype=dtype)
        hh, bias = torch.zeros(4 * hidden, hidden, dtype=dtype), torch.zeros(4 * hidden, dtype=dtype)
        h = torch.zeros(nodes, hidden, dtype=dtype)
        c = h.double() if dtype is torch.float64 else h.float()
        gates = torch.zeros(nodes, 4 * hidden, dtype=dtype)
        operands = (x, weight, hh, bias, offsets, children, levels)
        yield Case(label, lambda o=operands: tree_lstm_fwd(*o), Promise())
        yield Case(
            f"{label} backward",
            lambda o=operands, h=h, c=c, gates=gates: tree_lstm_bwd(h, c, *o, h, c, gates, h, [True] * 4),
            Promise(),
        )
