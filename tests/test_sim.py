"""The sim (csrc/sim): correct CUDA kernels run right under every schedule and sanitizer, and each planted bug is found.

The programs are built with g++ in a temporary directory; nothing here needs a GPU or a CUDA toolkit.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path

import pytest
import simulator
import torch
from policy import assert_bitwise
from simulator import FORWARD, REVERSE, SELFTEST, SHUFFLED

import pynn
from pynn.diffusion import Schedule

SCHEDULES = [(FORWARD, 0, 1), (REVERSE, 0, 1), (SHUFFLED, 1, 1), (SHUFFLED, 2, 3)]

# Bugs that the sim itself stops, and what it says.
STOPPED = {
    "arrive_twice": r"cluster_arrive \(planted.cuh:\d+\) again before a cluster_wait",
    "barrier_after_exit": r"\(16, 0, 0\): exits while 16 other threads wait at __syncthreads \(planted.cuh:\d+\)",
    "block_too_deep": r"kernel planted::nothing: expected a block of 1 to 1024 threads with z <= 64, got \(1, 1, 65\)",
    "block_too_large": r"expected a block of 1 to 1024 threads .* got \(1025, 1, 1\)",
    "cluster_too_large": r"expected a cluster of 1 to 8 blocks, got 9",
    "copy_to_global": r"cp.async: expected 4 bytes inside the block's shared memory",
    "deadlock": r"deadlock: no thread can run\s+block \(0, 0, 0\), thread \(0, 0, 0\) waits at __syncthreads",
    "divergent_barrier": r"divergent barrier: this thread is at __syncthreads \(planted.cuh:\d+\), 16 other threads",
    "divergent_cluster_barrier": r"divergent cluster_arrive: this thread is at planted.cuh:\d+, lane 0 of its warp at",
    "divergent_warp": r"lane 16 is at __shfl_xor_sync with mask 0xffffffff .* lane 0 waits at __shfl_sync",
    "empty_block": r"expected a block of 1 to 1024 threads",
    "empty_grid": r"expected a grid of at least one block",
    "endless_poll": r"deadlock: the threads that can run only poll memory that nobody writes",
    "exit_before_cluster_barrier": r"cluster_arrive .* after \d+ threads of the cluster have exited|"
    r"exits while \d+ other threads have arrived at a barrier of the cluster",
    "exit_before_waiting": r"exits before it has waited for what was stored to the block's shared memory",
    "exit_between_arrive_and_wait": r"exits between cluster_arrive and cluster_wait",
    "exit_before_barrier": r"exits while 31 other threads wait at __syncthreads",
    "grid_too_deep": r"y and z <= 65535, got \(1, 1, 65536\)",
    "grid_too_high": r"y and z <= 65535, got \(1, 65536, 1\)",
    "grid_too_wide": r"x <= 2147483647, y and z <= 65535, got \(2147483648, 1, 1\)",
    "lane_exited": r"lane 3 of the mask has exited",
    "lane_not_in_mask": r"lane 31 calls __shfl_sync with mask 0x7fffffff \(planted.cuh:\d+\) but is not in the mask",
    "ldmatrix_outside": r"thread \(7, 0, 0\): ldmatrix: expected 16 bytes inside the block's shared memory",
    "misaligned_copy": r"cp.async from global memory: expected an address aligned to 16 bytes, .* 4 bytes over",
    "misaligned_ldmatrix": r"ldmatrix: expected an address aligned to 16 bytes, got one with 2 bytes over",
    "misaligned_store": r"store_async: expected an address aligned to 16 bytes, got one with 4 bytes over",
    "misaligned_vector": r"16-byte load: expected an address aligned to 16 bytes",
    "missing_cluster_barrier": r"store_async: the other block may not have started",
    "no_mbarrier": r"store_async: expected a barrier that mbarrier_init has made",
    "no_dynamic_shared": r"declares dynamic shared memory, but was launched without any",
    "part_of_a_cluster": r"expected a grid of whole clusters of 2 blocks in x, got 3 blocks",
    "partial_warp_mma": r"mma_m16n8k8_tf32 \(planted.cuh:\d+\) needs a warp of 32 threads; the block has 16",
    "pending_copy": r"exits with cp.async copies pending",
    "rank_out_of_range": r"store_async: expected a rank below 2, got [23]",
    "store_outside_shared": r"store_async: expected 4 bytes inside the block's shared memory",
    "store_to_exited_block": r"the block with rank 0 has exited|exits before it has waited for what was stored",
    "too_few_bytes": r"deadlock: no thread can run\s+block .* waits at mbarrier_wait \(planted.cuh:\d+\)",
    "too_many_arrivals": r"mbarrier_arrive: more than the 32 arrivals of a phase",
    "too_many_resident": r"expected a cooperative grid of at most 65536 threads, got 65 blocks of 1024",
    "too_many_resident_by_shared_memory": r"expected a cooperative grid of at most 132 blocks, got 133",
    "too_much_dynamic_shared": r"expected at most 232448 bytes of shared memory, got 232449",
    "too_much_static_shared": r"expected at most 49152 bytes of static shared memory, got 49156",
    "wait_without_arrive": r"cluster_wait \(planted.cuh:\d+\) without a cluster_arrive before it",
    "without_cluster": r"cluster_rank in a launch without clusters: use LAUNCH_CLUSTERS",
}
# Bugs that read poison: the result is not a number.
POISONED = {"shuffle_outside_mask", "uninitialised_shared", "wrong_wait"}
# Bugs that give a wrong result under at least one schedule, and are races for TSan.
ORDER = {
    "barrier_between_blocks",
    "missing_barrier",
    "missing_mbarrier_wait",
    "missing_second_barrier",
    "missing_second_syncwarp",
    "missing_syncwarp",
    "store_before_all_have_read",
}
# Races that give the right result here under every schedule.
SILENT_RACES = {"missing_fence", "unordered_add"}
ADDRESS = {
    "out_of_bounds_dynamic": r"heap-buffer-overflow .*planted.cuh:\d+ in planted::out_of_bounds_dynamic",
    "out_of_bounds_global": r"heap-buffer-overflow .*planted.cuh:\d+ in planted::out_of_bounds_global",
    "out_of_bounds_shared": r"planted.cuh:\d+:\d+: runtime error: index 32 out of bounds|heap-buffer-overflow",
}
UNDEFINED = {
    "misaligned_access": r"planted.cuh:\d+:\d+: runtime error: member access within misaligned address",
    "signed_overflow": r"planted.cuh:\d+:\d+: runtime error: signed integer overflow",
}


@pytest.fixture(scope="session")
def build_directory(tmp_path_factory):
    """One directory for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sim"


