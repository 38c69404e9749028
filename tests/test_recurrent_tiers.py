"""The four kinds of kernels of recurrent layers in CUDA C++, on the sim: which one runs; all give the same bits.

A device that is described to the sim makes the launchers choose a kind: its shared memory holds a layer in one block or
not, it has clusters of blocks or not, and few processors or many.
"""

from __future__ import annotations

import pytest
import simulator
import torch
from policy import assert_bitwise
from recurrent_reference import gradients, make, ours, seeds
from simulator import FORWARD, REVERSE, SHUFFLED, UNEVEN
from test_recurrent import assert_matches_reference, assert_parts_equal_the_whole

import pynn

pytestmark = pytest.mark.skipif(
    bool(pynn.backends.unavailable["sim"]), reason=f"sim: {pynn.backends.unavailable['sim']}"
)

BLOCK, CLUSTER, TEAM, STEP = "block", "cluster", "team", "step"
# Devices for layers of `hidden` units: processors, kilobytes, blocks of the largest cluster.
DEVICES = {
    # cell, hidden, dtype: kind -> device
    ("lstm", 88, torch.bfloat16): {BLOCK: (132, 227, 8), CLUSTER: (132, 61, 8), TEAM: (132, 61, 0), STEP: (1, 61, 0)},
    ("gru", 96, torch.float16): {BLOCK: (132, 227, 8), CLUSTER: (132, 61, 8), TEAM: (132, 61, 0), STEP: (1, 61, 0)},
    ("rnn", 144, torch.bfloat16): {BLOCK: (132, 227, 8), CLUSTER: (132, 50, 8), TEAM: (132, 50, 0), STEP: (1, 50, 0)},
    # One buffer of gradients.
    ("lstm", 88, torch.float32): {BLOCK: (132, 227, 8), CLUSTER: (132, 61, 8), STEP: (1, 61, 0)},
    # A part of the weights in registers: forward and backward; forward, with one buffer of gradients.
    ("lstm", 200, torch.bfloat16): {CLUSTER: (132, 61, 8), STEP: (1, 61, 0)},
    ("gru", 216, torch.float16): {CLUSTER: (132, 64, 8), STEP: (1, 61, 0)},
}
CASES = [(*layer, kind) for layer, devices in DEVICES.items() for kind in devices]


def run(kind, device, p, grads):
    """Results and gradients, from kernels of that kind."""
    with pynn.backend("sim"), simulator.device(*device):
        leaves = p.with_leaves()
        results = ours(leaves)
        assert f"forward_{kind}" in simulator.latest_kernel()
        wanted = [leaves.tensors[name] for name in p.names]
        got = torch.autograd.grad(results, wanted, grads)
        assert f"backward_{kind}" in simulator.latest_kernel()
    return [r.detach() for r in results], dict(zip(p.names, got, strict=True))


def problem(cell, hidden, dtype, **options):
    p = make(cell, 4, 19, 3, hidden, dtype=dtype, **options)
    return p, seeds(p)


@pytest.mark.parametrize("options", [{}, {"lengths": True, "reverse": True}], ids=["whole", "lengths"])
@pytest.mark.parametrize(("cell", "hidden", "dtype"), DEVICES)
def test_all_kinds_give_the_same_bits(cell, hidden, dtype, options):
    p, grads = problem(cell, hidden, dtype, **options)
    (first, device), *others = DEVICES[cell, hidden, dtype].items()
    expected, expected_gradients = run(first, device, p, grads)
    for kind, device in others:
        results, got = run(kind, device, p, grads)
        for a, b in zip(results, expected, strict=True):
            assert_bitwise(a, b, f"{kind}: result")
        for name in got:
            assert_bitwise(got[name], expected_gradients[name], f"{kind}: gradient of {name}")


@pytest.mark.parametrize(("cell", "hidden", "dtype", "kind"), [c for c in CASES if c[-1] == CLUSTER])
def test_clusters_match_the_formulas(cell, hidden, dtype, kind):
    p, grads = problem(cell, hidden, dtype, lengths=True)
    with pynn.backend("sim"), simulator.device(*DEVICES[cell, hidden, dtype][kind]):
        assert_matches_reference(p, dtype, grads)


@pytest.mark.parametrize(("cell", "hidden", "dtype", "kind"), CASES)
def test_parts_equal_the_whole(cell, hidden, dtype, kind):
    """Chunks of one step run step by step, whatever the kind of the others."""
    p = make(cell, 7, 5, 6, hidden, dtype=dtype, projected_input=True)
    with pynn.backend("sim"), simulator.device(*DEVICES[cell, hidden, dtype][kind]):
        assert_parts_equal_the_whole(p, dtype)


