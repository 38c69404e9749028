"""The runner behind `make gpu`, with made-up parts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest
import torch
from gpu_check import __main__ as gpu_main
from gpu_check import launches, runner
from gpu_check.runner import FAILED, NO_GPU, OK, OUT_OF_TIME, TIMED_OUT, UNAVAILABLE, Part


def script(name, code, *, limit_s=20.0, **options):
    return Part(name, [sys.executable, "-S", "-c", code], limit_s, **options)


def run(tmp_path, *parts, total_s=60.0, **options):
    return runner.run_parts(parts, total_s=total_s, logs=tmp_path / "logs", **options)


def test_every_way_to_end(tmp_path):
    parts = [
        script("good", "print('3 kernels agree')"),
        script("bad", "print('kernel 2 differs'); raise SystemExit(3)"),
        script("crash", "import os; print('before', flush=True); os.abort()"),
        Part("missing", ["/nonexistent/program"], 5.0),
        script("elsewhere", "print('no such tool'); raise SystemExit(77)"),
        script("after all", "print('still runs')"),
    ]
    outcomes = run(tmp_path, *parts)
    assert [o.verdict for o in outcomes] == [OK, FAILED, FAILED, FAILED, UNAVAILABLE, OK]
    details = [o.detail for o in outcomes]
    assert details[0] == "3 kernels agree"
    assert details[1] == "kernel 2 differs"
    assert details[2].startswith("killed by SIGABRT")
    assert "could not start /nonexistent/program" in details[3]
    assert (tmp_path / "logs" / "after-all.log").read_text() == "still runs\n"


def test_a_part_that_hangs_is_stopped_with_its_children(tmp_path):
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
    start = time.monotonic()
    hung, after = run(tmp_path, script("hangs", code, limit_s=1.5), script("after", "print('fine')"))
    assert time.monotonic() - start < 15
    assert (hung.verdict, after.verdict) == (TIMED_OUT, OK)
    assert hung.detail.startswith("stopped after 2 s in: ") or hung.detail.startswith("stopped after 1 s in: ")
    child = int((tmp_path / "logs" / "hangs.log").read_text())
    for _ in range(100):  # the orphan is reaped by init, a moment later
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{child}/stat") as stat:
            if stat.read().split()[2] == "Z":
                return
        time.sleep(0.05)
    pytest.fail("the child of a stopped part is still running")


def test_a_part_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_S", 0.5)
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    (outcome,) = run(tmp_path, script("deaf", code, limit_s=1.0))
    assert outcome.verdict == TIMED_OUT
    assert outcome.seconds < 10


def test_the_total_is_kept_and_later_parts_have_their_reserve(tmp_path):
    slow = script("slow", "import time; time.sleep(60)")
    outcomes = run(tmp_path, slow, script("reserved", "print('ran')", reserve_s=8.0), total_s=10.0)
    assert [o.verdict for o in outcomes] == [TIMED_OUT, OK]
    assert outcomes[0].seconds < 8
    outcomes = run(tmp_path, slow, script("too late", "print('ran')"), total_s=1.0)
    assert [o.verdict for o in outcomes] == [TIMED_OUT, OUT_OF_TIME]
    assert runner.exit_code(outcomes[1:]) == 1


def test_a_judge_that_fails_is_a_failed_part(tmp_path):
    def judge(status, log):
        raise KeyError("summary")

    outcomes = run(tmp_path, script("odd", "print('?')", judge=judge), script("after", "print('fine')"))
    assert [o.verdict for o in outcomes] == [FAILED, OK]
    assert "KeyError" in outcomes[0].detail


def test_table_exit_code_and_combined_log(tmp_path):
    combined = tmp_path / "out" / "gpu-logs.txt"
    parts = script("good", "print('fine')"), script("bad", "print('x' * 3_000_000); raise SystemExit(1)")
    outcomes = run(tmp_path, *parts, combined_log=combined)
    assert runner.exit_code(outcomes) == 1
    assert runner.exit_code(outcomes[:1]) == 0
    assert runner.exit_code([]) == 1
    lines = runner.table(outcomes).splitlines()
    assert lines[0].split() == ["part", "verdict", "s", "detail"]
    assert lines[1].split()[:2] == ["good", "ok"]
    assert all(len(line) < 150 for line in lines)
    text = combined.read_text()
    assert "##### good: ok" in text
    assert "##### bad: FAILED" in text
    assert len(text) < runner.LOG_LIMIT + 1000


def test_without_a_gpu_nothing_is_started(tmp_path):
    outcomes = run(tmp_path, script("good", "raise SystemExit(1)"), missing_gpu="torch sees no GPU")
    assert [(o.verdict, o.detail) for o in outcomes] == [(NO_GPU, "torch sees no GPU")]
    assert runner.exit_code(outcomes) == 1
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("status", "log", "verdict", "detail"),
    [
        (0, "....\n==== 12 passed, 3 skipped in 4.5s ====\n", OK, "12 passed, 3 skipped in 4.5s"),
        (1, "F\n==== 1 failed, 12 passed in 4.5s ====\n", FAILED, "1 failed, 12 passed in 4.5s"),
        (0, "s\n==== 3 skipped in 4.5s ====\n", FAILED, "nothing ran: 3 skipped in 4.5s"),
        (5, "==== no tests ran in 0.1s ====\n", FAILED, "no tests ran in 0.1s"),
        (
            0,
            "    30 Skipped: out of time\n==== 12 passed, 30 skipped in 90s ====\n",
            TIMED_OUT,
            "12 passed, 30 skipped in 90s, 30 out of time",
        ),
        (
            1,
            "    30 Skipped: out of time\n==== 1 failed, 12 passed, 30 skipped in 90s ====\n",
            FAILED,
            "1 failed, 12 passed, 30 skipped in 90s, 30 out of time",
        ),
    ],
)
def test_pytest_judge(status, log, verdict, detail):
    assert gpu_main.judge_pytest(status, log) == (verdict, detail)


@pytest.mark.parametrize(
    ("status", "log", "verdict"),
    [
        (0, "7 comparisons agree\n========= ERROR SUMMARY: 0 errors\n", OK),
        (9, "========= Invalid __global__ read of size 16 bytes\n========= ERROR SUMMARY: 3 errors\n", FAILED),
        (0, "========= ERROR SUMMARY: 1 error\n", FAILED),
        (0, "no summary at all\n", FAILED),
        (1, "========= Error: Device not supported. Please refer to the documentation\n", UNAVAILABLE),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", OK),
        (9, "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", FAILED),
    ],
)
def test_sanitizer_judge(status, log, verdict):
    assert gpu_main.judge_sanitizer(status, log)[0] == verdict


def test_the_parts_fit_their_time():
    parts = gpu_main.parts_of("/tmp/out", "/tmp/out")
    assert sum(part.reserve_s for part in parts) <= gpu_main.TOTAL_S <= 480
    assert all(part.reserve_s <= part.limit_s for part in parts)
    assert len({part.name for part in parts}) == len(parts)


def test_launches_compare_backends(capsys, monkeypatch):
    assert launches.main(["cpu"]) == 0
    assert "comparisons agree on cpu" in capsys.readouterr().out
    planted = launches.Case("normal", lambda device, dtype: {"y": torch.rand(3)})
    monkeypatch.setattr(launches, "CASES", {"planted": planted})
    assert launches.main(["cpu"]) == 1
    assert "cpu: planted torch.float64, y: " in capsys.readouterr().out
    broken = launches.Case("normal", lambda device, dtype: {}["y"])
    monkeypatch.setattr(launches, "CASES", {"broken": broken})
    assert launches.main(["cpu"]) == 1
    assert "KeyError" in capsys.readouterr().out
    assert launches.main(["elsewhere"]) == 1
    assert "elsewhere: no kernels (no such backend)" in capsys.readouterr().out


@pytest.fixture
def paths(monkeypatch):
    """Processes find the packages of this directory, as those of `make gpu` do."""
    monkeypatch.setenv("PYTHONPATH", f"{gpu_main.ROOT}{os.pathsep}{gpu_main.ROOT / 'tests'}")


def test_launches_in_processes(paths, capsys):
    name = next(iter(launches.CASES))
    assert launches.main(["--workers", "2", "--only", name, "cpu"]) == 0
    assert re.search(r"all \d+ comparisons agree on cpu", capsys.readouterr().out)
    assert launches.main(["--workers", "2", "--only", name, "elsewhere"]) == 1
    assert "elsewhere: no kernels (no such backend)" in capsys.readouterr().out
    assert launches.run_process("elsewhere", name, []) == ([f"elsewhere: {name}, ended with status 1"], 1)


TESTS = """
import os, time
import pytest

