"""results.csv: what was measured of every recipe, one row for each seed; `pynn train --record` writes it."""

from __future__ import annotations

import csv
import datetime
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch

PATH = Path(__file__).parent / "results.csv"


class Row(NamedTuple):
    """One run of a recipe with its own settings."""

    recipe: str
    seed: int
    metric: str
    value: float
    gate: str  # goal and limit
    met: str  # yes or no
    seconds: float  # of training
    ratio: str  # time of a training step, pynn / torch.nn; empty where there is no torch.nn model to compare with
    threads: int
    date: str
    cpu: str
    torch: str
    python: str


_NUMBERS = {"seed": int, "value": float, "seconds": float, "threads": int}


def read(path: Path | None = None) -> list[Row]:
    """The rows, by recipe and seed; empty when nothing was measured."""
    path = path or PATH
    if not path.exists():
        return []
    with path.open(newline="") as file:
        texts = list(csv.DictReader(file))
    rows = []
    for text in texts:
        numbers: dict[str, Any] = {name: kind(text[name]) for name, kind in _NUMBERS.items()}
        rows.append(Row(**{**text, **numbers}))
    return sorted(rows)


def record(row: Row, path: Path | None = None) -> None:
    """Adds a row, in the place of an older one of its recipe and seed."""
    path = path or PATH
    rows = [old for old in read(path) if (old.recipe, old.seed) != (row.recipe, row.seed)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(sorted([*rows, row]))


def today() -> str:
    """The date, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def device_name(device: str) -> str:
    """The model of the CPU or GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
