"""Recurrent layers' Triton kernels where they branch: which kernel runs, tails of its tiles, one launch or several.

test_recurrent_teams.py has programs that wait for each other. test_recurrent.py asks the same of every backend; here
shapes are chosen for the tiles of these kernels.
"""

from __future__ import annotations

import collections

import pytest
import torch
from policy import assert_bitwise, integers, relative_error

from pynn.ops import _recurrent_composite as composite
from pynn.ops.recurrent import gru, lstm, rnn

KERNEL = "lstm_fwd"
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
WIDE, MANY = 33, 129  # units of a sequence in one launch, and of one in many, with tails


@pytest.fixture(autouse=True)
def _only_triton(backend):
    if backend.name not in ("triton", "interpret"):
        pytest.skip("not a Triton backend")


@pytest.fixture
def launches(monkeypatch):
    """Kernel name -> how often it was launched."""
    from pynn.triton_kernels import recurrent_launch as module

    counts: collections.Counter = collections.Counter()
    launch = module._Launcher.__call__

    def counted(self, *operands):
        counts[self._kernel.__name__] += 1
        launch(self, *operands)

    monkeypatch.setattr(module._Launcher, "__call__", counted)
    return counts


@pytest.fixture
def _no_teams():
    from pynn.triton_kernels import recurrent_configs

    with recurrent_configs.without_teams():
        yield


@pytest.fixture
def _one_step_each(monkeypatch, _no_teams):
    """No sequence is made in one launch."""
    from pynn.triton_kernels import recurrent_configs

    monkeypatch.setattr(recurrent_configs, "loop_tile", lambda *_, **__: None)


