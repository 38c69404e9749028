"""Cooperative launches: programs that wait for each other, each in a thread of its own, of which one runs at a time.

A program looks at what others may change by an atomic or a volatile load. Forward and in reverse it runs until it looks
a second time at unchanged memory, and so waits; then the next one runs, as far ahead of the others as it can. Shuffled,
any program may follow at any look. Programs that look over and over at memory that nobody changes wait for ever: that
is an error, and so it is in an ordinary launch, whose programs have no one to wait for.
"""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import Deadlock
from .settings import settings
from .shadow import Clock

if TYPE_CHECKING:
    from .launch import Launch

LOOKS = 100  # at unchanged memory, after which a program is taken to wait

Index = tuple[int, int, int]


class _Abandoned(BaseException):
    """Ends the thread of a program once another one has failed."""


@dataclasses.dataclass
class Program:
    index: Index
    clock: Clock | None = None
    looks: int = 0  # since memory changed, or since it went on to something else
    baton: threading.Semaphore = dataclasses.field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None


class Team:
    """The programs of one cooperative launch.

    Args:
        order: of the programs; the first begins.
        enter: told the index of the program that is about to run.
        body: runs a program.
    """

    def __init__(self, launch: Launch, order: list[Index], enter: Callable[[Index], None], body: Callable[[], None]):
        if len(order) > settings.cooperative_programs:
            raise Deadlock(
                f"a cooperative launch of {len(order)} programs, of which {settings.cooperative_programs} run at once"
            )
        self._launch, self._enter, self._body = launch, enter, body
        self._programs = [Program(index) for index in order]
        self._running = self._programs[0]
        self._random = random.Random(settings.seed)
        self._failure: BaseException | None = None

    @property
    def running(self) -> Index:
        return self._running.index

    def run(self) -> None:
        """Runs all programs. Raises what the first one to fail raised; `running` is then that program."""
        for program in self._programs:
            program.thread = threading.Thread(target=self._run, args=(program,), daemon=True)
        threads = [program.thread for program in self._programs if program.thread]
        for thread in threads:
            thread.start()
        self._resume(self._running)
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def look(self, address: int) -> None:
        """The running program reads what another may change: others run first."""
        program = self._running
        program.looks += 1
        if all(other.looks > LOOKS for other in self._programs):
            where = ", ".join(str(other.index) for other in self._programs)
            raise Deadlock(f"all programs that have not ended wait, and none can go on: {where}")
        if program.looks > 1 or settings.program_order == "shuffled":
            self._hand_over(program)

    def changed(self) -> None:
        """The running program wrote to memory: what others wait for may have come."""
        for program in self._programs:
            program.looks = 0

    def _run(self, program: Program) -> None:
        program.baton.acquire()
        try:
            if self._failure is None:
                with np.errstate(all="ignore"):  # of this thread
                    self._body()
        except _Abandoned:
            return
        except BaseException as error:
            self._failure = error
        if self._failure is not None:
            for other in self._programs:
                other.baton.release()
            return
        place = self._programs.index(program)
        self._programs.remove(program)
        self.changed()
        if self._programs:
            shuffled = settings.program_order == "shuffled"
            self._resume(self._successor(program) if shuffled else self._programs[place % len(self._programs)])

    def _hand_over(self, program: Program) -> None:
        successor = self._successor(program)
        if successor is program:
            return
        program.clock = self._launch.clock
        self._resume(successor)
        program.baton.acquire()
        if self._failure is not None:
            raise _Abandoned

    def _successor(self, program: Program) -> Program:
        """Who runs next; `program` itself, maybe, in a shuffled order or if it is the last."""
        if settings.program_order == "shuffled":
            return self._random.choice(self._programs)
        return self._programs[(self._programs.index(program) + 1) % len(self._programs)]

    def _resume(self, program: Program) -> None:
        """To be followed by waiting: from here on `program` runs."""
        self._running = program
        self._enter(program.index)
        if program.clock is not None:
            self._launch.clock = program.clock
        program.baton.release()


class Alone:
    """A program of an ordinary launch, which may wait for nothing."""

    def __init__(self) -> None:
        self._looks, self._address = 0, 0

    def look(self, address: int) -> None:
        self._looks = self._looks + 1 if address == self._address else 1
        self._address = address
        if self._looks > 10 * LOOKS:
            raise Deadlock(
                "the program waits for another one; only the programs of a cooperative launch "
                "(launch_cooperative_grid=True) are sure to run at once"
            )

    def changed(self) -> None:
        self._looks = 0
