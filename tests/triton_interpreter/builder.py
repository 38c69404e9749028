"""The builder that executes kernel operations: Triton's own, with every doubtful operation replaced or refused."""

from __future__ import annotations

import dataclasses
from typing import NoReturn

from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime.interpreter import InterpreterOptions

from .casts import CastOps
from .dot import SPLITS, DotOps
from .errors import NotFaithful
from .floats import FloatOps
from .integers import IntegerOps
from .launch import Launch
from .memory import MemoryOps


class CheckedBuilder(FloatOps, CastOps, IntegerOps, DotOps, MemoryOps):
    """`launch` is the launch in progress, or None."""

    launch: Launch | None = None

    def __init__(self) -> None:
        super().__init__()
        # integers wrap; Triton's overflow checks cost five operations per addition and report only in debug builds
        self.options = dataclasses.replace(
            InterpreterOptions(),
            sanitize_overflow=False,
            debug=True,  # tl.device_assert is checked
            allowed_dot_input_precisions=("tf32", "ieee", *(name.lower() for name in SPLITS)),
        )
        self.codegen_fns["min_dot_size"] = min_dot_size(None)  # the CUDA backend's lower bounds on tl.dot's shapes

    def create_inline_asm(self, *args, **kwargs) -> NoReturn:
        raise NotFaithful("inline assembly cannot be interpreted")

    def create_extern_elementwise(self, *args, **kwargs) -> NoReturn:
        raise NotFaithful("external device functions cannot be interpreted; libdevice.py lists those that can")

    def __getattr__(self, name: str):
        if name.startswith("create_"):
            raise NotFaithful(f"{name.removeprefix('create_')} is not available in the interpreter")
        raise AttributeError(name)
