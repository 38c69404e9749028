"""Errors of recurrent layers over many steps: against torch, and of the sums that are the gradients of weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from policy import FLOOR, LOW_PRECISION, integers, relative_error
from recurrent_reference import assert_errors_are_no_larger_than_torchs, gradients, make, ours, seeds, torchs
from test_recurrent import CELLS

KERNEL = "lstm_fwd"
MANY = {"cpu": 4096, "cuda": 4096, "triton": 4096}  # steps; the tools that stand for a GPU get fewer
FEW = 48


def steps_of(backend) -> int:
    return MANY.get(backend.name, FEW)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("steps", [1, 16, 256, "many"])
@pytest.mark.parametrize("cell", CELLS)
def test_error_is_no_larger_than_torchs(backend, cell, steps, dtype):
    """P1 of results and all gradients, as long as the sequence may be; of a short one, over several problems."""
    if backend.name not in MANY and steps in (16, 256):
        pytest.skip("few steps and many are enough for a tool")
    steps = steps_of(backend) if steps == "many" else steps
    problems, batch = (12, 6) if steps == 1 else (8, 6) if steps <= FEW else (1, 3)
    made = (make(cell, steps, batch, 33, 40, dtype=dtype).to(backend.device) for _ in range(problems))
    assert_errors_are_no_larger_than_torchs(backend, made, dtype)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_gradients_of_weights_are_sums_rounded_once(backend, dtype):
    """Terms that 16 bits hold, so the sums over the steps make all of the error: 1.3 times that of one rounding.

    On thousands of steps torch's are 40 times as far off: it rounds after every step.
    """
    p = make("rnn", steps_of(backend), 3, 17, 24, relu=True)
    values = {name: integers(t.shape, dtype, low=-2, high=2) for name, t in p.tensors.items() if t is not None}
    values["weight_hh"].zero_()  # so the gradients of the pre-activations are those given, or 0
    p = dataclasses.replace(p, tensors={**p.tensors, **values}).to(backend.device)
    grads = seeds(p)
    results, got = gradients(ours, p, grads)
    truth, expected = gradients(torchs, p.to("cpu", dtype=torch.float64), [g.cpu() for g in grads])
    assert torch.equal(results[0].cpu().double(), truth[0])
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        error = relative_error(got[name].cpu(), expected[name])
        assert error <= 1.3 * FLOOR[dtype], f"{name}: {error / FLOOR[dtype]:.2f} times the error of rounding"
