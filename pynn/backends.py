"""Which implementation of an op runs, and why.

    cpu        C++ kernels on CPU tensors, built for three instruction sets
    cuda       CUDA C++ kernels on CUDA tensors
    triton     Triton kernels on CUDA tensors
    library    PyTorch's own kernels (oneDNN, cuDNN) with pynn's fused epilogue, on CPU and CUDA tensors
    sim        the CUDA C++ sources compiled by the host compiler, on CPU tensors: a test tool, slow (csrc/sim)
    interpret  the Triton kernels in Triton's interpreter, on CPU tensors: a test tool, slow; needs TRITON_INTERPRET=1

`auto` (the default) runs the backend that was measured to be the fastest for a call of this shape on this architecture
(pynn.choices). Where nothing was measured it runs `cpu` for CPU tensors; for CUDA tensors `library` where an op has
such a kernel, then `cuda`, then `triton`. A backend can be forced with `with pynn.backend(name):` or the environment
variable PYNN_BACKEND; a forced backend that cannot run raises with the reason. PYNN_CPU_ISA (baseline, avx2, avx512)
forces the instruction set of the CPU kernels, PYNN_SIM_LIBRARY names another build of the sim kernels (with
sanitizers). These variables are read once, at import, and nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import choices

try:
    from . import _core  # type: ignore[attr-defined]
except ImportError:  # built without Python headers, or for another Python: everything still works
    _core = None  # type: ignore[assignment]

# Backend -> (devices of its tensors, namespace of its ops).
_TARGETS = {
    "cpu": (("cpu",), "pynn"),
    "cuda": (("cuda",), "pynn"),
    "triton": (("cuda",), "pynn_triton"),
    "library": (("cpu", "cuda"), "pynn_library"),
    "sim": (("cpu",), "pynn_sim"),
    "interpret": (("cpu",), "pynn_triton"),
}
BACKENDS = ("auto", *_TARGETS)
CPU_ISAS = ("avx512", "avx2", "baseline")  # best first

_DIRECTORY = Path(__file__).parent / "lib"


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


def _load(path: Path) -> str:
    """Loads a kernel library; returns '' or the reason why it is not available."""
    if not path.exists():
        return f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return str(error)
    return ""


def _triton_reason(interpreted: bool) -> str:
    """'' or the reason why Triton kernels cannot run compiled or interpreted; triton itself is not imported here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted != (os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")):
        state = "without" if interpreted else "with"
        return f"this process was started {state} TRITON_INTERPRET=1"
    return ""


cpu_isa = _pick_cpu_isa()
# Backend -> '' when its kernels are loaded (or can be), otherwise the reason why not.
unavailable: dict[str, str] = {
    "cpu": _load(_library(f"cpu_{cpu_isa}")),
    "cuda": _load(_library("cuda")),
    "triton": _triton_reason(interpreted=False),
    "library": "",
    "sim": _load(Path(os.environ.get("PYNN_SIM_LIBRARY", "") or _library("sim"))),
    "interpret": _triton_reason(interpreted=True),
}
# Namespaces in which ops are worth defining here, see pynn/ops/_registry.py.
NAMESPACES: tuple[str, ...] = tuple(
    namespace
    for namespace, wanted in {
        "pynn": True,
        "pynn_library": True,
        "pynn_auto": True,
        "pynn_sim": not unavailable["sim"],
        "pynn_triton": not (unavailable["triton"] and unavailable["interpret"]),
    }.items()
    if wanted
)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced = _checked(os.environ.get("PYNN_BACKEND", "auto") or "auto", "PYNN_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every pynn op inside the block on one backend.

    Args:
        name: "auto", "cpu", "cuda", "triton", "library", "sim" or "interpret".
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


_PLAIN = (torch.Tensor, torch.nn.Parameter)  # what is no wrapper of anything
_kernels: dict[str, tuple[str, ...]] = {}  # op -> backends that have a kernel for it, whether or not they can run here
_cases: dict[str, Callable[..., choices.Case | None]] = {}  # op -> what its choice depends on, from its operands
_measured_as: dict[str, str] = {}  # op -> the op in the choice tables, where that is another one
_in_python: dict[str, Callable] = {}  # op -> the Python function behind pynn_library's op
_entries: dict[tuple[str, str], Callable] = {}  # (op, backend) -> what runs it in eager


def add_op(
    name: str,
    case: Callable[..., choices.Case | None] | None = None,
    library: Callable | None = None,
    measured_as: str | None = None,
) -> None:
    """Called once the op `name` is defined: notes which loaded libraries implement it.

    Args:
        case: what the choice of a backend depends on, from the op's operands; None, or a result of None: the default.
        library: what the `library` backend's op runs, where it is in Python.
        measured_as: the op whose measurements decide the choice; None for `name` itself.
    """
    found = torch._C._dispatch_has_kernel_for_dispatch_key
    _kernels[name] = tuple(
        backend
        for backend, (devices, namespace) in _TARGETS.items()
        if hasattr(getattr(torch.ops, namespace), name) and found(f"{namespace}::{name}", devices[0].upper())
    )
    if case is not None:
        _cases[name] = case
    if library is not None:
        _in_python[name] = library
    if measured_as is not None:
        _measured_as[name] = measured_as


def device_of(backend: str) -> str:
    """Type of the device whose tensors this backend takes, "cpu" or "cuda"; "cpu" for `library`, which takes both."""
    return _TARGETS[backend][0][0]


def namespace_of(backend: str) -> str:
    """Namespace of torch.ops that holds this backend's ops."""
    return _TARGETS[backend][1]


def has_kernel(name: str, chosen: str) -> bool:
    """Whether this backend has a kernel for the dispatcher op `name`; whether it can run here is another question."""
    return chosen in _kernels[name]


def why_not(name: str, chosen: str) -> str:
    """'' when this backend can run the dispatcher op `name` on this machine, otherwise the reason; asks for a GPU."""
    if unavailable[chosen]:
        return unavailable[chosen]
    if not has_kernel(name, chosen):
        return "no kernel yet"
    return "torch sees no GPU" if device_of(chosen) == "cuda" and not torch.cuda.is_available() else ""


def require(name: str, chosen: str) -> None:
    """Raises RuntimeError with the reason when this backend cannot run the op `name`."""
    if unavailable[chosen]:
        raise RuntimeError(f"pynn.{name}: backend {chosen!r} is not available: {unavailable[chosen]}")
    if not has_kernel(name, chosen):
        others = [b for b in _TARGETS if b != chosen and not unavailable[b] and has_kernel(name, b)]
        raise RuntimeError(
            f"pynn.{name}: backend {chosen!r} has no kernel for this op yet; there are kernels for "
            f"{', '.join(others) or 'no backend'}"
        )


def op(name: str, tensor: torch.Tensor):
    """The dispatcher op `name` of the backend that serves this tensor.

    Raises:
        RuntimeError: no kernel can run it; the message has the reason.
    """
    return _op(name, tensor, None, _is_plain(tensor))


def call(name: str, *operands):
    """Runs the dispatcher op `name` on the backend that serves its first operand: the fastest one for these operands.

    Raises:
        RuntimeError: no kernel can run it; the message has the reason.
    """
    tensor = operands[0]
    plain, case = _is_plain(tensor), None
    if _forced == "auto" and name in _cases and (tensor.is_cpu or tensor.is_cuda):
        if not plain:
            return getattr(torch.ops.pynn_auto, name).default(*operands)  # comes back here with the real operands
        case = _cases[name](*operands)
    return _op(name, tensor, case, plain)(*operands)


def fastest_in_torch(name: str, tensor: torch.Tensor, case: choices.Case | None) -> bool:
    """Whether torch's own function of this name, with its autograd, was measured to be the fastest for a call."""
    if _forced != "auto" or case is None or type(tensor) not in _PLAIN:
        return False
    if _measured(name, tensor, case) != "library":
        return False
    if _calls is not None:
        _record(name, "library", tensor, "measured fastest")
    return True


def chooses_cpu(tensor: torch.Tensor) -> bool:
    """Whether the C++ kernels of the CPU serve this tensor: it is on the CPU, and no other backend is forced."""
    return tensor.is_cpu and type(tensor) in _PLAIN and _forced in ("auto", "cpu")


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether this is a tensor and nothing else, and runs now: what needs no dispatcher around Python code."""
    return type(tensor) in _PLAIN and not torch.compiler.is_compiling()


def _op(name: str, tensor: torch.Tensor, case: choices.Case | None, plain: bool):
    device = "cpu" if tensor.is_cpu else tensor.device.type
    if device not in ("cpu", "cuda"):
        if device == "meta":  # runs the shape rule of the op
            return getattr(torch.ops.pynn, name).default
        raise RuntimeError(f"pynn.{name}: expected a CPU or CUDA tensor, got one on {device}")
    measured = _fastest(name, tensor, case) if case is not None else None
    chosen = measured or (_default(name, device) if _forced == "auto" else _forced)
    if device not in _TARGETS[chosen][0]:
        raise RuntimeError(f"pynn.{name}: backend {chosen!r} was forced but the tensor is on {device}")
    if unavailable[chosen] or chosen not in _kernels[name]:
        require(name, chosen)
    if _calls is not None and not torch.compiler.is_compiling():
        reason = "forced" if _forced != "auto" else "measured fastest" if measured else f"{device} tensor"
        _record(name, chosen, tensor, reason)
    # A library that was measured for such a call is one that takes it, and says itself what is wrong with an operand.
    return entry(name, chosen, plain and (chosen != "library" or measured is not None))


def entry(name: str, chosen: str, plain: bool = True) -> Callable:
    """What runs the op on this backend: the dispatcher op or, for plain tensors in eager, the function behind it, which
    for `library` is without our validation of the operands."""
    if not plain:
        return getattr(getattr(torch.ops, _TARGETS[chosen][1]), name).default
    run = _entries.get((name, chosen))
    if run is None:  # the library's functions go through the dispatcher, its validation and back otherwise: 15 us
        run = _in_python[name] if chosen == "library" and name in _in_python else entry(name, chosen, plain=False)
        _entries[name, chosen] = run
    return run


def _fastest(name: str, tensor: torch.Tensor, case: choices.Case) -> str | None:
    chosen = _measured(name, tensor, case)
    return chosen if chosen is not None and not unavailable[chosen] and has_kernel(name, chosen) else None


def _measured(name: str, tensor: torch.Tensor, case: choices.Case) -> str | None:
    architecture = cpu_isa if tensor.is_cpu else _gpu_architecture(tensor.device)
    return choices.fastest(architecture, _measured_as.get(name, name), _name_of(tensor.dtype), case)


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _gpu_architecture(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _default(name: str, device: str) -> str:
    if device == "cpu":
        return "cpu"
    usable = (b for b in ("library", "cuda", "triton") if not unavailable[b] and has_kernel(name, b))
    return next(usable, "cuda")


def _record(name: str, chosen: str, tensor: torch.Tensor, reason: str) -> None:
    assert _calls is not None
    kernel = f"cpu/{cpu_isa}" if chosen == "cpu" else chosen
    _calls.append(Call(name, chosen, kernel, _name_of(tensor.dtype), tuple(tensor.shape), reason))
