"""Choosing the number of CPU threads while the work runs.

On a machine of one's own all cores are best; on a shared one a thread that has to wait for a core holds up all others,
and one thread alone can be ten times faster. pynn's kernels give the same bits with any number of threads, PyTorch's
not always, so a run that is to be repeated bit for bit fixes the number instead.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch


class ThreadTuner:
    """Times a few steps with 1, 2, 4, ... threads now and then, and stays with the fastest number.

    Args:
        most: largest number of threads to try.
        every: steps between two trials.
        tries: steps timed with each number; their median counts. A trial ends early with a number so slow that neither
            it nor a larger one can win.
        clock: the time in seconds.
    """

    def __init__(self, most: int, *, every: int = 300, tries: int = 5, clock: Callable[[], float] = time.perf_counter):
        self.candidates = sorted({1 << i for i in range(most.bit_length()) if 1 << i <= most} | {most})
        self.every = every
        self.tries = tries
        self.clock = clock
        self._seconds: dict[int, list[float]] = {}
        self._trial: list[int] = []  # numbers still to be timed, the one of the running step first
        self._rest = 0  # steps until the next trial
        self._start = 0.0

    def tick(self) -> None:
        """Call before every step: ends the step before, sets the number of threads of the next."""
        now = self.clock()
        if self._trial:
            self._record(now - self._start)
        elif self._rest == 0:
            self._trial = list(self.candidates)
            self._seconds = {}
        else:
            self._rest -= 1
        if self._trial:
            torch.set_num_threads(self._trial[0])
        self._start = now

    def _record(self, seconds: float) -> None:
        best = min(map(statistics.median, self._seconds.values()), default=math.inf)
        times = self._seconds.setdefault(self._trial[0], [])
        times.append(seconds)
        if seconds > 3 * best:
            self._trial.clear()
        elif len(times) == self.tries:
            self._trial.pop(0)
        if not self._trial:
            torch.set_num_threads(min(self._seconds, key=lambda count: statistics.median(self._seconds[count])))
            self._rest = self.every - 1
