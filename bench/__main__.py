"""python -m bench [op ...] [--device cuda] [--quick] [--threads 1,2] [--save]"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

import bench
from bench import harness

NOT_AN_OP = ("harness", "choose", "__main__")
MODULES = sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if m.name not in NOT_AN_OP and m.name[0] != "_")


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected positive thread counts, got {text}")
    return counts


def _cases(names: list[str], device: str, quick: bool) -> Iterator[harness.Case]:
    torch.manual_seed(0)  # a wrong result is wrong on every run
    for name in names:
        module = importlib.import_module(f"bench.{name}")
        if device == "cpu":
            yield from module.cases(quick=quick)
        elif hasattr(module, "gpu_cases"):
            yield from module.gpu_cases(quick=quick)
        else:
            print(f"bench.{name} has no cases for a GPU")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=bench.__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"which benchmarks: {', '.join(MODULES)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases, a fraction of a second each")
    parser.add_argument("--threads", type=_counts, default=[1], help="intra-op CPU threads, one count or several: 1,2")
    parser.add_argument("--save", action="store_true", help="append the rows to <device>.csv, case by case")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of <device>.csv")
    parser.add_argument("--time-limit", type=float, metavar="S", help="start no case in the last sixth of this time")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - set(MODULES))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(MODULES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    budget_s = 0.1 if options.quick else 1.0 if options.device == "cpu" else 0.3
    threads = options.threads if options.device == "cpu" else [1]
    stop = time.monotonic() + 5 / 6 * options.time_limit if options.time_limit else float("inf")
    rows: list[harness.Row] = []
    measured = wrong = left_out = 0
    for case in _cases(options.ops or MODULES, options.device, options.quick):
        if time.monotonic() > stop:
            left_out += 1
            continue
        try:
            new = [row for count in threads for row in harness.run(case, threads=count, budget_s=budget_s)]
        except Exception:  # a wrong result of one case does not hide those of the others
            print(f"FAILED: {case.op} {case.shape} {case.dtype} {case.mode}\n{traceback.format_exc()}")
            wrong += 1
            continue
        measured += 1
        rows += new
        if options.save:
            harness.save(new, options.out)
    harness.report(rows)
    summary = [f"{measured} cases measured"]
    summary += [f"rows in {options.out}"] if options.save and rows else []
    summary += [f"{left_out} left out (time limit)"] if left_out else []
    summary += [f"{wrong} FAILED"] if wrong else []
    print(", ".join(summary))
    return int(wrong > 0 or not measured)


if __name__ == "__main__":
    sys.exit(main())
