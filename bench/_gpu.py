"""Timing on a GPU: events around each call, a cold L2 cache, graph replay for short ops, memory and bandwidth.

Everything here runs on the current CUDA device.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

import pynn

BACKENDS = ("cuda", "triton")
FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU so far
COPY_BYTES = 2 << 30
WARM_UP_CALLS = 3
MIN_ROUNDS, MAX_ROUNDS = 10, 300
# Ops that take less are also timed as a replayed graph: their events may hold the host's time, about 100 us for a call
# with a backward pass.
GRAPH_BELOW_S = 200e-6

Callables = dict[str, Callable[[], object]]


def backends_with(kernel: str) -> list[str]:
    """The GPU backends that have this kernel and can run; says which are left out, and why."""
    usable = []
    for name in BACKENDS:
        if reason := pynn.backends.why_not(kernel, name):
            print(f"provider pynn {name} is left out: {reason}")
        else:
            usable.append(name)
    return usable


def on(backend: str, fn: Callable, *args):
    """fn(*args) on one pynn backend."""
    with pynn.backend(backend):
        return fn(*args)


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.ones(FLUSH_BYTES // 4, device="cuda")


def flush_l2() -> None:
    """Fills the L2 cache with other data. By reading: written lines would have to be stored during the next op."""
    _flush_buffer().sum()


def interleaved(callables: Callables, budget_s: float) -> dict[str, list[float]]:
    """Seconds of GPU time per call of each callable, in turn and in rotating order, each with a cold L2 cache."""
    for fn in callables.values():
        for _ in range(WARM_UP_CALLS):
            fn()
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in callables}
    times: dict[str, list[float]] = {name: [] for name in callables}
    names = list(callables)
    deadline, round_number = time.perf_counter() + budget_s, 0
    while round_number < MIN_ROUNDS or (round_number < MAX_ROUNDS and time.perf_counter() < deadline):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            start, end = events[name]
            flush_l2()  # keeps the GPU busy while the host prepares the launch, so that no gap is timed
            start.record()
            callables[name]()
            end.record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) * 1e-3)
        round_number += 1
    return times


def captured(fn: Callable[[], object]) -> Callable[[], None]:
    """fn as a CUDA graph; the result replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def peak_bytes(fn: Callable[[], object]) -> int:
    """The most memory that one call holds at a time, its results included, its arguments not."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a large copy on this device; measured once per process."""
    free, _ = torch.cuda.mem_get_info()
    count = min(COPY_BYTES, free // 8) // 4
    source = torch.empty(count, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, budget_s=0.3)["copy"]
    return 2 * source.nbytes / statistics.median(times)


def device_name() -> str:
    return torch.cuda.get_device_name()


def architecture() -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def fits(byte_count: float) -> bool:
    """Whether this much memory is free."""
    return byte_count <= torch.cuda.mem_get_info()[0]
