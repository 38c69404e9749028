"""Who touched which byte: the race detector's record of one storage during one launch.

Every cell remembers its last writer and its last reader, each as a program number and that program's epoch. Programs
run one after another here, but at once on a GPU; so an access races with an earlier one of another program unless a
chain of atomics orders the two. A program's epoch grows with every release; `Clock.seen` holds, for each other
program, the last epoch that an acquire has made visible. (This is the FastTrack scheme: scalar clocks per cell, a
vector clock per program.)

A cell is as wide as the accesses made so far, and is split into bytes as soon as another width or alignment appears.
"""

from __future__ import annotations

import dataclasses

import numpy as np

SEVERAL = -1  # as a reader: more than one program, unordered among themselves


@dataclasses.dataclass
class Clock:
    """A program: its number (from 1), its epoch, what it has acquired (None: nothing yet), and whether its warps have
    stored anything since they last met at a barrier."""

    program: int
    epoch: int = 1
    seen: np.ndarray | None = None
    stored: bool = False

    def before(self, programs: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Which accesses, given by program and epoch, happened before now in every possible schedule."""
        own = (programs == 0) | (programs == self.program)
        if self.seen is None:
            return own
        return own | ((programs > 0) & (epochs <= self.seen[np.maximum(programs, 0)]))


@dataclasses.dataclass
class Conflict:
    """Where in the cells given (an index of their first dimension) a race is, and the access it is with."""

    position: int
    program: int
    kind: str


class Shadow:
    def __init__(self, base: int, size: int):
        self.base, self.size, self.width = base, size, 0

    def _allocate(self, width: int) -> None:
        self.width = width
        cells = -(-self.size // width)
        # writers of atomic accesses are stored negated
        self.writer, self.writer_epoch = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        self.reader, self.reader_epoch = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        self.lane = np.zeros(cells, np.int32)

    def _split_into_bytes(self) -> None:
        for name in ("writer", "writer_epoch", "reader", "reader_epoch", "lane"):
            setattr(self, name, np.repeat(getattr(self, name), self.width))
        self.width = 1

    def cells(self, lanes: np.ndarray | slice, size: int) -> np.ndarray | slice:
        """Cells of the lanes' bytes: a slice for a slice of addresses; (lanes, cells each) for one address per lane."""
        first_bytes = lanes.start if isinstance(lanes, slice) else lanes
        aligned = not np.any((first_bytes - self.base) % size)
        if self.width == 0:
            self._allocate(size if aligned else 1)
        if self.width != 1 and not (self.width == size and aligned):
            self._split_into_bytes()
        if isinstance(lanes, slice):
            return slice((lanes.start - self.base) // self.width, (lanes.stop - self.base) // self.width)
        first = (lanes - self.base) // self.width
        return first if self.width == size else first[:, None] + np.arange(size)

    def read(self, cells: np.ndarray | slice, clock: Clock, atomic: bool = False) -> Conflict | None:
        """Records a read by the running program; returns the write it races with, if any."""
        conflict = self._unordered_write(cells, clock, atomic)
        if conflict is None and not atomic:
            readers = self.reader[cells]
            ordered = clock.before(readers, self.reader_epoch[cells])
            self.reader[cells] = np.where(ordered, clock.program, SEVERAL)
            self.reader_epoch[cells] = clock.epoch
        return conflict

    def write(self, cells: np.ndarray | slice, clock: Clock, atomic: bool = False) -> Conflict | None:
        """Records a write by the running program; returns the access it races with, if any."""
        conflict = self._unordered_write(cells, clock, atomic) or self._unordered_read(cells, clock)
        if conflict is None:
            self.writer[cells] = -clock.program if atomic else clock.program
            self.writer_epoch[cells] = clock.epoch
        return conflict

    def first_duplicate(self, cells: np.ndarray | slice) -> int | None:
        """The first lane of a store whose cells another lane of the same store also writes."""
        if isinstance(cells, slice):
            return None
        lanes = np.arange(cells.shape[0], dtype=np.int32)
        lanes = lanes.reshape(-1, *[1] * (cells.ndim - 1))
        self.lane[cells] = lanes  # the last one wins; the others then find a number that is not theirs
        lost = self.lane[cells] != lanes
        return int(np.nonzero(lost)[0][0]) if lost.any() else None

    def _unordered_write(self, cells: np.ndarray | slice, clock: Clock, atomic: bool) -> Conflict | None:
        writers = self.writer[cells]
        ordered = clock.before(np.abs(writers), self.writer_epoch[cells])
        if atomic:
            ordered |= writers < 0
        return self._conflict(cells, ordered, writers, "writes")

    def _unordered_read(self, cells: np.ndarray | slice, clock: Clock) -> Conflict | None:
        readers = self.reader[cells]
        return self._conflict(cells, clock.before(readers, self.reader_epoch[cells]), readers, "reads")

    def _conflict(self, cells, ordered: np.ndarray, programs: np.ndarray, verb: str) -> Conflict | None:
        if ordered.all():
            return None
        index = np.nonzero(~ordered)
        program = int(programs[index][0])
        if verb == "reads" and program == SEVERAL:
            kind = "several other programs read"
        else:
            kind = f"{{other}} {'updates atomically' if verb == 'writes' and program < 0 else verb}"
        return Conflict(int(index[0][0]), abs(program), kind)
