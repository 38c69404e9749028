"""Which implementation of an op runs, and why.

`auto` (the default) runs the C++ kernels for CPU tensors and the CUDA C++ kernels for CUDA tensors. A backend can be
forced with `with pynn.backend(name):` or the environment variable PYNN_BACKEND; a forced backend that cannot run raises
with the reason. PYNN_CPU_ISA (baseline, avx2, avx512) forces the instruction set of the CPU kernels. Both variables are
read once, at import, and nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch

try:
    from . import _core  # type: ignore[attr-defined]
except ImportError:  # built without Python headers, or for another Python: everything still works
    _core = None  # type: ignore[assignment]

BACKENDS = ("auto", "cpu", "cuda")
CPU_ISAS = ("avx512", "avx2", "baseline")  # best first

_DIRECTORY = Path(__file__).parent / "lib"
_DEVICE_OF = {"cpu": "cpu", "cuda": "cuda"}


def _cpu_supports(isa: str) -> bool:
    if _core is not None:
        return _core.cpu_supports(isa)
    capability = torch.backends.cpu.get_cpu_capability()
    return isa == "baseline" or isa.upper() == capability or (isa == "avx2" and capability == "AVX512")


def _pick_cpu_isa() -> str:
    forced = os.environ.get("PYNN_CPU_ISA", "")
    if forced:
        if forced not in CPU_ISAS:
            raise ValueError(f"PYNN_CPU_ISA: expected one of {', '.join(CPU_ISAS)}, got {forced!r}")
        if not _cpu_supports(forced):
            raise RuntimeError(f"PYNN_CPU_ISA={forced}: this CPU does not have these instructions")
        return forced
    return next(
        isa for isa in CPU_ISAS if _cpu_supports(isa) and (isa == "baseline" or _library("cpu_" + isa).exists())
    )


def _library(name: str) -> Path:
    return _DIRECTORY / f"libpynn_{name}.so"


def _load(name: str) -> str:
    """Loads a kernel library; returns '' or the reason why it is not available."""
    path = _library(name)
    if not path.exists():
        return f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return str(error)
    return ""


cpu_isa = _pick_cpu_isa()
# Backend -> '' when its kernels are loaded, otherwise the reason why not.
unavailable = {"cpu": _load(f"cpu_{cpu_isa}"), "cuda": _load("cuda")}


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced = _checked(os.environ.get("PYNN_BACKEND", "auto") or "auto", "PYNN_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every pynn op inside the block on one backend.

    Args:
        name: "auto", "cpu" or "cuda".
    Raises:
        ValueError: no such backend.
        RuntimeError: from the op, when the backend cannot run it; the message has the reason.
    """
    global _forced
    before, _forced = _forced, _checked(name, "pynn.backend")
    try:
        yield
    finally:
        _forced = before


@dataclasses.dataclass(frozen=True)
class Call:
    """One kernel call seen by `explain`."""

    op: str
    backend: str
    kernel: str
    dtype: str
    shape: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.op:<40} {self.kernel:<12} {self.dtype:<9} {list(self.shape)!s:<22} {self.reason}"


_calls: list[Call] | None = None


@contextlib.contextmanager
def explain() -> Iterator[list[Call]]:
    """Records which kernel each pynn op ran inside the block, and why.

    Yields:
        A list of `Call`, filled as ops run; `print(*calls, sep="\\n")` shows it as a table.
    """
    global _calls
    before, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = before


def has_kernel(name: str, chosen: str) -> bool:
    """Whether a loaded library implements the dispatcher op `pynn::name` for this backend."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"pynn::{name}", chosen.upper())


def op(name: str, tensor: torch.Tensor):
    """The dispatcher op `pynn::name` for the backend that serves this tensor.

    Raises:
        RuntimeError: no kernel can run it; the message has the reason.
    """
    device = tensor.device.type
    if device in ("cpu", "cuda"):
        chosen = device if _forced == "auto" else _forced
        if _DEVICE_OF[chosen] != device:
            raise RuntimeError(f"pynn.{name}: backend {chosen!r} was forced but the tensor is on {device}")
        if unavailable[chosen]:
            raise RuntimeError(f"pynn.{name}: backend {chosen!r} is not available: {unavailable[chosen]}")
        if chosen == "cuda" and not has_kernel(name, chosen):
            raise RuntimeError(f"pynn.{name}: there is no CUDA kernel for this op yet; it runs on CPU tensors")
        if _calls is not None and not torch.compiler.is_compiling():
            _record(name, chosen, tensor)
    elif device != "meta":  # meta tensors run the shape rule of the op
        raise RuntimeError(f"pynn.{name}: expected a CPU or CUDA tensor, got one on {device}")
    return getattr(torch.ops.pynn, name).default


def _record(name: str, chosen: str, tensor: torch.Tensor) -> None:
    assert _calls is not None
    kernel = f"cpu/{cpu_isa}" if chosen == "cpu" else chosen
    reason = f"{tensor.device.type} tensor" if _forced == "auto" else "forced"
    _calls.append(Call(name, chosen, kernel, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), reason))
