"""Comparing measurements with the committed ones: nothing may get worse unnoticed.

A row is one kernel on one target. A run fails on a spill, a kernel that breaks a promise (16-byte loads and stores,
nothing left to fuse), a row that is missing, and any value that is worse than in ratchet.json. All but the first two
are accepted with `make aot ACCEPT=1`, and then show up in the diff that is reviewed. Better and new values are
reported, and written by the same command.

The numbers belong to the compilers that made them. With other versions only spills and promises are judged.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from .measure import Measurement

FEWER_IS_BETTER = ("registers", "spill_bytes", "stack_bytes", "shared_bytes", "loads", "stores", "fma", "fusable")
MORE_IS_BETTER = ("loads128", "stores128", "mma", "wgmma", "tcgen05", "mfma", "tma", "cp_async")

Rows = dict[str, Measurement]  # "kernel case | target" -> measurement


@dataclasses.dataclass(frozen=True)
class Promise:
    """What a kernel must keep whatever the ratchet says."""

    wide_loads: bool = False  # of 16 bytes
    wide_stores: bool = False
    exact: bool = False  # nothing that an assembler may fuse
    contains: tuple[str, ...] = ()  # instructions, by the names that measure.py counts them under


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of a Triton op, and what the kernels that it launches promise."""

    label: str
    run: Callable[[], object]
    promise: Promise
    only_for: tuple[str, ...] = ()  # the targets that the kernels are for; () for all


@dataclasses.dataclass
class Result:
    """Rows of one job, the promises of their kernels, and the compilers that made them."""

    rows: Rows
    promises: dict[str, Promise]
    versions: dict[str, str]


@dataclasses.dataclass
class Verdict:
    """Lines to print, by weight. broken: never accepted. worse: accepted with ACCEPT=1. notes: fine."""

    broken: list[str] = dataclasses.field(default_factory=list)
    worse: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(self.broken + other.broken, self.worse + other.worse, self.notes + other.notes)


def broken_promises(name: str, row: Measurement, promise: Promise) -> list[str]:
    """What is wrong with one kernel whatever it was before."""
    found = []
    if row.get("spill_bytes", 0):
        found.append(f"{name}: {row['spill_bytes']} bytes of registers are spilled, expected 0")
    if promise.exact and row.get("fusable", 0):
        found.append(f"{name}: {row['fusable']} products or sums may be fused, expected 0: the bits would differ")
    for what, promised in (("loads", promise.wide_loads), ("stores", promise.wide_stores)):
        if promised and not row[f"{what}128"]:
            found.append(f"{name}: none of its {row[what]} global {what} has 16 bytes, expected wide ones")
    found += [f"{name}: contains no {what}, expected some" for what in promise.contains if not row.get(what, 0)]
    return found


def compare(
    rows: Rows,
    accepted: Rows,
    promises: dict[str, Promise],
    versions: dict[str, str],
    accepted_versions: dict[str, str],
) -> Verdict:
    """Judges the rows of a run against the accepted ones.

    Args:
        rows, accepted: kernel and target -> measurement, now and in ratchet.json.
        promises: of the kernels that have any, by the same names.
        versions, accepted_versions: compiler -> version, now and when the rows were accepted.
    """
    verdict = Verdict()
    for name in sorted(rows):
        verdict.broken += broken_promises(name, rows[name], promises.get(name, Promise()))
    verdict.worse += [f"{name}: is gone" for name in sorted(accepted.keys() - rows.keys())]
    new: dict[str, list[str]] = {}
    for name in sorted(rows.keys() - accepted.keys()):
        kernel, _, target = name.rpartition(" | ")
        new.setdefault(kernel, []).append(target)
    verdict.notes += [f"{kernel}: new for {', '.join(targets)}" for kernel, targets in new.items()]
    changed = [
        f"{tool} {accepted_versions.get(tool)} -> {version}"
        for tool, version in versions.items()
        if version != accepted_versions.get(tool)
    ]
    if changed and accepted:
        verdict.notes.append(f"other compilers ({', '.join(changed)}): only spills and promises are judged")
        return verdict
    for name in sorted(rows.keys() & accepted.keys()):
        worse, better = _differences(accepted[name], rows[name])
        if worse:
            verdict.worse.append(f"{name}: {', '.join(worse)}")
        if better:
            verdict.notes.append(f"{name}: better: {', '.join(better)}")
    return verdict


def _differences(old: Measurement, new: Measurement) -> tuple[list[str], list[str]]:
    worse: list[str] = []
    better: list[str] = []
    for value in (*FEWER_IS_BETTER, *MORE_IS_BETTER):
        before, now = old.get(value, 0), new.get(value, 0)
        if before == now:
            continue
        is_worse = (now > before) == (value in FEWER_IS_BETTER)
        (worse if is_worse else better).append(f"{value} {before} -> {now}")
    return worse, better


def part(rows: Rows, half: str) -> Rows:
    """The rows of one half, "triton" or "cuda": the first word behind the bar."""
    return {name: row for name, row in rows.items() if name.rpartition(" | ")[2].startswith(half)}


def read(path: Path) -> tuple[Rows, dict[str, str]]:
    """Rows and compiler versions of ratchet.json; empty when there is no file yet."""
    if not path.exists():
        return {}, {}
    content = json.loads(path.read_text())
    return content["rows"], content["versions"]


def write(path: Path, rows: Rows, versions: dict[str, str]) -> None:
    """One line per row, sorted, so that diffs are small."""
    lines = [f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items())]
    text = ",\n".join(lines)
    path.write_text(
        f'{{\n  "versions": {json.dumps(dict(sorted(versions.items())))},\n  "rows": {{\n{text}\n  }}\n}}\n'
    )
