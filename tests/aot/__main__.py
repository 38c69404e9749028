"""Command line of the package, see __init__.py."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import built_cuda, ratchet
from .built_cuda import ROOT
from .jobs import Halves, compile_all, jobs_of

RATCHET = Path(__file__).with_name("ratchet.json")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m aot", description=__doc__)
    parser.add_argument("--accept", action="store_true", help="write worse, better and new values to ratchet.json")
    parser.add_argument("--every", type=int, default=1, help="compile one in so many Triton cases (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    if arguments.accept and arguments.every != 1:
        parser.error("--accept wants all cases, not one in several")
    if arguments.accept and built_cuda.ARCHITECTURES != built_cuda.ALL_ARCHITECTURES:
        parser.error(f"--accept wants all architectures: {' '.join(built_cuda.ALL_ARCHITECTURES)}")
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/aot"))

    nvcc = built_cuda.find_nvcc()
    if nvcc is None:
        print("CUDA C++ is skipped: no nvcc in CUDA_HOME, on the search path or in /usr/local/cuda")
    halves, promises = compile_all(jobs_of(nvcc, arguments.every), arguments.jobs)
    accepted, accepted_versions = ratchet.read(RATCHET)
    verdict = ratchet.Verdict()
    for half, (rows, versions) in halves.items():
        known = ratchet.part(accepted, half)
        if half == "triton" and arguments.every != 1:
            known = {name: row for name, row in known.items() if name in rows}
        if half == "cuda":
            built = tuple(f" | cuda sm_{architecture}" for architecture in built_cuda.ARCHITECTURES)
            known = {name: row for name, row in known.items() if name.endswith(built)}
        verdict += ratchet.compare(rows, known, promises, versions, accepted_versions)
    return report(verdict, halves, arguments.accept)


def report(verdict: ratchet.Verdict, halves: Halves, accept: bool) -> int:
    """Prints the verdict, writes accepted values; the exit status."""
    for title, lines in (("broken", verdict.broken), ("worse", verdict.worse), ("note", verdict.notes)):
        for line in lines:
            print(f"{title}: {line}")
    total = sum(len(rows) for rows, _ in halves.values())
    summary = f"{total} kernels, {len(verdict.broken)} broken, {len(verdict.worse)} worse, {len(verdict.notes)} notes"
    if verdict.broken:
        print(f"{summary}: broken kernels are never accepted")
        return 1
    if accept:
        rows, versions = ratchet.read(RATCHET)
        for half, (new_rows, new_versions) in halves.items():
            rows = {name: row for name, row in rows.items() if name not in ratchet.part(rows, half)} | new_rows
            versions |= new_versions
        ratchet.write(RATCHET, rows, versions)
        print(f"{summary}: accepted, review the diff of {RATCHET.relative_to(ROOT)}")
        return 0
    if verdict.worse:
        print(f"{summary}: make aot ACCEPT=1 accepts them; say why in the commit")
        return 1
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
