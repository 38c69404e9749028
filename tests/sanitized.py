"""make test-sanitized: the CUDA sources under sanitizers, on the CPU.

1. self-tests   csrc/sim/selftest's correct kernels under ASan + UBSan and under TSan
2. launchers    every launcher of every op, without torch: under ASan + UBSan in three schedules, under TSan (a race
                detector for CUDA), and for coverage: at least 95 % of the lines of every kernel file
3. pytest       the op tests on a libpynn_sim.so built with ASan + UBSan, which sees past the ends of torch's tensors

An op takes part with csrc/sim/selftest/launchers_<op>.cpp. Prints a table; exit status 1 when a part failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import simulator
from simulator import ROOT, SELFTEST

DIRECTORY = ROOT / "build/sanitized"
OPS = sorted(path.stem.removeprefix("launchers_") for path in SELFTEST.glob("launchers_*.cpp"))
LEAST_COVERAGE = 95.0  # percent of lines
# Not kernels: what they are launched with, and wrappers that the self-tests cover.
NOT_COVERED_HERE = ("launch.h", "primitives.cuh")
# torch.compile and opcheck start compilers and processes of their own, and test dispatch, not kernels; gradcheck and
# the comparisons bit for bit launch many times what other tests launch once; the longest rows of attention (1100, 579
# and 300 keys) are many tiles of what shorter ones have a few of.
DESELECTED = " and not ".join(("[sim", "transforms", "opcheck", "gradcheck", "bitwise", "1100", "579", "300"))


def library_path(name: str) -> str:
    """A shared library of the compiler, to be loaded before everything else."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def launchers(variant: str) -> Path:
    sources = [SELFTEST / "launchers.cpp", *(SELFTEST / f"launchers_{op}.cpp" for op in OPS)]
    return simulator.program(DIRECTORY, "launchers", [*sources, *(ROOT / f"csrc/cuda/{op}.cu" for op in OPS)], variant)


def check_self_tests(variant: str) -> str:
    path = simulator.program(DIRECTORY, "self_test", [SELFTEST / "self_test.cpp"], variant)
    for schedule in (("0", "0", "1"), ("2", "3", "2")):
        outcome = simulator.run([path, "correct", *schedule])
        if outcome.status != 0:
            raise RuntimeError(outcome.text)
    return "two schedules"


def check_launchers(variant: str, *arguments: str) -> str:
    outcome = simulator.run([launchers(variant), *arguments], timeout=2400)  # minutes where something else runs too
    if outcome.status != 0:
        raise RuntimeError(outcome.text)
    return outcome.text.strip()


def check_coverage() -> str:
    path = launchers("gcov")
    for old in DIRECTORY.glob("*.gcda"):
        old.unlink()
    outcome = simulator.run([path, "once"], timeout=600)
    if outcome.status != 0:
        raise RuntimeError(outcome.text)
    verdicts, uncovered = [], []
    for file, counts in sorted(_line_counts().items()):
        missed = sorted(line for line, count in counts.items() if count == 0)
        percent = 100 * (1 - len(missed) / len(counts))
        verdicts.append(f"{file.name} {percent:.1f} %")
        source = (ROOT / file).read_text().splitlines()
        if percent < LEAST_COVERAGE:
            uncovered += [f"{file}:{line}: {source[line - 1]}" for line in missed]
    if uncovered:
        raise RuntimeError(f"{', '.join(verdicts)}; lines that no launch reached:\n" + "\n".join(uncovered))
    return "lines of " + ", ".join(verdicts)


def _line_counts() -> dict[Path, dict[int, int]]:
    """Executions of each line of each kernel file, over all instances of a template."""
    counts: dict[Path, dict[int, int]] = {}
    for op in OPS:
        counters = DIRECTORY / simulator.object_name(ROOT / f"csrc/cuda/{op}.cu", "gcov")
        command = ["gcov", "--json-format", "--stdout", str(counters.with_suffix(".gcda"))]
        result = subprocess.run(command, cwd=DIRECTORY, capture_output=True, text=True, check=True)
        for file in json.loads(result.stdout)["files"]:
            path = Path(os.path.normpath(ROOT / file["file"]))
            if path.parent != ROOT / "csrc/cuda" or path.name in NOT_COVERED_HERE:
                continue
            lines = counts.setdefault(path.relative_to(ROOT), {})
            for line in file["lines"]:
                number = line["line_number"]
                lines[number] = max(lines.get(number, 0), line["count"])
    return counts


def check_pytest(every: int) -> str:
    sources = [*(ROOT / f"csrc/ops/{op}.cpp" for op in OPS), *(ROOT / f"csrc/cuda/{op}.cu" for op in OPS)]
    library = simulator.torch_library(DIRECTORY, "pynn_sim", sources, "asan")
    environment = {
        **os.environ,
        "PYNN_SIM_LIBRARY": str(library),
        "LD_PRELOAD": f"{library_path('libasan.so')}:{library_path('libubsan.so')}",
        # torch and Python never free some of their memory.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    tests = [*(f"tests/test_{op}.py" for op in OPS), "tests/test_attention_weights.py"]
    # --capture=sys: a report that ends the process goes to stderr itself.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys", f"--every={every}", "-k", DESELECTED]
    command += tests
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0 or " passed" not in result.stdout:
        raise RuntimeError(result.stdout[-10000:] + result.stderr[-10000:])
    return result.stdout.strip().splitlines()[-1].strip("= ")


PARTS: dict[str, Callable[[argparse.Namespace], str]] = {
    "tests, ASan + UBSan": lambda options: check_pytest(options.every),  # the longest first
    "launchers, TSan": lambda _: check_launchers("tsan", "once"),
    "self-tests, TSan": lambda _: check_self_tests("tsan"),
    "self-tests, ASan + UBSan": lambda _: check_self_tests("asan"),
    "launchers, ASan + UBSan": lambda _: check_launchers("asan"),
    "launchers, coverage": lambda _: check_coverage(),
}


def run_part(part: str, options: argparse.Namespace) -> tuple[bool, float, str]:
    start = time.monotonic()
    try:
        detail, passed = PARTS[part](options), True
    except (RuntimeError, subprocess.SubprocessError) as error:
        detail, passed = str(error), False
    return passed, time.monotonic() - start, detail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="one in so many variants of each test (default: all)")
    options = parser.parse_args()
    simulator.runtime_objects(DIRECTORY)
    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = dict(zip(PARTS, pool.map(lambda part: run_part(part, options), PARTS), strict=True))
    for part, (passed, _, detail) in results.items():
        if not passed:
            print(f"--- {part} failed\n{detail}\n")
    for part, (passed, seconds, detail) in results.items():
        print(f"{part:<26} {'ok' if passed else 'FAILED':<7} {seconds:5.0f} s  {detail if passed else ''}")
    return 0 if all(passed for passed, _, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