@pytest.fixture
def self_test(build_directory):
    def run(variant, *arguments):
        path = simulator.program(build_directory, "self_test", [SELFTEST / "self_test.cpp"], variant)
        return simulator.run([path, *map(str, arguments)])

    return run


@pytest.mark.parametrize(
    ("variant", "schedule"), [*itertools.product(("plain", "asan"), SCHEDULES), ("tsan", SCHEDULES[3])], ids=str
)
def test_correct_kernels(self_test, variant, schedule):
    outcome = self_test(variant, "correct", *schedule)
    assert outcome.status == 0, outcome.text


@pytest.mark.parametrize("bug", STOPPED)
def test_stopped_by_the_sim(self_test, bug):
    outcome = self_test("plain", "planted", bug)
    assert outcome.status == 4, outcome.text
    assert re.search(r"^pynn sim: kernel planted::\w+", outcome.text)
    assert re.search(STOPPED[bug], outcome.text), outcome.text


@pytest.mark.parametrize("bug", sorted(POISONED))
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_poison_reaches_the_result(self_test, bug, schedule):
    outcome = self_test("plain", "planted", bug, *schedule)
    assert outcome.status == 3, outcome.text
    assert "nan" in outcome.text


@pytest.mark.parametrize("bug", sorted(ORDER))
def test_order_shows_in_the_result(self_test, bug):
    statuses = [self_test("plain", "planted", bug, *schedule).status for schedule in SCHEDULES]
    assert 3 in statuses


