"""Calls of additive_attention whose kernels are compiled; see cases.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .labels import LABELS
from .ratchet import Case, Promise


def additive_attention() -> Iterator[Case]:
    from pynn.triton_kernels.additive_attention import additive_attention_bwd, additive_attention_fwd

    def calls(label, dtype, dim, mask, weights) -> Iterator[Case]:
        query, key, value = (torch.zeros(2, length, dim, dtype=dtype) for length in (16, 24, 24))
        operands = (query, key, value, torch.zeros(dim, dtype=dtype), mask)
        lse = torch.zeros(2, 16, dtype=torch.float32 if dtype.itemsize == 2 else torch.float64)
        grad = torch.zeros(2, 16, 24, dtype=dtype) if weights else None
        yield Case(label, lambda: additive_attention_fwd(*operands, weights), Promise())
        yield Case(f"{label} backward", lambda: additive_attention_bwd(query, grad, *operands, lse, weights), Promise())

    for dtype, label in LABELS.items():
        yield from calls(label, dtype, 128, None, False)
    yield from calls("fp32 bool mask", torch.float32, 128, torch.ones(24, dtype=torch.bool), False)
    yield from calls("fp32 wide rows, mask, weights", torch.float32, 1024, torch.zeros(16, 24), True)
    yield from calls("bf16 odd rows, mask", torch.bfloat16, 37, torch.zeros(16, 24), True)
