"""What `--every N` leaves of the tests, and of any other names."""

import subprocess
import sys
from collections import Counter

import sample
import simulator


def test_about_one_in_n_and_always_the_same():
    names = [f"test_op[{dtype}-{i}]" for i in range(1000) for dtype in ("float32", "float16", "bfloat16", "float64")]
    kept = [name for name in names if sample.chosen(name, 4)]
    assert 900 < len(kept) < 1100
    assert kept == [name for name in names if sample.chosen(name, 4)]
    assert min(Counter(name[8:15] for name in kept).values()) > 200  # of every dtype
    assert [name for name in names if sample.chosen(name, 1)] == names


def test_every_function_keeps_a_variant():
    def collected(*options):
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *options, "tests/test_group_norm.py"]
        run = subprocess.run(command, cwd=simulator.ROOT, capture_output=True, text=True, check=True)
        lines = [line for line in run.stdout.splitlines() if "::" in line]
        return lines, {line.partition("[")[0] for line in lines}

    everything, functions = collected()
    kept, kept_functions = collected("--every", "40")
    assert kept_functions == functions
    assert len(kept) < len(functions) + len(everything) / 20
