"""The parts of a run, each compiled in a process of its own."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import time
from pathlib import Path

from . import built_cuda, ratchet

TRITON_TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")  # targets.py describes them

Halves = dict[str, tuple[ratchet.Rows, dict[str, str]]]  # "triton" and "cuda" -> rows, versions


@dataclasses.dataclass(frozen=True)
class Job:
    """A part that one process compiles."""

    half: str  # "triton" or "cuda"
    target: str
    source: Path | None = None
    nvcc: str = ""
    every: int = 1  # so many Triton cases, one is compiled

    def __str__(self) -> str:
        return f"{self.source.name if self.source else 'Triton'} for {self.target}"


def run(job: Job):
    """In a process of its own: a compiled Triton kernel would be reused for the next target."""
    start = time.monotonic()
    if job.source:
        result = built_cuda.measure_for(job.source, job.target, job.nvcc)
    else:
        from . import compile_triton

        result = compile_triton.compile_for(job.target, job.every)
    return job, result, time.monotonic() - start


def jobs_of(nvcc: str | None, every: int) -> list[Job]:
    """The slowest first."""
    cuda = [
        Job("cuda", architecture, source, nvcc)
        for source in built_cuda.sources()
        for architecture in built_cuda.ARCHITECTURES
        if nvcc
    ]
    return [*(Job("triton", target, every=every) for target in TRITON_TARGETS), *cuda]


def compile_all(jobs: list[Job], processes: int) -> tuple[Halves, dict[str, ratchet.Promise]]:
    """Runs the jobs; returns what they measured and what the kernels promise."""
    halves: Halves = {}
    promises: dict[str, ratchet.Promise] = {}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn, max_tasks_per_child=1) as pool:
        for future in concurrent.futures.as_completed([pool.submit(run, job) for job in jobs]):
            job, result, seconds = future.result()
            print(f"{job!s:<32} {len(result.rows):4} kernels {seconds:6.1f} s", flush=True)
            rows, versions = halves.setdefault(job.half, ({}, {}))
            rows.update(result.rows)
            versions.update(result.versions)
            promises.update(result.promises)
    return halves, promises
