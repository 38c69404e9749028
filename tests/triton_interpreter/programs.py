"""Runs a kernel over its grid: typed arguments, program order, errors that say where, the language patched once."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
import traceback
from collections.abc import Iterator

import numpy as np
import triton.language as tl
from triton.backends.nvidia.compiler import CUDAOptions
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from . import hints
from .cooperative import Index, Team
from .errors import KernelError, KernelFailed, Undefined
from .launch import Launch
from .settings import settings

LAUNCH_OPTIONS = {field.name for field in dataclasses.fields(CUDAOptions)}
GRID_LIMITS = (2**31 - 1, 65535, 65535)
# Triton's own Python code asks `if mask` to mean "was a mask given"; only kernels ask for a value
LANGUAGE_INTERNALS = ("triton.language.core", "triton.language.semantic")


def program_order(grid: Index) -> list[Index]:
    """All program indices, x fastest, in the order that the settings ask for."""
    order = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    if settings.program_order == "reverse":
        order.reverse()
    elif settings.program_order == "shuffled":
        random.Random(settings.seed).shuffle(order)
    return order


def _tensor_as_bool(tensor: tl.tensor) -> bool:
    frame = inspect.currentframe()
    caller = frame.f_back.f_globals.get("__name__") if frame and frame.f_back else None
    if caller in LANGUAGE_INTERNALS:
        return True
    if tensor.handle.data.size != 1:
        raise Undefined(
            f"a block of shape {tuple(tensor.shape)} was used as a condition: `if`, `while`, `and`, `or` and `not` "
            "take scalars; use tl.where, &, | and ~ on blocks"
        )
    return bool(tensor.handle.data.item())


_patch_depth = 0
_replacements: list[tuple[object, str, object]] = []  # owner, name, what executes instead; the same at every launch


def _collect_replacements() -> None:
    builder, scope = interpreter.interpreter_builder, interpreter._LangPatchScope()
    for module in (tl, tl.core):
        interpreter._patch_builtin(module, builder, scope)
        interpreter._patch_lang_core(module, scope)
        for name, replacement in hints.REPLACEMENTS.items():
            scope.set_attr(module, name, replacement)
    for owner in (tl.tensor, tl.math, tl.core.tensor_descriptor_base):
        interpreter._patch_builtin(owner, builder, scope)
    interpreter._patch_lang_tensor(tl.tensor, scope)
    scope.set_attr(tl.tensor, "__bool__", _tensor_as_bool)
    scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    _replacements.extend((owner, name, vars(owner)[name]) for owner, name, _ in scope._changes)
    scope.restore()


@contextlib.contextmanager
def patched_language() -> Iterator[None]:
    """Within, triton.language executes instead of tracing. (Plain Triton does this at every device call.)"""
    global _patch_depth
    if not _replacements:
        _collect_replacements()
    scope = interpreter._LangPatchScope()
    for owner, name, replacement in _replacements:
        scope.set_attr(owner, name, replacement)
    _patch_depth += 1
    try:
        yield
    finally:
        _patch_depth -= 1
        scope.restore()


def call_device_function(self: InterpretedFunction, *args, **kwargs) -> object:
    """Replaces InterpretedFunction.__call__: one @triton.jit function calls another."""
    if _patch_depth:
        return self.rewrite()(*args, **kwargs)
    with patched_language():  # called from the host, tl.cdiv(a, b) say
        return self.rewrite()(*args, **kwargs)


def _place(kernel: str, index: Index | None, error: BaseException) -> str:
    """Kernel, program, and the line of its source: that of the innermost frame outside Triton and this package."""
    if index is None:
        return f"{kernel}, converting its arguments"
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("triton", "numpy") and module.rpartition(".")[0] != __package__:
            return f"{kernel}, program {index}, line {line} of {frame.f_code.co_filename.rsplit('/', 1)[-1]}"
    return f"{kernel}, program {index}"


class CheckedGridExecutor(interpreter.GridExecutor):
    def __call__(self, *args, **kwargs) -> None:
        """Runs every program of the grid on CPU tensors. Raises KernelError; memory may then be half written."""
        name = self.fn.__name__
        if unknown := sorted(kwargs.keys() - set(self.arg_names) - LAUNCH_OPTIONS):
            raise TypeError(f"{name}: unknown keyword arguments {unknown}; its arguments are {self.arg_names}")
        cooperative = kwargs.get("launch_cooperative_grid", False)
        kwargs = {key: value for key, value in kwargs.items() if key in self.arg_names}
        for hook in self.pre_run_hooks:
            hook(*args, **kwargs)
        bound = inspect.getcallargs(self.fn, *args, **kwargs)
        grid = self._grid_sizes(name, bound)
        builder = interpreter.interpreter_builder
        if builder.launch is not None:
            raise KernelError(f"{name}: launched while {builder.launch.kernel} is running")
        launch = builder.launch = Launch(name, grid)
        team: Team | None = None
        index: Index | None = None

        def enter(program: Index) -> None:
            builder.set_grid_idx(*program)
            launch.begin(program)

        try:
            # overflow to infinity, 0 / 0 and log(-1) are ordinary results in a kernel, and wanted ones in tests
            with patched_language(), np.errstate(all="ignore"):
                values = {key: self._argument(launch, key, value) for key, value in bound.items()}
                builder.set_grid_dim(*grid)
                order = program_order(grid)
                if cooperative and order:
                    launch.team = team = Team(launch, order, enter, lambda: self.fn(**values))
                    team.run()
                else:
                    for index in order:
                        enter(index)
                        self.fn(**values)
        except KernelError as error:
            index = team.running if team else index
            error.error_message = f"{_place(name, index, error)}: {error.error_message}"
            error.args = (error.error_message,)
            raise
        except Exception as error:
            index = team.running if team else index
            raise KernelFailed(f"{_place(name, index, error)}: {error!r}") from error
        finally:
            builder.launch = None

    def _argument(self, launch: Launch, name: str, value: object) -> object:
        if name in self.constexprs:
            return value
        return launch.convert(name, value, interpreter.interpreter_semantic.make_tensor_descriptor)

    def _grid_sizes(self, name: str, bound: dict[str, object]) -> tuple[int, int, int]:
        given = tuple(self.grid(bound) if callable(self.grid) else self.grid)
        if not 1 <= len(given) <= 3:
            raise ValueError(f"{name}: a grid has 1 to 3 dimensions, got {given}")
        x, y, z = (*(int(size) for size in given), 1, 1)[:3]
        grid = (x, y, z)
        for axis, (size, limit) in enumerate(zip(grid, GRID_LIMITS, strict=True)):
            if not 0 <= size <= limit:
                raise ValueError(f"{name}: grid dimension {axis} must be 0 to {limit}, got {size}")
        return grid
