"""The hardened Triton interpreter proves itself: numbers, correct kernels, and planted bugs that it must find.

The interpreter can only be switched on before triton is imported, so the checks run in child processes with
TRITON_INTERPRET=1. Their files are tests/triton_interpreter/selftest/check_*.py; run one by hand with
    TRITON_INTERPRET=1 python -m pytest --noconftest tests/triton_interpreter/selftest/check_numbers.py
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

TESTS = pathlib.Path(__file__).parent
SELFTEST = TESTS / "triton_interpreter" / "selftest"


def run_checks(*names: str, **environment: str) -> str:
    """Runs check files in a child process; fails with the child's report unless every check in them passed."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_"))}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "--tb=short", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, *(str(SELFTEST / name) for name in names)],
        cwd=TESTS.parent,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if result.returncode:
        pytest.fail(f"{', '.join(names)} failed:\n{result.stdout[-8000:]}\n{result.stderr[-2000:]}", pytrace=False)
    return result.stdout


def test_numbers_functions_kernels_and_machinery():
    run_checks("check_numbers.py", "check_functions.py", "check_kernels.py", "check_machinery.py", TRITON_INTERPRET="1")


def test_cooperative_launches():
    run_checks("check_cooperative.py", TRITON_INTERPRET="1")


def test_planted_bugs_are_found():
    run_checks("check_planted_bugs.py", TRITON_INTERPRET="1")


def test_the_plain_interpreter_misses_them():
    run_checks("check_planted_bugs.py", TRITON_INTERPRET="1", PLAIN_INTERPRETER="1")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels itself")
def test_install_explains_a_process_that_was_started_wrongly(monkeypatch):
    import triton_interpreter

    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1 is not set; it must be set before triton is imported"):
        triton_interpreter.install()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=r"is set now, but was not set before triton is imported"):
        triton_interpreter.install()
