"""make gpu: everything that needs a GPU, in one command and less than eight minutes.

    python -m gpu_check [--out DIRECTORY] [--only PART ...]        (PYTHONPATH=.:tests)

Needs a CUDA build of torch, Triton, pytest with xdist, hypothesis; installs nothing. The kernel libraries are those in
pynn/lib, or built here when they do not load. Logs go to build/gpu-logs; with --out, all of them in one file there,
beside the table and the benchmark rows. The exit status is 0 when no part failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_check import runner
from gpu_check.plugin import OUT_OF_TIME
from gpu_check.runner import FAILED, NOT_AVAILABLE, OK, TIMED_OUT, UNAVAILABLE, Part

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
CHOICES = ROOT / "pynn" / "choices"
TOTAL_S = 460.0
BACKENDS = ("cuda", "triton")
# The tests of a backend, as pytest's -k selects them; with the first one's, those that want a GPU whatever the backend.
TESTS = {"cuda": "cuda or on_a_gpu", "triton": "triton"}
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Only what kernels do counts: torch probes the driver for calls that it may lack, and pynn checks its own launches.
SANITIZER_OPTIONS = ["--report-api-errors", "no", "--target-processes", "application-only", "--launch-timeout", "0"]
# Files about running kernels without a GPU, and this one's own test.
NOT_FOR_A_GPU = ("test_aot", "test_gpu_check", "test_sim", "test_triton_interpreter")
PROBE_GPU = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


def judge_primitives(status: int, log: str) -> tuple[str, str]:
    """Exit status 77 means that the program saw no GPU; torch did, so that is a failure here."""
    verdict, detail = runner.by_status(status, log)
    return (FAILED, detail) if status == NOT_AVAILABLE else (verdict, detail)


def judge_pytest(status: int, log: str) -> tuple[str, str]:
    """The exit status; but tests that were all skipped have shown nothing, and some may have had no time left."""
    verdict, detail = runner.by_status(status, log)
    if verdict == OK and not re.search(r"\d+ passed", detail):
        return FAILED, f"nothing ran: {detail}"
    late = re.search(rf"(\d+) Skipped: {OUT_OF_TIME}", log)
    if late:
        return TIMED_OUT if verdict == OK else verdict, f"{detail}, {late[1]} {OUT_OF_TIME}"
    return verdict, detail


def judge_sanitizer(status: int, log: str) -> tuple[str, str]:
    """Every summary that compute-sanitizer printed must be empty, and there must be one."""
    if "Device not supported" in log:
        return UNAVAILABLE, "compute-sanitizer does not support this machine"
    found = [int(n) for n in re.findall(r"(?:ERROR SUMMARY: (?=\d+ error)|RACECHECK SUMMARY: )(\d+)", log)]
    first = next(
        (line.strip("= ") for line in log.splitlines() if line.startswith("=========") and "Invalid" in line), ""
    )
    if status != 0 or not found or any(found):
        return FAILED, first or runner.last_line(log)
    return OK, next((line for line in log.splitlines() if "comparisons agree" in line), runner.last_line(log))


def parts_of(out: Path | str, tables: Path | str) -> list[Part]:
    """The parts in order; a part's reserve is what it needs when nothing goes wrong.

    Args:
        out: where benchmark rows go. tables: where the table of the fastest backends goes.
    """
    python = [sys.executable, "-m"]
    launches = [*python, "gpu_check.launches"]
    workers = str(min(14, os.cpu_count() or 1))
    pytest = [*python, "pytest", "-q", "-p", "gpu_check.plugin", "--time-limit", "{most}", "-n", workers]
    if importlib.util.find_spec("pytest_timeout"):  # for a kernel that never ends: the worker does, and another begins
        pytest += ["--timeout", "75", "--timeout-method", "thread"]
    ignored = [f"--ignore=tests/{name}.py" for name in (*NOT_FOR_A_GPU, "test_cuda_graphs")]
    single = {"OMP_NUM_THREADS": "1"}
    tests = {"judge": judge_pytest, "environment": single}
    slowest_first = reversed(BACKENDS)  # Triton compiles
    parts = [
        Part("libraries", [*python, "gpu_check.libraries"], 240, 15),
        Part("info", [*python, "pynn.info"], 40, 10),
        Part("primitives", ["build/primitives_check"], 30, 10, judge=judge_primitives),
        Part("self-check", [*launches, "--poison", "--workers", workers, *slowest_first], 150, 75, environment=single),
        Part("cuda graphs", [*pytest, "tests/test_cuda_graphs.py"], 90, 30, **tests),
        *(
            Part(f"tests {name}", [*pytest, "-k", which, *ignored, "tests"], 120, 50, **tests)
            for name, which in TESTS.items()
        ),
    ]
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    for name in SANITIZERS:
        watch = [tool or "", "--tool", name, *SANITIZER_OPTIONS, "--error-exitcode", "9"]
        every = "1" if name == "memcheck" else "4"  # the others take longer by far
        command = [*watch, *launches, "--every", every, *BACKENDS]
        if tool is None:
            command = ["sh", "-c", f"echo compute-sanitizer is not installed; exit {NOT_AVAILABLE}"]
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **single}  # every tensor its own allocation
        judge = judge_sanitizer if tool else None
        parts.append(Part(name, command, 60, 12, judge=judge, environment=uncached))
    bench = [*python, "bench", "--device", "cuda", "--save", "--out", str(out), "--time-limit", "{seconds}"]
    choose = [*python, "bench.choose", "--device", "cuda", "--time-limit", "{seconds}", "--out", str(tables)]
    return [*parts, Part("benchmarks", bench, 240, 90), Part("choices", choose, 150, 40)]


def missing_gpu() -> str:
    """'' or why there is no GPU to run on."""
    try:
        probe = subprocess.run(
            [sys.executable, "-c", PROBE_GPU], capture_output=True, text=True, timeout=180, check=False
        )
    except subprocess.TimeoutExpired:
        return "torch did not answer within 180 s"
    if probe.returncode != 0:
        return f"torch does not work here: {runner.last_line(probe.stderr)}"
    name = runner.last_line(probe.stdout)
    if not probe.stdout.strip():
        return "torch sees no GPU"
    print(f"GPU: {name}", flush=True)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"where results go (default {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts only")
    options = parser.parse_args()
    out = (options.out or RESULTS).absolute()
    parts = parts_of(out, out if options.out else CHOICES)
    unknown = sorted(set(options.only or []) - {part.name for part in parts})
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(part.name for part in parts)}")
    parts = [part for part in parts if not options.only or part.name in options.only]
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    outcomes = runner.run_parts(
        parts,
        total_s=TOTAL_S,
        logs=ROOT / "build" / "gpu-logs",
        combined_log=out / "gpu-logs.txt" if options.out else None,
        missing_gpu=missing_gpu(),
    )
    table = runner.table(outcomes)
    if options.out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu-table.txt").write_text(table + "\n")
    print("\n" + table)
    return runner.exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