def operands(cell, steps, batch, inputs, hidden, dtype, *, projection=0, device="cpu"):
    rows, state = GATES[cell] * hidden, projection or hidden
    shapes = {"input": (steps, batch, inputs), "hx": (batch, state)}
    if cell == "lstm":
        shapes["cx"] = (batch, hidden)
    shapes |= {"weight_ih": (rows, inputs), "weight_hh": (rows, state), "bias_ih": (rows,), "bias_hh": (rows,)}
    if cell == "lstm":
        shapes["weight_hr"] = (projection, hidden)
    made = {name: torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    if not projection:
        made.pop("weight_hr", None)
    return {name: t.to(dtype).to(device).requires_grad_() for name, t in made.items()}


def run(cell, p, **options):
    """(output, last states)"""
    p = dict(p)
    if cell == "lstm":
        output, states = lstm(p.pop("input"), (p.pop("hx"), p.pop("cx")), **p, **options)
        return output, *states
    return {"gru": gru, "rnn": rnn}[cell](p.pop("input"), p.pop("hx"), **p, **options)


def truth(cell, p, *, lengths=None, reverse=False):
    """`run` in torch operations and float64, with leaves of its own."""
    leaves = {name: t.detach().cpu().double().requires_grad_() for name, t in p.items()}
    given = {name: t for name, t in leaves.items() if not name.startswith("bias")}
    ih, hh = leaves["bias_ih"], leaves["bias_hh"]
    tensors = [given[name] for name in ("input", "hx", "cx", "weight_ih", "weight_hh") if name in given]
    tensors += [ih, hh] if cell == "gru" else [ih + hh]
    options = {"lengths": lengths, "reverse": reverse} | ({"relu": False} if cell == "rnn" else {})
    if cell == "lstm":
        tensors.append(given.get("weight_hr"))
    return leaves, getattr(composite, cell)(*tensors, **options)


def assert_right(backend, cell, p, tolerance, *, lengths=None, reverse=False):
    """Results and gradients of all operands against the formulas in float64."""
    on_device = None if lengths is None else lengths.to(backend.device)
    results = run(cell, p, lengths=on_device, reverse=reverse)
    leaves, expected = truth(cell, p, lengths=lengths, reverse=reverse)
    seeds = [torch.randn_like(e) for e in expected]
    gradients = torch.autograd.grad(results, p.values(), [s.to(r) for s, r in zip(seeds, results, strict=True)])
    wanted = torch.autograd.grad(expected, leaves.values(), seeds)
    pairs = [*zip(results, expected, strict=True), *zip(gradients, wanted, strict=True)]
    for name, (a, e) in zip(("output", "h_n", "c_n")[: len(results)] + tuple(p), pairs, strict=False):
        assert relative_error(a.detach().cpu().double(), e.detach()) < tolerance, name


# ---------------------------------------------------------------- which kernel, how often


@pytest.mark.parametrize("cell", GATES)
def test_few_units_take_one_launch(backend, launches, cell):
    kernels = {
        torch.bfloat16: ("resident_kernel", "resident_bwd_kernel"),
        torch.float32: ("step_kernel", "step_bwd_kernel"),
    }
    for dtype, (forward, backward) in kernels.items():
        p = operands(cell, 4, 3, 5, WIDE, dtype, device=backend.device)
        launches.clear()
        output, *_ = run(cell, p)
        assert launches == {forward: 1}
        launches.clear()
        output.sum().backward()
        assert launches == {backward: 1}


@pytest.mark.usefixtures("_no_teams")
@pytest.mark.parametrize("cell", GATES)
def test_many_units_take_a_launch_per_step(backend, launches, cell):
    steps = 3
    hidden = 260 if cell == "rnn" else MANY  # an RNN's weight_hh is the smallest
    p = operands(cell, steps, 2, 5, hidden, torch.bfloat16, device=backend.device)
    output, *_ = run(cell, p)
    assert launches == {"step_kernel": steps}
    launches.clear()
    output.sum().backward()
    assert launches == {"step_bwd_kernel": steps + 1}  # one more for the gradient of hx


def test_a_projected_step_takes_two_launches(backend, launches):
    steps = 3
    p = operands("lstm", steps, 2, 5, 9, torch.float32, projection=4, device=backend.device)
    output, *_ = run("lstm", p)
    assert launches == {"step_kernel": steps, "project_kernel": steps}
    launches.clear()
    output.sum().backward()
    assert launches == {"step_bwd_kernel": 2 * steps + 1}


def test_a_single_step_is_one_launch(backend, launches):
    for hidden in (WIDE, MANY):
        p = operands("lstm", 1, 2, 5, hidden, torch.float32, device=backend.device)
        launches.clear()
        with torch.no_grad():
            run("lstm", p)
        assert sum(launches.values()) == 1


def test_the_kernel_follows_neither_batch_nor_steps(backend, launches):
    """So that parts of a sequence and of a batch give the bits of the whole."""
    names = set()
    for batch, steps in ((1, 1), (70, 1), (2, 5)):
        launches.clear()
        with torch.no_grad():
            run("gru", operands("gru", steps, batch, 3, WIDE, torch.bfloat16, device=backend.device))
        names.add(tuple(launches))
    assert names == {("resident_kernel",)}


# ---------------------------------------------------------------- tails of tiles


@pytest.mark.parametrize("hidden", [1, 16, 17, 64, 65, 130])
@pytest.mark.parametrize("cell", GATES)
def test_units_that_fill_no_tile(backend, cell, hidden):
    for batch in (1, 17):
        p = operands(cell, 2, batch, 3, hidden, torch.float64, device=backend.device)
        assert_right(backend, cell, p, 1e-13)


@pytest.mark.usefixtures("_one_step_each")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", GATES)
def test_rows_of_any_length_step_by_step(backend, cell, reverse):
    p = operands(cell, 4, 6, 3, 11, torch.float64, device=backend.device)
    assert_right(backend, cell, p, 1e-13, lengths=torch.tensor([4, 0, 2, 9, 1, -3]).clamp(0, 4), reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", GATES)
def test_rows_of_any_length_in_registers(backend, cell, reverse):
    """Tiles of rows that end early, that do not begin, and whole ones."""
    lengths = torch.cat((torch.zeros(16), torch.full((16,), 2), torch.tensor([1.0, 4.0, 0.0]))).long()
    p = operands(cell, 4, len(lengths), 3, 18, torch.float16, device=backend.device)
    assert_right(backend, cell, p, 4e-3, lengths=lengths, reverse=reverse)


def test_projections_wider_than_a_tile(backend):
    p = operands("lstm", 3, 17, 4, 71, torch.float64, projection=67, device=backend.device)
    lengths = torch.tensor([3, 1, 0, 2] * 4 + [3])
    for reverse in (False, True):
        assert_right(backend, "lstm", p, 1e-13, lengths=lengths, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [19, 129, 260])
def test_integers_are_exact(backend, dtype, hidden):
    """P4: sums of small integers through relu, the same in every kernel."""
    p = operands("rnn", 2, 18, 3, hidden, dtype, device=backend.device)
    sparse = {"weight_ih": 0, "weight_hh": 0}
    for name, t in p.items():
        values = integers(t.shape, dtype, low=-1, high=1)
        if name in sparse:  # sums that 16 bits hold
            values = values * (torch.rand(t.shape) < 4 / t.shape[-1])
        p[name] = values.to(backend.device)
    output, h_n = rnn(*p.values(), nonlinearity="relu")
    h, w = p["hx"].cpu().double(), {name: t.cpu().double() for name, t in p.items()}
    for t in range(2):
        h = (w["input"][t] @ w["weight_ih"].T + h @ w["weight_hh"].T + w["bias_ih"] + w["bias_hh"]).relu()
        assert_bitwise(output[t].cpu(), h.to(dtype), f"step {t}")
    assert_bitwise(h_n.cpu(), h.to(dtype), "h_n")


# ---------------------------------------------------------------- one number whichever kernel


@pytest.mark.usefixtures("_no_teams")
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree(backend, monkeypatch, cell, dtype):
    from pynn.triton_kernels import recurrent_configs

    p = operands(cell, 3, 5, 4, WIDE, dtype, device=backend.device)
    once = run(cell, p)
    gradient = torch.autograd.grad(once[0].sum(), p["weight_hh"])[0]
    monkeypatch.setattr(recurrent_configs, "loop_tile", lambda *_, **__: None)
    several = run(cell, p)
    tolerance = 1e-6 if dtype is torch.float32 else 4e-3
    for a, b in zip(several, once, strict=True):
        assert relative_error(a.detach().cpu().double(), b.detach().cpu().double()) < tolerance
    again = torch.autograd.grad(several[0].sum(), p["weight_hh"])[0]
    assert relative_error(again.cpu().double(), gradient.cpu().double()) < 4 * tolerance


# ---------------------------------------------------------------- configs of machines that are not here


@pytest.fixture
def machine(monkeypatch):
    from pynn.triton_kernels import recurrent_configs

    def choose(name):
        monkeypatch.setattr(recurrent_configs, "architecture", lambda: name)
        monkeypatch.setattr(recurrent_configs, "_generation", lambda: name)
        return recurrent_configs

    return choose


@pytest.mark.parametrize(("name", "shared"), [("sm_80", 163), ("sm_90", 227), ("sm_120", 99), ("gfx942", 64)])
def test_what_a_program_keeps_fits_the_machine(machine, name, shared):
    """weight_hh with a tile of h, in KiB; gfx942 keeps what does not fit its shared memory in registers."""
    configs = machine(name)
    for gates in (1, 3, 4):
        for hidden in (16, 64, 100, 128, 200, 256, 512):
            found = configs.loop_tile("half", gates, hidden, True, backward=False)
            if found is None:
                continue
            tile, ahead = found
            assert tile.units >= hidden
            kept = gates * tile.units * tile.units * 2
            assert kept + tile.rows * tile.units * 2 <= shared << 10 or name == "gfx942"
            assert not (ahead and kept > 96 << 10)
    assert configs.loop_tile("half", 4, 64, False, backward=False) is not None
    assert configs.loop_tile("fp32", 4, 129, True, backward=True) is None


def test_registers_are_asked_for_where_there_is_such_an_option(machine):
    for name in ("sm_80", "sm_90", "sm_120", "gfx942", "interpret"):
        configs = machine(name)
        for batch in (1, 16, 4096):
            for kind in ("half", "fp32", "fp64"):
                tile = configs.step_tile(kind, batch, 1024, True)
                assert ("maxnreg" in tile.options) == (tile.free and name.startswith("sm_"))
                assert configs.step_tile(kind, batch, 1021, False).num_stages == 1