@pytest.mark.parametrize(
    "schedule",
    [(FORWARD, 0, 1), (REVERSE, 0, 1), (SHUFFLED, 3, 1), (SHUFFLED, 4, 3), (UNEVEN, 0, 1)],
    ids=lambda s: str(s[0]),
)
def test_clusters_under_every_schedule(schedule):
    """More clusters than run at a time, in any order of their threads."""
    p = make("lstm", 3, 50, 3, 88, dtype=torch.bfloat16, lengths=True)
    grads = seeds(p)
    device = DEVICES["lstm", 88, torch.bfloat16][CLUSTER]
    expected, expected_gradients = run(CLUSTER, device, p, grads)
    with simulator.schedule(*schedule):
        results, got = run(CLUSTER, device, p, grads)
    for a, b in zip(results, expected, strict=True):
        assert_bitwise(a, b)
    for name in got:
        assert_bitwise(got[name], expected_gradients[name], name)


@pytest.mark.parametrize(
    ("cell", "hidden", "dtype", "device"),
    [
        ("lstm", 72, torch.bfloat16, (132, 28, 8)),  # nine groups of units: three for each of three blocks of four
        ("lstm", 72, torch.bfloat16, (132, 19, 8)),  # two for each of five blocks of eight; one buffer of gradients
        ("rnn", 72, torch.float32, (132, 15, 8)),
    ],
    ids=str,
)
def test_blocks_without_units_fall_behind(cell, hidden, dtype, device):
    p = make(cell, 6, 3, 3, hidden, dtype=dtype)
    grads = seeds(p)
    expected, expected_gradients = run(BLOCK, (132, 227, 8), p, grads)
    with simulator.schedule(UNEVEN):
        results, got = run(CLUSTER, device, p, grads)
    for a, b in zip(results, expected, strict=True):
        assert_bitwise(a, b)
    for name in got:
        assert_bitwise(got[name], expected_gradients[name], name)


@pytest.mark.parametrize(
    ("device", "batch", "hidden", "kind"),
    [
        ((132, 227, 8), 3, 96, BLOCK),
        ((132, 227, 8), 3, 256, CLUSTER),
        ((132, 227, 8), 3, 512, CLUSTER),  # the largest: with all that registers hold, forward and backward
        ((132, 227, 8), 3, 520, TEAM),
        ((132, 227, 0), 3, 256, TEAM),  # no clusters
        ((132, 163, 0), 3, 256, TEAM),
        ((8, 227, 8), 40, 512, STEP),  # one cluster for three strips of rows
        ((16, 227, 8), 40, 512, CLUSTER),
        ((132, 99, 8), 3, 256, CLUSTER),
        ((132, 99, 8), 3, 512, TEAM),
    ],
    ids=str,
)
def test_which_kind_runs(device, batch, hidden, kind):
    p = make("lstm", 2, batch, 2, hidden, dtype=torch.bfloat16, projected_input=True)
    with pynn.backend("sim"), simulator.device(*device), torch.no_grad():
        ours(p)
        assert f"forward_{kind}" in simulator.latest_kernel()


def test_a_layer_of_the_largest_width():
    """512 units in bfloat16, as on an H200: registers and the whole shared memory, against a launch per step."""
    p = make("lstm", 3, 5, 2, 512, dtype=torch.bfloat16)
    grads = seeds(p)
    expected, expected_gradients = run(STEP, (1, 227, 0), p, grads)
    results, got = run(CLUSTER, (132, 227, 8), p, grads)
    for a, b in zip(results, expected, strict=True):
        assert_bitwise(a, b)
    for name in got:
        assert_bitwise(got[name], expected_gradients[name], name)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_units_that_are_no_whole_groups(cell):
    """Forward in clusters; backward, whose gradients of a gate then begin anywhere, another way."""
    p, grads = problem(cell, {"lstm": 91, "gru": 101, "rnn": 163}[cell], torch.bfloat16, lengths=True, reverse=True)
    with pynn.backend("sim"):
        with simulator.device(132, 61, 8):
            results, got = gradients(ours, p, grads)
        with simulator.device(1, 61, 0):
            expected, expected_gradients = gradients(ours, p, grads)
    for a, b in zip(results, expected, strict=True):
        assert_bitwise(a, b)
    for name in got:
        assert_bitwise(got[name], expected_gradients[name], name)
