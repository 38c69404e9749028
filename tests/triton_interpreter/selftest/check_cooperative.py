"""Cooperative launches: right kernels run in every order of their programs, and planted bugs are found in every order.

Their table is apart from planted_bugs.py because in the plain interpreter a program that waits would never end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

import triton_interpreter

triton_interpreter.install()

PROGRAMS, ROUNDS = 4, 5
ORDERS = [("forward", 0), ("reverse", 0), *(("shuffled", seed) for seed in range(5))]


@pytest.fixture(params=ORDERS, ids=lambda order: f"{order[0]} {order[1]}", autouse=True)
def program_order(request):
    order, seed = request.param
    with triton_interpreter.override(program_order=order, seed=seed):
        yield order


@triton.jit
def rounds_kernel(values, counter, rounds, PROGRAMS: tl.constexpr, BUG: tl.constexpr):
    """values[s + 1, program] = program + the sum of values[s]. values: (rounds + 1, PROGRAMS)"""
    program = tl.program_id(0)
    expected = PROGRAMS
    if BUG == "too few arrivals":
        expected = PROGRAMS - 1
    if BUG == "too many arrivals":
        expected = PROGRAMS + 1
    for s in range(rounds):
        if BUG == "a relaxed wait":
            while tl.atomic_add(counter, 0, sem="relaxed") < s * expected:
                pass
        elif BUG == "a volatile wait":
            while tl.load(counter, volatile=True) < s * expected:
                pass
        elif BUG != "no wait":
            while tl.atomic_add(counter, 0, sem="acquire") < s * expected:
                pass
        total = tl.sum(tl.load(values + s * PROGRAMS + tl.arange(0, PROGRAMS)), axis=0)
        tl.store(values + (s + 1) * PROGRAMS + program, total + program)
        if BUG != "no barrier":
            tl.debug_barrier()
        if BUG == "a relaxed arrival":
            tl.atomic_add(counter, 1, sem="relaxed")
        elif BUG != "no arrival" or program > 0:
            tl.atomic_add(counter, 1, sem="release")


@triton.jit
def one_buffer_kernel(values, counter, rounds, PROGRAMS: tl.constexpr):
    """As rounds_kernel, but every round replaces what others may still read. values: (PROGRAMS,)"""
    program = tl.program_id(0)
    for s in range(rounds):
        while tl.atomic_add(counter, 0, sem="acquire") < s * PROGRAMS:
            pass
        total = tl.sum(tl.load(values + tl.arange(0, PROGRAMS)), axis=0)
        tl.store(values + program, total + program)
        tl.debug_barrier()
        tl.atomic_add(counter, 1, sem="release")


def operands(arrived: int = 0):
    values = torch.zeros(ROUNDS + 1, PROGRAMS)
    values[0] = torch.arange(PROGRAMS)
    return values, torch.tensor([arrived], dtype=torch.int32), ROUNDS


def launch(bug: str = "", arrived: int = 0, cooperative: bool = True) -> torch.Tensor:
    values, counter, rounds = operands(arrived)
    rounds_kernel[(PROGRAMS,)](values, counter, rounds, PROGRAMS=PROGRAMS, BUG=bug, launch_cooperative_grid=cooperative)
    return values


def expected() -> torch.Tensor:
    values, *_ = operands()
    for s in range(ROUNDS):
        values[s + 1] = values[s].sum() + torch.arange(PROGRAMS)
    return values


def test_programs_wait_for_each_other():
    assert torch.equal(launch(), expected())


def assert_found(run: Callable[[], torch.Tensor], right: torch.Tensor, program_order: str) -> None:
    """In a shuffled order by the error. In another one the programs may happen to meet in an order that excuses them:
    then the numbers are wrong."""
    if program_order == "shuffled":
        with pytest.raises(triton_interpreter.Race, match="'values'"):
            run()
        return
    with contextlib.suppress(triton_interpreter.Race):
        assert not torch.equal(run(), right)


@pytest.mark.parametrize(
    ("bug", "error", "message"),
    [
        ("no wait", "Race", r"'values'"),
        ("a relaxed wait", "Race", r"'values'"),
        ("a volatile wait", "Race", r"'counter'|'values'"),
        ("a relaxed arrival", "Race", r"'values'"),
        ("no barrier", "Race", r"tl.debug_barrier\(\) has to come between"),
        ("too many arrivals", "Deadlock", r"rounds_kernel, program .*all programs that have not ended wait"),
        ("no arrival", "Deadlock", r"and none can go on: \(\d, 0, 0\), \(\d, 0, 0\)"),
    ],
)
def test_planted_bugs(bug, error, message):
    with pytest.raises(getattr(triton_interpreter, error), match=f"(?s){message}"):
        launch(bug)


def test_too_few_arrivals(program_order):
    assert_found(lambda: launch("too few arrivals"), expected(), program_order)


def test_a_counter_that_was_not_cleared(program_order):
    assert_found(lambda: launch(arrived=PROGRAMS * ROUNDS), expected(), program_order)


def test_a_buffer_that_others_still_read(program_order):
    def run() -> torch.Tensor:
        values, counter, rounds = operands()
        one_buffer_kernel[(PROGRAMS,)](values[0], counter, rounds, PROGRAMS=PROGRAMS, launch_cooperative_grid=True)
        return values[0]

    assert_found(run, expected()[-1], program_order)


def test_an_ordinary_launch_cannot_wait():
    with pytest.raises(triton_interpreter.Deadlock, match="launch_cooperative_grid=True"):
        launch(cooperative=False)


def test_more_programs_than_run_at_once():
    with (
        triton_interpreter.override(cooperative_programs=PROGRAMS - 1),
        pytest.raises(triton_interpreter.Deadlock, match="launch of 4 programs, of which 3 run at once"),
    ):
        launch()


@triton.jit
def out_of_bounds_kernel(values, counter, PROGRAMS: tl.constexpr):
    if tl.program_id(0) == 2:
        tl.load(values + PROGRAMS)
    tl.atomic_add(counter, 1, sem="release")
    while tl.atomic_add(counter, 0, sem="acquire") < PROGRAMS:
        pass


def test_an_error_names_its_program_and_ends_the_others():
    values, counter, _ = operands()
    with pytest.raises(triton_interpreter.OutOfBounds, match=r"out_of_bounds_kernel, program \(2, 0, 0\), line \d+ of"):
        out_of_bounds_kernel[(PROGRAMS,)](values[0], counter, PROGRAMS=PROGRAMS, launch_cooperative_grid=True)
    launch()
