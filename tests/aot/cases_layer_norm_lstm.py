"""Calls of layer_norm_lstm whose kernels are compiled; see cases.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .labels import LABELS
from .ratchet import Case, Promise


def layer_norm_lstm() -> Iterator[Case]:
    from pynn.triton_kernels.layer_norm_lstm import layer_norm_lstm_bwd, layer_norm_lstm_fwd

    steps, batch, hidden = 3, 8, 256
    key = torch.zeros(2, dtype=torch.int64)
    for dtype, label in LABELS.items():
        for name, coupled, rate in (("norm", False, 0.0), ("all", True, 0.25)):
            width = (3 if coupled else 4) * hidden

            def some(*shape, dtype=dtype):
                return torch.zeros(shape, dtype=dtype)

            wide = torch.float64 if dtype is torch.float64 else torch.float32
            h, c, gain = some(batch, hidden), some(batch, hidden, dtype=wide), some(width)
            operands = (
                some(steps, batch, 16), h, c, some(width, 16), some(width, hidden), gain, gain, gain, some(hidden),
                some(hidden), some(width - hidden) if coupled else None, None, key,
            )  # fmt: skip
            options = (coupled, 1e-5, rate, rate, rate, True, False)
            output, products = some(steps, batch, hidden), some(steps, batch, width)
            cells, statistics = some(steps, batch, hidden, dtype=wide), some(steps, batch, 6, dtype=wide)
            saved = (output, products, products, cells, statistics)
            yield Case(f"{label} {name}", lambda o=(*operands, *options): layer_norm_lstm_fwd(*o, True), Promise())
            yield Case(
                f"{label} {name} backward",
                lambda o=(output, h, c, *operands, *saved, *options): layer_norm_lstm_bwd(*o, [True] * 11),
                Promise(),
            )
