"""Calls of rotary_embedding whose kernels are compiled; see cases.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .labels import LABELS
from .ratchet import Case, Promise


def rotary_embedding() -> Iterator[Case]:
    from pynn.triton_kernels.rotary_embedding import rotary_embedding_fwd, rotary_embedding_in_place

    for dtype, label in LABELS.items():
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        x = torch.empty(2, 64, 24, 64, dtype=dtype).transpose(1, 2)[:, :16]  # query and key in a projection
        narrow, table = torch.empty(2, 4, 64, 37, dtype=dtype), torch.empty(64, 32, dtype=compute)
        few = torch.empty(64, 13, dtype=compute)
        for name, interleaved in (("halves", False), ("interleaved", True)):
            yield Case(
                f"{label} {name}, in place",
                lambda a=(x, table, table, interleaved, True): rotary_embedding_in_place(*a),
                Promise(),
            )
            yield Case(
                f"{label} {name}, some channels",
                lambda a=(narrow, few, few, interleaved, False): rotary_embedding_fwd(*a),
                Promise(),
            )
