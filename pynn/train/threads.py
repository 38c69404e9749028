"""Choosing the number of CPU threads while the work runs.

On a machine of one's own all cores are best; on a shared one a thread that has to wait for a core holds up all others,
and one thread alone can be ten times faster. pynn's kernels give the same bits with any number of threads, PyTorch's
not always, so a run that is to be repeated bit for bit fixes the number instead.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


class ThreadTuner:
    """Times a few steps with 1, 2, 4, ... threads now and then, and stays with the fastest number.

    Args:
        most: largest number of threads to try.
        every: steps from one trial to the next.
        tries: steps timed with each number; their median counts.
        clock: the time in seconds.
    """

    def __init__(self, most: int, *, every: int = 200, tries: int = 5, clock: Callable[[], float] = time.perf_counter):
        self.candidates = sorted({1 << i for i in range(most.bit_length()) if 1 << i <= most} | {most})
        self.tries = tries
        self.every = max(every, 2 * tries * len(self.candidates))
        self.clock = clock
        self._seconds: dict[int, list[float]] = {}
        self._step = 0
        self._running: int | None = None  # the number of threads under trial in the step that runs now
        self._start = 0.0

    def tick(self) -> None:
        """Call before every step: ends the step before, sets the number of threads of the next."""
        now = self.clock()
        if self._running is not None:
            self._seconds.setdefault(self._running, []).append(now - self._start)
        position, self._start = self._step % self.every, now
        trial, self._step = position // self.tries, self._step + 1
        if trial < len(self.candidates):
            self._running = self.candidates[trial]
            torch.set_num_threads(self._running)
        elif self._running is not None:
            torch.set_num_threads(min(self._seconds, key=lambda count: statistics.median(self._seconds[count])))
            self._running, self._seconds = None, {}