@pytest.mark.parametrize("number", range(12))
def test_some(number):
    assert number != 7
    if number == 5:
        os._exit(1)
    time.sleep(0.2 if SLOW else 0)
"""


def run_tests(tmp_path, slow, *options):
    (tmp_path / "test_made_up.py").write_text(f"SLOW = {slow}\n{TESTS}")
    options = ["-q", "-p", "gpu_check.plugin", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *options]
    command = [sys.executable, "-m", "pytest", *options, "-c", os.devnull, str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_pytest_goes_on_after_a_crash_and_prints_failures_at_once(paths, tmp_path):
    said = run_tests(tmp_path, False, "-n", "1")
    assert "2 failed, 10 passed" in said
    assert said.index("assert 7 != 7") < said.index("= FAILURES =")


def test_pytest_ends_in_time(paths, tmp_path):
    said = run_tests(tmp_path, True, "--time-limit", "1e-9", "-n", "1")
    assert "12 skipped" in said


def test_tests_that_want_a_gpu_are_selected():
    wanting = r"skipif\(not torch\.cuda\.is_available\(\).*\n(?:@.*\n)*def (\w+)"
    names = [
        name for file in (gpu_main.ROOT / "tests").glob("test_*.py") for name in re.findall(wanting, file.read_text())
    ]
    assert names
    assert all("on_a_gpu" in name for name in names)
