"""Tools for tests of csrc/sim: choosing the schedule of libpynn_sim.so, and building programs over the sim with g++."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SELFTEST = ROOT / "csrc/sim/selftest"
FORWARD, REVERSE, SHUFFLED, UNEVEN = 0, 1, 2, 3


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ.get("PYNN_SIM_LIBRARY") or str(ROOT / "pynn/lib/libpynn_sim.so"))
    library.pynn_sim_configure.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
    library.pynn_sim_launches.restype = ctypes.c_uint64
    library.pynn_sim_latest_kernel.restype = ctypes.c_char_p
    return library


@contextlib.contextmanager
def schedule(order: int, seed: int = 0, resident_blocks: int = 1) -> Iterator[None]:
    """Runs the sim's kernels inside the block in another order; outside it is FORWARD, one block at a time.

    Args:
        order: FORWARD, REVERSE or SHUFFLED, of the threads of a block and of the blocks of a grid; or UNEVEN, in which
            the last of them fall as far behind as nobody waits for them.
        seed: of the shuffled order.
        resident_blocks: blocks whose threads take turns, 1 to 64.
    """
    if _library().pynn_sim_configure(order, seed, resident_blocks) != 0:
        raise ValueError(f"expected an order in 0 .. 3 and 1 to 64 resident blocks, got {order}, {resident_blocks}")
    try:
        yield
    finally:
        _library().pynn_sim_configure(FORWARD, 0, 1)


@contextlib.contextmanager
def device(processors: int = 132, kilobytes: int = 227, cluster_blocks: int = 8) -> Iterator[None]:
    """Launchers inside the block find another device than an H200: processors, shared memory of a block, clusters."""
    if _library().pynn_sim_device(processors, kilobytes * 1024, cluster_blocks) != 0:
        raise ValueError(f"no such device: {processors} processors, {kilobytes} KB, clusters of {cluster_blocks}")
    try:
        yield
    finally:
        _library().pynn_sim_device(132, 227 * 1024, 8)


def latest_kernel() -> str:
    """The kernel that libpynn_sim.so ran last, as its launcher spells it."""
    return _library().pynn_sim_latest_kernel().decode()


def launches() -> int:
    """Kernel launches of libpynn_sim.so so far."""
    return _library().pynn_sim_launches()


# How the sources of a program are compiled and linked. The runtime, csrc/sim/*.cpp, is built plainly for all.
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-DPYNN_SIM", "-ffp-contract=off", "-fno-omit-frame-pointer"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
FLAGS += ["-Wno-missing-field-initializers"]
VARIANTS = {
    "plain": ["-O1"],
    # What is left out of UBSan is what ASan sees of a wrong pointer; a third of the compiler's time.
    "asan": [
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,object-size,vptr",
        "-fno-sanitize-recover=undefined",
    ],
    "tsan": ["-O1", "-fsanitize=thread"],
    "gcov": ["-O0", "--coverage"],
}
# A sanitizer's verdict is its own exit status, so that it cannot be taken for the program's.
SANITIZED = {
    **os.environ,
    "ASAN_OPTIONS": "exitcode=99",
    "UBSAN_OPTIONS": "exitcode=99:print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=99:history_size=0",
}
FOUND_BY_SANITIZER = 99


@functools.cache
def _newest_source() -> float:
    return max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process builds a target; pytest's other workers wait for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run_compiler(command: Sequence[str | Path], target: Path) -> Path:
    with _locked(target):
        newest = max([_newest_source(), *(part.stat().st_mtime for part in command if isinstance(part, Path))])
        if not target.exists() or target.stat().st_mtime < newest:
            text = [str(part) for part in command]
            result = subprocess.run([*text, "-o", str(target)], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(f"{' '.join(text)}\n{result.stderr[:5000]}")
    return target


def object_name(source: Path, variant: str) -> str:
    return f"{source.parent.name}_{source.stem}.{variant}.o"


def compile_object(directory: Path, source: Path, variant: str, *flags: str) -> Path:
    """Compiles one source file, .cpp or .cu, into the directory."""
    command: list[str | Path] = [
        "g++",
        *FLAGS,
        *VARIANTS[variant],
        *flags,
        f"-I{ROOT / 'csrc/include'}",
        "-x",
        "c++",
        "-c",
        source,
    ]
    return _run_compiler(command, directory / object_name(source, variant))


def runtime_objects(directory: Path) -> list[Path]:
    """The sim itself, without a sanitizer in it: it tells them what they need to know."""
    sources = sorted((ROOT / "csrc/sim").glob("*.cpp"))
    return [compile_object(directory / "runtime", source, "plain", "-O2") for source in sources]


def link(path: Path, objects: list[Path], variant: str) -> Path:
    """Links a program, `path` with the variant's name behind it."""
    return _run_compiler(["g++", *VARIANTS[variant], *objects], path.with_name(f"{path.name}.{variant}"))


def program(directory: Path, name: str, sources: list[Path], variant: str) -> Path:
    """Builds a program over the sim and returns its path."""
    objects = [compile_object(directory, source, variant) for source in sources] + runtime_objects(directory)
    return link(directory / name, objects, variant)


def torch_library(directory: Path, name: str, sources: list[Path], variant: str) -> Path:
    """Builds a library of ops for torch over the sim; .cpp files may use torch's stable ABI."""
    torch_include = Path(torch.__file__).parent / "include"
    flags = [
        "-fvisibility=hidden",  # as setup.py builds it: torch's types are hidden
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{ROOT / 'csrc/ops'}",
        f"-isystem{torch_include}",
        f"-isystem{torch_include / 'torch/csrc/api/include'}",
    ]
    objects = [compile_object(directory, source, variant, *flags) for source in sources] + runtime_objects(directory)
    torch_lib = torch_include.parent / "lib"
    command: list[str | Path] = [
        "g++",
        "-shared",
        *VARIANTS[variant],
        *objects,
        f"-L{torch_lib}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    return _run_compiler(command, directory / f"lib{name}.{variant}.so")


@dataclasses.dataclass
class Outcome:
    status: int
    text: str  # stdout and stderr

    def summary(self) -> str:
        found = re.search(r"^.*(SUMMARY:|runtime error:).*$", self.text, re.MULTILINE)
        return found.group(0) if found else self.text[-500:]


def run(command: Sequence[str | Path], timeout: float = 120) -> Outcome:
    """Runs a program; a sanitizer that finds something ends it with FOUND_BY_SANITIZER."""
    text = [str(part) for part in command]
    result = subprocess.run(text, capture_output=True, text=True, check=False, env=SANITIZED, timeout=timeout)
    if "unexpected memory mapping" in result.stderr:  # TSan and a kernel with much address randomisation
        text = ["setarch", "-R", *text]
        result = subprocess.run(text, capture_output=True, text=True, check=False, env=SANITIZED, timeout=timeout)
    return Outcome(result.returncode, result.stdout + result.stderr)
