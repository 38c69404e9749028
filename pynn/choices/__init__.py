"""Which backend is the fastest for a call, from measurements: `python -m bench.choose` writes <architecture>.csv here.

A row is one measured call: op, dtype, a category (what must be equal for two calls to be alike: kernel size, stride,
layout, ...), sizes (numbers such as channels, pixels and the side of a map), the fastest backend and how much faster it
is than the default one. A call takes the backend of the nearest row of its category whose sizes are all within a factor
of two of its own; without one, the default backend runs.
"""

from __future__ import annotations

import csv
import functools
import math
from pathlib import Path
from typing import NamedTuple

DIRECTORY = Path(__file__).parent
REACH = 1.0  # how far a row may lie from a call in any of its sizes, as a power of two


class Case(NamedTuple):
    """What the choice depends on, beside op and dtype."""

    category: str
    sizes: tuple[int, ...]


class Row(NamedTuple):
    """One line of a table; sizes are separated by spaces."""

    op: str
    dtype: str
    category: str
    sizes: str
    backend: str
    ratio: float


Table = dict[tuple[str, str, str], list[tuple[tuple[float, ...], str]]]


def write(rows: list[Row], architecture: str, directory: Path = DIRECTORY) -> Path:
    """Replaces the table of an architecture."""
    path = directory / f"{architecture}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(sorted(rows))
    return path


def rows(architecture: str, directory: Path = DIRECTORY) -> list[Row]:
    """The table of an architecture as it is written; empty when nothing was measured."""
    path = directory / f"{architecture}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        _, *lines = csv.reader(file)
    return [
        Row(op, dtype, category, sizes, backend, float(ratio)) for op, dtype, category, sizes, backend, ratio in lines
    ]


def read(architecture: str, directory: Path = DIRECTORY) -> Table:
    """(op, dtype, category) -> [(log2 of the sizes, backend)]; empty when nothing was measured."""
    table: Table = {}
    for row in rows(architecture, directory):
        sizes = _logarithms(int(size) for size in row.sizes.split())
        table.setdefault((row.op, row.dtype, row.category), []).append((sizes, row.backend))
    return table


@functools.cache
def _table(architecture: str) -> Table:
    return read(architecture)


def _logarithms(sizes) -> tuple[float, ...]:
    return tuple(math.log2(max(size, 1)) for size in sizes)


def nearest(table: Table, op: str, dtype: str, case: Case) -> str | None:
    """The backend of the nearest row, or None where no row is near enough."""
    sizes = _logarithms(case.sizes)
    found, least = None, math.inf
    for other, backend in table.get((op, dtype, case.category), ()):
        distances = [abs(a - b) for a, b in zip(sizes, other, strict=True)]
        if max(distances) <= REACH and sum(distances) < least:
            found, least = backend, sum(distances)
    return found


@functools.lru_cache(maxsize=4096)
def fastest(architecture: str, op: str, dtype: str, case: Case) -> str | None:
    """The backend measured to be the fastest for a call like this one, or None."""
    return nearest(_table(architecture), op, dtype, case)