@pytest.mark.parametrize("bug", sorted(ORDER | SILENT_RACES))
@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[3]], ids=str)
def test_races_are_found(self_test, bug, schedule):
    outcome = self_test("tsan", "planted", bug, *schedule)
    assert outcome.status == simulator.FOUND_BY_SANITIZER, outcome.text
    assert "data race" in outcome.summary()
    assert re.search(rf"planted::{bug}\(.*planted.cuh:\d+", outcome.text), outcome.text
    if bug in SILENT_RACES:
        assert self_test("plain", "planted", bug, *schedule).status == 0


@pytest.mark.parametrize("bug", [*ADDRESS, *UNDEFINED])
def test_found_by_asan_and_ubsan(self_test, bug):
    outcome = self_test("asan", "planted", bug)
    assert outcome.status == simulator.FOUND_BY_SANITIZER, outcome.text
    assert re.search({**ADDRESS, **UNDEFINED}[bug], outcome.text), outcome.text


def test_every_planted_bug_is_expected_somewhere(self_test):
    expected = {*STOPPED, *POISONED, *ORDER, *SILENT_RACES, *ADDRESS, *UNDEFINED}
    assert set(self_test("plain", "list").text.split()) == expected


def test_portable_switch(build_directory):
    """The ucontext fallback for other machines, in the place of the assembly."""
    directory, flag = build_directory / "ucontext", "-DPYNN_SIM_UCONTEXT"
    sources = [*sorted((simulator.ROOT / "csrc/sim").glob("*.cpp")), SELFTEST / "self_test.cpp"]
    objects = [simulator.compile_object(directory, source, "plain", flag, "-O0") for source in sources]
    path = simulator.link(directory / "self_test", objects, "plain")
    outcome = simulator.run([path, "correct", *map(str, SCHEDULES[3])])
    assert outcome.status == 0, outcome.text


def test_errors_reach_python(build_directory):
    """As RuntimeError with the kernel, the block and the thread; the next launch works."""
    library = simulator.torch_library(build_directory, "planted_ops", [SELFTEST / "planted_ops.cpp"], "plain")
    torch.ops.load_library(str(library))
    ops, y = torch.ops.pynn_planted, torch.ones(64)
    for _ in range(3):
        place = r"block \(0, 0, 0\), thread \(16, 0, 0\): divergent barrier"
        with pytest.raises(RuntimeError, match=rf"kernel planted::divergent_barrier, {place}"):
            ops.divergent_barrier(y)
        with pytest.raises(RuntimeError, match="kernel planted::nothing: expected at most 232448 bytes"):
            ops.too_much_shared(y)
        assert ops.nothing(y.fill_(1))[0] == 0


def test_primitives_check_builds():
    """The comparison with a GPU compiles without warnings; without a GPU it says so, with one everything agrees."""
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("no nvcc")
    outcome = simulator.run(["make", "-C", simulator.ROOT, "primitives-check"])
    assert outcome.status == 0, outcome.text
    outcome = simulator.run([simulator.ROOT / "build/primitives_check"])
    assert outcome.status in (0, 77), outcome.text
    assert ("all agree" if outcome.status == 0 else "no GPU") in outcome.text


@pytest.mark.skipif(bool(pynn.backends.unavailable["sim"]), reason=f"sim: {pynn.backends.unavailable['sim']}")
class TestSchedules:
    """The library's kernels under every schedule."""

    @pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
    def test_same_bits_under_every_schedule(self, schedule):
        table, t = Schedule.cosine(20), torch.tensor([3, 19, 0])
        x, output = torch.randn(3, 2051), torch.randn(3, 2051)

        def run():
            jump = pynn.ops.forward_jump(x, t, table.forward_table, seed=5)
            step = pynn.ops.reverse_step(x, t, output, table.reverse_table("v", "fixed_small"), seed=6)
            loss = pynn.ops.diffusion_loss(output, x, t, table.loss_table("v"), seed=7)
            return jump, step, loss

        with pynn.backend("sim"):
            expected, before = run(), simulator.launches()
            with simulator.schedule(*schedule):
                got = run()
        assert simulator.launches() >= before + 3
        for name, a, b in zip(("jump", "step", "loss"), got, expected, strict=True):
            assert_bitwise(a, b, name)

    def test_bad_schedules_are_refused(self):
        for order, blocks in ((4, 1), (-1, 1), (0, 0), (0, 65)):
            with pytest.raises(ValueError, match="expected an order"), simulator.schedule(order, 0, blocks):
                pass
