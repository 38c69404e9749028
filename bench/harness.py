"""One harness for every benchmark: numerics first, then interleaved timing, one row per provider.

A case holds one callable per provider ("pynn", "torch", ...). Each round runs every provider once, in a rotating order,
so that drift of a shared machine hits all of them alike; medians and ratios of medians are what to read.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import pynn
from pynn.info import versions

RESULTS = Path(__file__).parent / "results"
BASELINE = "torch"  # the fastest provider whose name starts so
MIN_ROUND_S = 2e-4  # a round repeats a fast callable until it takes this long


@dataclasses.dataclass
class Case:
    """One comparison.

    Args:
        op, shape, dtype, mode: what runs; mode is "forward", "backward" or "forward+backward".
        providers: name -> callable; at least one of torch, named "torch" or "torch <variant>".
        check: raises when the providers' results disagree; runs before anything is timed.
        bytes: memory traffic the op cannot avoid, for GB/s. flops: for GFLOP/s.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    providers: dict[str, Callable[[], object]]
    check: Callable[[], None]
    bytes: float = 0.0
    flops: float = 0.0


@dataclasses.dataclass
class Row:
    """One line of the results: times in microseconds, ratio = torch's best median / this median (above 1 is faster)."""

    op: str
    shape: str
    dtype: str
    mode: str
    provider: str
    threads: int
    p20_us: float
    p50_us: float
    p80_us: float
    ratio_to_torch: float
    gb_per_s: float
    gflop_per_s: float
    device: str
    instruction_set: str
    torch: str
    pynn: str
    git: str
    date: str


def _repeats(fn: Callable[[], object]) -> int:
    start = time.perf_counter()
    fn()
    return max(1, int(MIN_ROUND_S / max(time.perf_counter() - start, 1e-7)))


def interleaved(providers: dict[str, Callable[[], object]], budget_s: float) -> dict[str, list[float]]:
    """Seconds per call of each provider, measured in turn until the budget is spent (at least 5 rounds)."""
    for fn in providers.values():  # warm up: allocator, caches, packed weights
        fn()
        fn()
    repeats = {name: _repeats(fn) for name, fn in providers.items()}
    times: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    deadline, round_number = time.perf_counter() + budget_s, 0
    while round_number < 5 or time.perf_counter() < deadline:
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            fn, count = providers[name], repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                fn()
            times[name].append((time.perf_counter() - start) / count)
        round_number += 1
    return times


def device_name() -> str:
    """A file-name-safe name of the processor."""
    return "".join(c if c.isalnum() else "-" for c in versions()["CPU"].split(",")[0]).strip("-").lower()


def git_revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def run(case: Case, *, threads: int = 1, budget_s: float = 1.0) -> list[Row]:
    """Checks the case, times it, and returns a row per provider."""
    torch.set_num_threads(threads)
    case.check()
    times = interleaved(case.providers, budget_s)
    baseline = min(statistics.median(samples) for name, samples in times.items() if name.startswith(BASELINE))
    rows = []
    for name, samples in times.items():
        p20, p50, p80 = (statistics.quantiles(samples, n=10)[i] for i in (1, 4, 7))
        rows.append(
            Row(
                case.op,
                case.shape,
                case.dtype,
                case.mode,
                name,
                threads,
                *(round(1e6 * p, 2) for p in (p20, p50, p80)),
                round(baseline / p50, 3),
                round(case.bytes / p50 / 1e9, 2),
                round(case.flops / p50 / 1e9, 2),
                device_name(),
                pynn.backends.cpu_isa,
                torch.__version__,
                pynn.__version__,
                git_revision(),
                datetime.date.today().isoformat(),
            )
        )
    return rows


def report(rows: Iterable[Row]) -> None:
    """Prints rows as a table."""
    head = f"{'op':<30} {'shape':<26} {'dtype':<9} {'mode':<17} {'thr':>3}"
    print(f"{head} {'provider':<12} {'median us':>11} {'x torch':>8}")
    for r in rows:
        where = f"{r.op:<30} {r.shape:<26} {r.dtype:<9} {r.mode:<17} {r.threads:>3}"
        print(f"{where} {r.provider:<12} {r.p50_us:>11.1f} {r.ratio_to_torch:>8.2f}")


def save(rows: list[Row], path: Path | None = None) -> Path:
    """Appends rows to bench/results/<device>.csv."""
    path = path or RESULTS / f"{device_name()}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
    return path


def assert_agrees(got: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """The check most cases need: relative Frobenius error within a few roundings of the dtype."""
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    error = (got.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30)
    if not error <= limit:
        raise AssertionError(f"{what}: relative error {error:.2e} > {limit:.0e} on {platform.machine()}")
