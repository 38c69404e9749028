"""The calls of recurrent layers whose Triton kernels are compiled: every kernel and tile, for each cell and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .labels import LABELS
from .ratchet import Case, Promise

_PLAIN = Promise(exact=True)
_WAITING = Promise(exact=True, contains=("acquire", "release"))
_NVIDIA = ("sm_80", "sm_90", "sm_100", "sm_120")  # the targets with teams, see recurrent_configs.py
_STEPS = 3


class _Layer:
    """A layer whose input is given as weight_ih x; `projection` is the width of an LSTM's projected state, or 0."""

    def __init__(self, cell, dtype, batch, hidden, *, projection=0, reverse=False, lengths=False):
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        gates, state = {"lstm": 4, "gru": 3, "rnn": 1}[cell], projection or hidden
        self.cell, self.reverse = cell, reverse
        self.input = torch.empty(_STEPS, batch, gates * hidden, dtype=dtype)
        self.weight = torch.empty(gates * hidden, state, dtype=dtype)
        self.weight_hr = torch.empty(projection, hidden, dtype=dtype) if projection else None
        self.bias = torch.empty(gates * hidden, dtype=dtype)
        self.h, self.c = torch.empty(batch, state, dtype=dtype), torch.empty(batch, hidden, dtype=compute)
        self.output = torch.empty(_STEPS, batch, state, dtype=dtype)
        self.gates = torch.empty(_STEPS, batch, 4 * hidden, dtype=dtype)
        self.cells = torch.empty(_STEPS, batch, hidden, dtype=compute)
        self.lengths = torch.zeros(batch, dtype=torch.int64) if lengths else None

    def forward(self, save: bool = True) -> Callable:
        from pynn.triton_kernels import recurrent

        weights = None, self.weight, self.bias, self.bias
        if self.cell == "lstm":
            operands = self.input, self.h, self.c, *weights, self.weight_hr, self.lengths, self.reverse, save
            return lambda: recurrent.lstm_fwd(*operands)
        if self.cell == "gru":
            return lambda: recurrent.gru_fwd(self.input, self.h, *weights, self.lengths, self.reverse, save)
        return lambda: recurrent.rnn_fwd(self.input, self.h, *weights, self.lengths, False, self.reverse)

    def backward(self) -> Callable:
        from pynn.triton_kernels import recurrent

        weights, mask = (None, self.weight, self.bias, self.bias), [False] * 6
        if self.cell == "lstm":
            operands = (self.input, self.h, self.c, *weights, self.weight_hr, self.lengths, self.output, self.gates)
            return lambda: recurrent.lstm_bwd(
                self.output, self.h, self.c, *operands, self.cells, self.reverse, mask
            )  # fmt: skip
        operands = (self.output, self.h, self.input, self.h, *weights, self.lengths, self.output)
        if self.cell == "gru":
            return lambda: recurrent.gru_bwd(*operands, self.gates, self.reverse, mask[:4])
        return lambda: recurrent.rnn_bwd(*operands, False, self.reverse, mask[:4])


def _without_teams(run: Callable) -> Callable:
    def without() -> None:
        from pynn.triton_kernels import recurrent_configs

        with recurrent_configs.without_teams():
            run()

    return without


def recurrent() -> Iterator[Case]:
    def both(label: str, *layer, **options) -> Iterator[Case]:
        yield Case(label, _without_teams(_Layer(*layer, **options).forward()), _PLAIN)
        yield Case(f"{label}, backward", _without_teams(_Layer(*layer, **options).backward()), _PLAIN)

    def teams(label: str, *layer, **options) -> Iterator[Case]:
        yield Case(f"{label}, team", _Layer(*layer, **options).forward(), _WAITING, _NVIDIA)
        yield Case(f"{label}, team, backward", _Layer(*layer, **options).backward(), _WAITING, _NVIDIA)

    few, many = 16, 1024  # rows
    for cell in ("lstm", "gru", "rnn"):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{LABELS[dtype]} {cell}"
            for hidden in (64, 128):
                yield from both(f"{name} {hidden}", cell, dtype, few, hidden)
            yield from both(f"{name} 1024, few rows", cell, dtype, few, 1024)
            if cell != "rnn":
                yield from both(f"{name} 1024, many rows", cell, dtype, many, 1024)
    for hidden in (64, 1024):
        yield from both(f"fp64 lstm {hidden}", "lstm", torch.float64, few, hidden)
    yield from both("fp64 gru 64", "gru", torch.float64, few, 64)
    yield from both("bf16 rnn 256", "rnn", torch.bfloat16, few, 256)
    yield from both("fp16 lstm 64", "lstm", torch.float16, few, 64)
    for dtype in (torch.bfloat16, torch.float32):
        name = f"{LABELS[dtype]} lstm"
        yield from both(f"{name} 1024 to 512", "lstm", dtype, few, 1024, projection=512)
        yield from both(f"{name} 64, reverse, lengths", "lstm", dtype, few, 64, reverse=True, lengths=True)
        yield from both(f"{name} 61", "lstm", dtype, few, 61)
        yield from both(f"{name} 1021", "lstm", dtype, few, 1021)
    yield from both("bf16 gru 1024, reverse, lengths", "gru", torch.bfloat16, few, 1024, reverse=True, lengths=True)
    for dtype, hidden in ((torch.bfloat16, 256), (torch.bfloat16, 512), (torch.bfloat16, 1024), (torch.float32, 512)):
        for cell in ("lstm", "gru", "rnn"):
            if (cell, hidden) != ("rnn", 256):
                yield from teams(f"{LABELS[dtype]} {cell} {hidden}", cell, dtype, few, hidden)
    yield from teams("fp64 lstm 512", "lstm", torch.float64, few, 512)
    yield from teams("fp16 lstm 768", "lstm", torch.float16, few, 768)
    yield from teams("bf16 lstm 2048", "lstm", torch.bfloat16, few, 2048)
    yield from teams("bf16 gru 512, reverse, lengths", "gru", torch.bfloat16, few, 512, reverse=True, lengths=True)
    yield from teams("bf16 lstm 509", "lstm", torch.bfloat16, few, 509)
    yield from teams("fp32 lstm 512, many rows", "lstm", torch.float32, 64, 512)
    yield from teams("bf16 lstm 1024, many rows", "lstm", torch.bfloat16, 256, 1024)
    yield Case("bf16 lstm 64, not saved", _Layer("lstm", torch.bfloat16, few, 64).forward(save=False), _PLAIN)
