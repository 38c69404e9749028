"""One harness for every benchmark: numerics first, then interleaved timing, one row per provider.

A case holds one callable per provider ("pynn", "torch", ...). Each round runs every provider once, in a rotating order,
so that drift of a shared machine hits all of them alike; medians and ratios of medians are what to read.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import functools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import pynn
from bench import _gpu
from pynn.info import versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
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
        device: "cpu" or "cuda", where the callables run.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    providers: dict[str, Callable[[], object]]
    check: Callable[[], None]
    bytes: float = 0.0
    flops: float = 0.0
    device: str = "cpu"


@dataclasses.dataclass
class Row:
    """One line of the results: times in microseconds, ratio = torch's best median / this median (above 1 is faster).

    threads is 0 on a GPU. timing is how the time was taken: "wall" on a CPU; on a GPU "events" around the eager call,
    or "graph", events around the replay of a CUDA graph of it. copy_fraction is gb_per_s over the bandwidth of a large
    copy on the same device in the same run. The last four columns are empty in rows written before they existed, the
    last three on a CPU too.
    """

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
    timing: str
    peak_mb: float | None
    copy_gb_per_s: float | None
    copy_fraction: float | None


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


@functools.cache
def device_name(device: str = "cpu") -> str:
    """A file-name-safe name of the processor."""
    name = _gpu.device_name() if device == "cuda" else versions()["CPU"].split(",")[0]
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower()


@functools.cache
def git_revision() -> str:
    """The commit of this tree; where git's data was left behind, what `make gpu-carry` noted in build/revision."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        found = ""
    noted = ROOT / "build" / "revision"
    return found or (noted.read_text().strip() if noted.exists() else "unknown")


def run(case: Case, *, threads: int = 1, budget_s: float = 1.0) -> list[Row]:
    """Checks the case, times it, and returns a row per provider; on a GPU a second one for ops that are short."""
    if case.device == "cuda":
        return _run_on_gpu(case, budget_s)
    torch.set_num_threads(threads)
    case.check()
    return _rows(case, interleaved(case.providers, budget_s), timing="wall", threads=threads)


def _run_on_gpu(case: Case, budget_s: float) -> list[Row]:
    case.check()
    times = _gpu.interleaved(case.providers, budget_s)
    peaks = {name: _gpu.peak_bytes(fn) for name, fn in case.providers.items()}
    rows = _rows(case, times, timing="events", peaks=peaks)
    if min(map(statistics.median, times.values())) >= _gpu.GRAPH_BELOW_S:
        return rows
    graphs = {}
    for name, fn in case.providers.items():
        try:
            graphs[name] = _gpu.captured(fn)
        except RuntimeError as error:  # the other providers' rows are still worth having
            print(f"{case.op} {case.shape} {case.mode}: {name} was not captured in a graph: {error}")
    if any(name.startswith(BASELINE) for name in graphs):
        rows += _rows(case, _gpu.interleaved(graphs, budget_s), timing="graph", peaks=peaks)
    return rows


def _rows(
    case: Case,
    times: dict[str, list[float]],
    *,
    timing: str,
    threads: int = 0,
    peaks: dict[str, int] | None = None,
) -> list[Row]:
    baseline = min(statistics.median(samples) for name, samples in times.items() if name.startswith(BASELINE))
    copy = _gpu.copy_bandwidth() if case.device == "cuda" else None
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
                device_name(case.device),
                _gpu.architecture() if case.device == "cuda" else pynn.backends.cpu_isa,
                torch.__version__,
                pynn.__version__,
                git_revision(),
                datetime.date.today().isoformat(),
                timing,
                round(peaks[name] / 1e6, 1) if peaks else None,
                round(copy / 1e9, 1) if copy else None,
                round(case.bytes / p50 / copy, 3) if copy else None,
            )
        )
    return rows


def report(rows: list[Row]) -> None:
    """Prints rows as a table: times faster than the best of torch's providers, and than the one called "torch"."""
    eager = {_timed_together(row): row.p50_us for row in rows if row.provider == BASELINE}
    head = f"{'op':<30} {'shape':<26} {'dtype':<9} {'mode':<17} {'thr':>3}"
    print(f"{head} {'provider':<16} {'timing':<7} {'median us':>11} {'x best':>7} {'x torch':>8} {'of copy':>8}")
    for r in rows:
        where = f"{r.op:<30} {r.shape:<26} {r.dtype:<9} {r.mode:<17} {r.threads:>3}"
        plain = eager.get(_timed_together(r))
        ratio = "" if plain is None else f"{plain / r.p50_us:.2f}"
        fraction = "" if r.copy_fraction is None else f"{r.copy_fraction:.2f}"
        numbers = f"{r.p50_us:>11.1f} {r.ratio_to_torch:>7.2f} {ratio:>8} {fraction:>8}"
        print(f"{where} {r.provider:<16} {r.timing:<7} {numbers}")


def _timed_together(row: Row) -> tuple:
    return row.op, row.shape, row.dtype, row.mode, row.threads, row.timing


def save(rows: list[Row], directory: Path = RESULTS) -> list[Path]:
    """Appends rows to <device>.csv in a directory; older rows that lack columns are kept with those empty."""
    names = [field.name for field in dataclasses.fields(Row)]
    paths = []
    directory.mkdir(parents=True, exist_ok=True)
    for device in dict.fromkeys(row.device for row in rows):
        path = directory / f"{device}.csv"
        old: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                old = list(reader)
                unknown = set(reader.fieldnames or []) - set(names)
            if unknown:
                raise ValueError(f"{path}: columns {sorted(unknown)} are not those of a benchmark row")
        with path.with_suffix(".new").open("w", newline="") as file:
            writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(old)
            writer.writerows(dataclasses.asdict(row) for row in rows if row.device == device)
        path.with_suffix(".new").replace(path)
        paths.append(path)
    return paths


def assert_agrees(
    got: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype, what: str, peer: torch.Tensor | None = None
) -> None:
    """The check most cases need: relative Frobenius error within a few roundings of the dtype.

    Args:
        peer: what torch computes in this dtype, for problems that magnify roundings (a norm within a recurrence) or may
            be left to torch: twice its own error is then allowed where that is more.
    """
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]

    def distance(value: torch.Tensor) -> float:
        return float((value.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30))

    error = distance(got)
    if peer is not None:
        limit = max(limit, 2 * distance(peer))
    if not error <= limit:
        raise AssertionError(f"{what}: relative error {error:.2e} > {limit:.1e} on {platform.machine()}")
