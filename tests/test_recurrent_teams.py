"""Recurrent layers in Triton whose programs make a sequence together: one cooperative launch, waiting for each other.

The interpreter runs these programs one at a time, in any order, and watches what they read of each other
(tests/triton_interpreter/cooperative.py). On a GPU the same tests compare with a launch per step, bit for bit.
"""

from __future__ import annotations

import types

import pytest
import torch
from policy import assert_bitwise
from test_recurrent_triton import GATES, assert_right, operands, run

KERNEL = "lstm_fwd"
TEAM, STEPS, LOOP = "team", "steps", "loop"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HIDDEN = 72  # units of several programs, the last of them with a tail


@pytest.fixture(autouse=True)
def _only_triton(backend):
    if backend.name not in ("triton", "interpret"):
        pytest.skip("not a Triton backend")


@pytest.fixture
def configs(monkeypatch):
    """The tiles, of which one program makes no sequence alone."""
    from pynn.triton_kernels import recurrent_configs

    monkeypatch.setattr(recurrent_configs, "loop_tile", lambda *_, **__: None)
    return recurrent_configs


@pytest.fixture
def launched(monkeypatch):
    """(kernel, kind of launch, pieces of the weights that it keeps), in the order of the launches."""
    from pynn.triton_kernels import recurrent_launch

    launches: list[tuple[str, str, int]] = []
    launch = recurrent_launch._Launcher.__call__

    def noted(self, *operands):
        constants = self._constants
        kind = TEAM if "counters" in constants else LOOP if constants.get("LOOP", True) else STEPS
        assert bool(constants.get("launch_cooperative_grid")) == (kind == TEAM)
        launches.append((self._kernel.__name__, kind, constants.get("CHUNKS", 0)))
        launch(self, *operands)

    monkeypatch.setattr(recurrent_launch._Launcher, "__call__", noted)
    return launches


def coarse(p):
    """Weights of two bits, so that 16-bit products have exact sums, whatever order the interpreter adds them in."""
    for name, t in p.items():
        if name == "weight_hh" and t.element_size() == 2:
            with torch.no_grad():
                t.copy_((t * 8).round().clamp(-2, 2) / 8)
    return p


def everything(cell, p, **options):
    """Results, and gradients of all operands."""
    results = run(cell, p, **options)
    torch.manual_seed(1)
    seeds = [torch.randn(r.shape, dtype=torch.float64).to(r) for r in results]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, p.values(), seeds)]


