"""Every planted bug is found by the hardened interpreter, and the plain one is silent where the table says so.

PLAIN_INTERPRETER=1 runs the second half: the same launches without the hardening.
"""

import os

import pytest
from triton.runtime.errors import InterpreterError

import triton_interpreter
from triton_interpreter.selftest.planted_bugs import BUGS

PLAIN = os.environ.get("PLAIN_INTERPRETER") == "1"
if not PLAIN:
    triton_interpreter.install()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug(bug):
    if not PLAIN:
        with pytest.raises(getattr(triton_interpreter, bug.error), match=f"(?s){bug.message}"):
            bug.launch()
    elif bug.plain_misses:
        bug.launch()
    else:
        with pytest.raises((InterpreterError, RuntimeError)):
            bug.launch()
