"""Bad calls, run in a child process: each must raise a clear Python error; a crash or a hang is a failure.

A test module offers a function `bad_call(rng) -> (description, thunk)` that makes a random call which must fail, given
a random.Random. `assert_rejects("test_conv2d", count)` runs many of them in a child; this file is also its program.
"""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
from pathlib import Path

ALLOWED = (
    ValueError,
    TypeError,
    RuntimeError,
    IndexError,
    AssertionError,
)  # AssertionError: torch.nn raises it in places
TIMEOUT_S = 300


def assert_rejects(module: str, count: int = 500, *, function: str = "bad_call", seed: int = 0) -> None:
    """Runs `count` bad calls of a test module in a child process.

    Raises:
        AssertionError: a call was accepted, raised something unclear, or ended the child.
    """
    command = [sys.executable, __file__, module, function, str(count), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    child = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)
    lines = child.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert child.returncode == 0, (
        f"the child ended with {child.returncode} in: {lines[-1] if lines else '(start)'}\n{child.stderr[-3000:]}"
    )
    assert not wrong, f"{len(wrong)} of {count} bad calls were not rejected clearly:\n" + "\n".join(wrong[:10])
    tried = sum(line.startswith("try") for line in lines)
    assert tried == count, f"only {tried} of {count} bad calls ran"


def main(module: str, function: str, count: str, seed: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    make = getattr(importlib.import_module(module), function)
    rng = random.Random(int(seed))
    for i in range(int(count)):
        description, thunk = make(rng)
        print(f"try {i}: {description}", flush=True)
        try:
            thunk()
        except ALLOWED as error:
            if len(str(error)) < 10:
                print(f"WRONG {i}: {description}: unclear message {error!r}", flush=True)
        except Exception as error:
            print(f"WRONG {i}: {description}: raised {type(error).__name__}: {error}", flush=True)
        else:
            print(f"WRONG {i}: {description}: accepted", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
