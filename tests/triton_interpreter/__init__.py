"""A hardened Triton interpreter: kernels run on CPU tensors, exactly and suspiciously. README.md says what is checked.

Set TRITON_INTERPRET=1 before triton is imported, and call install() before any module that holds kernels is imported.
"""

from __future__ import annotations

import os

import triton
from triton.runtime import autotuner, interpreter
from triton.runtime.interpreter import InterpretedFunction

from .errors import (
    ConfigMismatch,
    Deadlock,
    DuplicateStore,
    KernelError,
    KernelFailed,
    Misaligned,
    NotFaithful,
    OutOfBounds,
    PoisonStored,
    Race,
    Undefined,
)
from .settings import override, settings

__all__ = [
    "ConfigMismatch",
    "Deadlock",
    "DuplicateStore",
    "KernelError",
    "KernelFailed",
    "Misaligned",
    "NotFaithful",
    "OutOfBounds",
    "PoisonStored",
    "Race",
    "Undefined",
    "install",
    "override",
    "settings",
]

VERIFIED_VERSIONS = ("3.6.0", "3.7.1", "3.8.0")
ANY_VERSION_VARIABLE = "TRITON_INTERPRETER_ANY_VERSION"

_installed = False


def install(any_version: bool = False) -> None:
    """Hardens the interpreter of this process. Calling it again does nothing.

    Args:
        any_version: accept a Triton version on which this was never verified. Setting the environment variable
            TRITON_INTERPRETER_ANY_VERSION=1 does the same.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was not set before triton was imported, or the version is not a verified one.
    """
    global _installed
    if _installed:
        return
    if not isinstance(triton.language.standard._sum_combine, InterpretedFunction):
        state = "is set now, but was not" if os.environ.get("TRITON_INTERPRET") == "1" else "is not set; it must be"
        raise RuntimeError(
            f"TRITON_INTERPRET=1 {state} set before triton is imported: triton's own functions were already compiled "
            "for a GPU. Start the process with the variable."
        )
    if triton.__version__ not in VERIFIED_VERSIONS and not any_version and os.environ.get(ANY_VERSION_VARIABLE) != "1":
        raise RuntimeError(
            f"triton {triton.__version__}: this interpreter replaces private methods and is verified on "
            f"{', '.join(VERIFIED_VERSIONS)} only. Set {ANY_VERSION_VARIABLE}=1 to try, and run "
            "tests/test_triton_interpreter.py."
        )
    from . import speed

    speed.install()  # first: the modules below take what it replaces by name
    from . import autotune, builder, descriptors, libdevice, programs, reductions

    interpreter.InterpreterBuilder = builder.CheckedBuilder
    interpreter.interpreter_builder = builder.CheckedBuilder()
    interpreter.interpreter_semantic.builder = interpreter.interpreter_builder
    interpreter.GridExecutor = programs.CheckedGridExecutor
    InterpretedFunction.__call__ = programs.call_device_function
    interpreter.ReduceOps = reductions.PairwiseReduce
    interpreter.ScanOps = reductions.DoublingScan
    autotuner.Autotuner.run = autotune.run_configurations
    descriptors.install()
    libdevice.install()
    _installed = True
