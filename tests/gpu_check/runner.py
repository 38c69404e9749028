"""Runs parts one after another: each in its own process, with its own time limit and log; none can stop the next.

A part's process answers with its exit status: 0 passed, 77 cannot run here (its last line says why), anything else
failed. A part may read its own log to say more (`Part.judge`).
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

NOT_AVAILABLE = 77  # exit status of a process that cannot run here
LOG_LIMIT = 1_000_000  # bytes of one part's log that are kept in the combined log
GRACE_S = 5.0  # from SIGTERM to SIGKILL

OK, FAILED, TIMED_OUT, UNAVAILABLE, OUT_OF_TIME, NO_GPU = (
    "ok",
    "FAILED",
    "TIMED OUT",
    "not available",
    "out of time",
    "no GPU",
)
PASSING = (OK, UNAVAILABLE)  # a part that was to run and did not is no pass

Judge = Callable[[int, str], tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Part:
    """One check.

    Args:
        name: names the log file too.
        command: program and arguments; runs in the current directory. "{seconds}" becomes the time it has, "{most}" the
            part of it after which nothing new should begin.
        limit_s: it is stopped after this long.
        reserve_s: time kept free for it: earlier parts are stopped before they eat into it.
        judge: (exit status, log) -> (verdict, one line); by default the exit status and the last line of the log.
        environment: added to this process's.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    reserve_s: float = 0.0
    judge: Judge | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    part: str
    verdict: str
    seconds: float
    detail: str


def last_line(log: str) -> str:
    """The last line with words in it, without the rules that pytest and compute-sanitizer draw around it."""
    lines = [line.strip(" =\t") for line in log.splitlines()]
    return next((line for line in reversed(lines) if line), "no output")


def by_status(status: int, log: str) -> tuple[str, str]:
    """The default judge."""
    verdict = {0: OK, NOT_AVAILABLE: UNAVAILABLE}.get(status, FAILED)
    detail = last_line(log)
    return verdict, detail if status >= 0 else f"killed by {signal.Signals(-status).name}: {detail}"


def _stop(process: subprocess.Popen) -> None:
    """Ends the process and what it started (it leads its own process group)."""
    for sign, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run_part(part: Part, limit_s: float, log_path: Path) -> Outcome:
    """Runs one part for at most limit_s and reads its verdict."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log_path.open("wb") as log:
        try:
            process = subprocess.Popen(
                [
                    argument.replace("{seconds}", f"{limit_s:.0f}").replace("{most}", f"{0.75 * limit_s:.0f}")
                    for argument in part.command
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(part.name, FAILED, 0.0, f"could not start {part.command[0]}: {error.strerror}")
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _stop(process)  # also what a part that ended by itself left running
    seconds = time.monotonic() - start
    text = log_path.read_text(errors="replace")
    if status is None:
        return Outcome(part.name, TIMED_OUT, seconds, f"stopped after {limit_s:.0f} s in: {last_line(text)}")
    try:
        verdict, detail = (part.judge or by_status)(status, text)
    except Exception as error:  # a log that the judge does not understand must not stop the other parts
        verdict, detail = FAILED, f"unreadable result ({type(error).__name__}: {error})"
    return Outcome(part.name, verdict, seconds, detail)


def run_parts(
    parts: Sequence[Part],
    *,
    total_s: float,
    logs: Path,
    combined_log: Path | None = None,
    missing_gpu: str = "",
) -> list[Outcome]:
    """Runs every part in order within total_s.

    Args:
        logs: directory of the parts' logs, <name>.log.
        combined_log: all of them again in one file, written as parts end.
        missing_gpu: why there is no GPU; no part is started then.
    """
    deadline = time.monotonic() + total_s
    outcomes = []
    for index, part in enumerate(parts):
        reserved = sum(later.reserve_s for later in parts[index + 1 :])
        limit_s = min(part.limit_s, deadline - time.monotonic() - reserved)
        log_path = logs / f"{part.name.replace(' ', '-')}.log"
        if missing_gpu:
            outcome = Outcome(part.name, NO_GPU, 0.0, missing_gpu)
        elif limit_s <= 0:
            outcome = Outcome(part.name, OUT_OF_TIME, 0.0, f"the {total_s:.0f} s for all parts are used up")
        else:
            print(f"::: {part.name} (at most {limit_s:.0f} s, log in {log_path})", flush=True)
            outcome = run_part(part, limit_s, log_path)
            if outcome.verdict not in PASSING:
                print("\n".join(log_path.read_text(errors="replace").splitlines()[-25:]), flush=True)
            if combined_log is not None:
                _append(combined_log, log_path, outcome)
        outcomes.append(outcome)
    return outcomes


def _append(combined: Path, log_path: Path, outcome: Outcome) -> None:
    combined.parent.mkdir(parents=True, exist_ok=True)
    text = log_path.read_bytes()
    with combined.open("ab") as file:
        file.write(f"\n##### {outcome.part}: {outcome.verdict}, {outcome.seconds:.1f} s\n".encode())
        if len(text) > LOG_LIMIT:
            file.write(f"[the first {len(text) - LOG_LIMIT} bytes are left out]\n".encode())
        file.write(text[-LOG_LIMIT:])


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per part."""
    width = max([len(outcome.part) for outcome in outcomes] + [4])
    lines = [f"{'part':<{width}}  {'verdict':<13} {'s':>6}  detail"]
    lines += [f"{o.part:<{width}}  {o.verdict:<13} {o.seconds:>6.1f}  {o.detail[:110]}" for o in outcomes]
    return "\n".join(lines)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 when every part passed or is not available on this machine, otherwise 1."""
    return int(not outcomes or any(outcome.verdict not in PASSING for outcome in outcomes))
