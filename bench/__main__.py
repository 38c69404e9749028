"""python -m bench [op ...] [--quick] [--threads 1,2] [--save]"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

import bench
from bench import harness

MODULES = sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if m.name not in ("harness", "plot", "__main__"))


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected positive thread counts, got {text}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=bench.__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"which benchmarks: {', '.join(MODULES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer cases, a fraction of a second each")
    parser.add_argument("--threads", type=_counts, default=[1], help="intra-op threads, one count or several: 1,2")
    parser.add_argument("--save", action="store_true", help="append the rows to bench/results/<device>.csv")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.ops) - set(MODULES))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(MODULES)}")
    budget_s = 0.1 if arguments.quick else 1.0
    rows = []
    for name in arguments.ops or MODULES:
        for case in importlib.import_module(f"bench.{name}").cases(quick=arguments.quick):
            for threads in arguments.threads:
                rows += harness.run(case, threads=threads, budget_s=budget_s)
    harness.report(rows)
    if arguments.save:
        print(f"saved to {harness.save(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