def assert_same_bits(got, expected, what=""):
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_bitwise(a.cpu(), b.cpu(), f"{what} {number}")


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize(("lengths", "reverse"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", GATES)
def test_a_team_gives_the_bits_of_a_launch_per_step(backend, configs, launched, cell, dtype, lengths, reverse):
    p = coarse(operands(cell, 4, 18, 3, HIDDEN, dtype, device=backend.device))
    options = {"reverse": reverse}
    if lengths:
        options["lengths"] = (torch.arange(18) * 7 % 5).to(backend.device)
    got = everything(cell, p, **options)
    assert [(name, kind) for name, kind, _ in launched] == [("step_kernel", TEAM), ("step_bwd_kernel", TEAM)]
    assert all((chunks > 0) == (dtype.itemsize == 2) for *_, chunks in launched)
    launched.clear()
    with configs.without_teams():
        expected = everything(cell, p, **options)
    assert {kind for _, kind, _ in launched} == {STEPS}
    assert_same_bits(got, expected)


@pytest.mark.parametrize("hidden", [17, 64, 136])
@pytest.mark.parametrize("cell", GATES)
def test_units_that_fill_no_tile(backend, configs, cell, hidden):
    """Kept weights where rows are made of 16 bytes, others where they are not."""
    for batch, dtype, tolerance in ((1, torch.float64, 1e-13), (17, torch.float16, 6e-3)):
        p = operands(cell, 3, batch, 3, hidden, dtype, device=backend.device)
        assert_right(backend, cell, p, tolerance)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", GATES)
def test_rows_of_any_length(backend, configs, cell, reverse):
    """Teams that end early or do not begin, and whole ones."""
    lengths = torch.cat((torch.zeros(16), torch.full((16,), 2), torch.tensor([1.0, 4.0, 0.0]))).long()
    p = operands(cell, 4, len(lengths), 3, 40, torch.float64, device=backend.device)
    assert_right(backend, cell, p, 1e-13, lengths=lengths, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_equal_the_whole(backend, configs, dtype):
    """Chunks of one step, which no team makes, and of several; parts of the batch."""
    p = coarse(operands("gru", 6, 20, 3, HIDDEN, dtype, device=backend.device))
    with torch.no_grad():
        output, h_n = run("gru", p)
        rest, state, parts = p["input"], p["hx"], []
        for steps in (3, 1, 2):
            part, state = run("gru", p | {"input": rest[:steps], "hx": state})
            rest = rest[steps:]
            parts.append(part)
        assert_same_bits([torch.cat(parts), state], [output, h_n])
        first, _ = run("gru", p | {"input": p["input"][:, :7], "hx": p["hx"][:7]})
        assert_same_bits([first], [output[:, :7]])


def test_a_team_again_and_again(backend, configs, launched):
    """The counters of a launch are no other's."""
    p = operands("lstm", 4, 3, 3, HIDDEN, torch.bfloat16, device=backend.device)
    expected = everything("lstm", p)
    for _ in range(2):
        assert_same_bits(everything("lstm", p), expected)
    assert {kind for _, kind, _ in launched} == {TEAM}


# ---------------------------------------------------------------- programs in any order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", GATES)
def test_any_order_of_the_programs(backend, configs, cell, dtype):
    if backend.name != "interpret":
        pytest.skip("a GPU has an order of its own")
    import triton_interpreter

    p = operands(cell, 3, 17, 3, HIDDEN, dtype)
    expected = everything(cell, p)
    for order, seed in (("reverse", 0), ("shuffled", 0), ("shuffled", 1)):
        with triton_interpreter.override(program_order=order, seed=seed):
            assert_same_bits(everything(cell, p), expected, f"{order} {seed}")


@pytest.mark.parametrize("broken", ["wait", "arrive"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_program_that_does_not_wait_or_arrive_is_found(backend, configs, monkeypatch, direction, broken):
    if backend.name != "interpret":
        pytest.skip("on a GPU it would be luck")
    import triton
    import triton_interpreter

    from pynn.triton_kernels import recurrent_bwd, recurrent_fwd

    @triton.jit
    def nothing(counter, arrivals=0):
        pass

    p = operands("lstm", 4, 3, 3, HIDDEN, torch.float32)
    output, *_ = run("lstm", p)
    monkeypatch.setattr({"fwd": recurrent_fwd, "bwd": recurrent_bwd}[direction], broken, nothing)
    error = triton_interpreter.Race if broken == "wait" else triton_interpreter.Deadlock
    with triton_interpreter.override(program_order="shuffled", seed=2), pytest.raises(error):
        run("lstm", p) if direction == "fwd" else output.sum().backward()


# ---------------------------------------------------------------- where there is a team


def kinds(launched, cell="lstm", steps=3, batch=2, **options):
    launched.clear()
    with torch.no_grad():
        run(cell, operands(cell, steps, batch, 3, 128, torch.bfloat16, **options))
    return {kind for _, kind, _ in launched}


def test_where_there_is_a_team(backend, configs, launched, monkeypatch):
    device = {"device": backend.device}
    assert kinds(launched, **device) == {TEAM}
    assert kinds(launched, steps=1, **device) == {STEPS}
    assert kinds(launched, projection=64, **device) != {TEAM}
    with configs.without_teams():
        assert kinds(launched, **device) == {STEPS}
    monkeypatch.setattr(configs, "processors", lambda device: 8)  # of 16 units each
    assert kinds(launched, batch=16, **device) == {TEAM}
    monkeypatch.setattr(configs, "processors", lambda device: 1)
    assert kinds(launched, batch=32, **device) == {STEPS}


def test_few_units_need_no_team(backend, launched):
    with torch.no_grad():
        run("lstm", operands("lstm", 3, 2, 3, 16, torch.bfloat16, device=backend.device))
    assert [kind for _, kind, _ in launched] == [LOOP]


def test_programs_that_a_processor_holds(monkeypatch):
    """CUDA's occupancy of an H200: by registers, threads, and shared memory."""
    from pynn.triton_kernels import recurrent_configs

    h200 = types.SimpleNamespace(
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, shared_memory_per_multiprocessor=228 << 10
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)

    def held(registers, shared, num_warps):
        return recurrent_configs.programs_held(registers, shared, num_warps, torch.device("cuda"))

    assert [held(registers, 0, 4) for registers in (255, 168, 128, 64, 32)] == [2, 3, 4, 8, 16]
    assert held(32, 0, 8) == 8
    assert held(184, 161 << 10, 8) == 1
    assert [held(32, shared << 10, 4) for shared in (227, 113, 56)] == [1, 2, 4]


@pytest.fixture
def programs(monkeypatch):
    """Whether so many programs run at once, on 132 processors that hold so many each."""
    from pynn.triton_kernels import recurrent_configs, recurrent_launch

    def run_at_once(count, held, device="cuda"):
        compiled = types.SimpleNamespace(
            _init_handles=lambda: None, n_regs=100, metadata=types.SimpleNamespace(shared=1024)
        )
        kernel = types.SimpleNamespace(warmup=lambda *_, **__: compiled)
        monkeypatch.setattr(recurrent_configs, "processors", lambda device: 132)
        monkeypatch.setattr(recurrent_configs, "programs_held", lambda *_: held)
        launcher = recurrent_launch._Launcher(kernel, count, {"num_warps": 4})
        return launcher.runs_at_once((), torch.device(device))

    return run_at_once


def test_programs_that_run_at_once(programs):
    assert programs(132, 1)
    assert not programs(133, 1)
    assert programs(264, 2)
    assert not programs(265, 3)  # waits of so many cost more than a launch
    assert not programs(133, 2, "cpu")


@pytest.mark.parametrize(("name", "shared"), [("sm_80", 163), ("sm_90", 227), ("sm_120", 99)])
def test_kept_weights_fit_the_machine(monkeypatch, name, shared):
    from pynn.triton_kernels import recurrent_configs

    monkeypatch.setattr(recurrent_configs, "architecture", lambda: name)
    monkeypatch.setattr(recurrent_configs, "_generation", lambda: name)
    kept_widths = set()
    for hidden in (136, 256, 512, 768, 1024, 2048):
        for side_by_side, length in ((True, hidden), (False, hidden), (False, 4 * hidden)):
            *kept, streaming = recurrent_configs.team_tiles("half", 16, hidden, length, True, side_by_side=side_by_side)
            assert not streaming.kept
            for tile in kept:
                columns = tile.units * (4 if side_by_side else 1)
                assert 2 * length * (columns + tile.rows) + 2048 <= shared << 10
                kept_widths.add((side_by_side, length))
    assert (True, 512) in kept_widths
    assert not recurrent_configs.team_tiles("half", 16, 2048, 8192, True, side_by_side=False)[0].kept
    assert not recurrent_configs.team_tiles("half", 16, 509, 509, False, side_by_side=True)[0].kept
    monkeypatch.setattr(recurrent_configs, "_generation", lambda: "gfx942")
    assert recurrent_configs.team_tiles("half", 16, 512, 512, True, side_by_side=True) == []
