"""python -m bench [op ...] [--quick] [--threads N] [--save]"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

import bench
from bench import harness

MODULES = sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if m.name not in ("harness", "plot", "__main__"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=bench.__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"which benchmarks: {', '.join(MODULES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer cases, a fraction of a second each")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads (default 1)")
    parser.add_argument("--save", action="store_true", help="append the rows to bench/results/<device>.csv")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.ops) - set(MODULES))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(MODULES)}")
    rows = []
    for name in arguments.ops or MODULES:
        for case in importlib.import_module(f"bench.{name}").cases(quick=arguments.quick):
            rows += harness.run(case, threads=arguments.threads, budget_s=0.1 if arguments.quick else 1.0)
    harness.report(rows)
    if arguments.save:
        print(f"saved to {harness.save(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
