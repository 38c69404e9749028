"""Measures the kernels of csrc/cuda/*.cu in what nvcc kept when setup.py built libpynn_cuda.so."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from . import measure
from .cases import cuda_promise
from .ratchet import Result

ROOT = Path(__file__).resolve().parents[2]
ALL_ARCHITECTURES = ("80", "90a", "100", "120")
ARCHITECTURES = tuple(os.environ.get("PYNN_CUDA_ARCHS", " ".join(ALL_ARCHITECTURES)).split())  # as setup.py builds


def sources() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def find_nvcc() -> str | None:
    """Where setup.py would find it: CUDA_HOME, the search path, /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((path for path in candidates if path and Path(path).exists()), None)


def find_cuobjdump(nvcc: str) -> str:
    """The toolkit's, or the one in triton's wheel (it needs nvdisasm beside it, and has it)."""
    own = Path(nvcc).with_name("cuobjdump")
    if own.exists() and own.with_name("nvdisasm").exists():
        return str(own)
    package = Path(importlib.util.find_spec("triton").origin).parent  # type: ignore[union-attr, arg-type]
    return str(package / "backends/nvidia/bin/cuobjdump")


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\bV(\d+\.\d+\.\d+)", text)[0]


def find_build(source: Path, architecture: str) -> tuple[Path, Path]:
    """The cubin that was built for this architecture, and the PTX that it was made of.

    Raises:
        RuntimeError: there is none.
    """
    kept = ROOT / f"build/ninja/cuda/cuda_{source.stem}.o.kept"
    cubins = [*kept.glob(f"*.sm_{architecture}.cubin"), *kept.glob(f"{source.stem}.compute_{architecture}.cubin")]
    if len(cubins) != 1:
        missing = f"{source.name} was not built for sm_{architecture}"
        raise RuntimeError(f"{missing}: make build, with the same PYNN_CUDA_ARCHS")
    virtual = re.findall(r"\.compute_\w+(?=\.)", cubins[0].name)  # nvcc leaves it out where it builds for one only
    return cubins[0], kept / f"{source.stem}{''.join(virtual)}.ptx"


def measure_for(source: Path, architecture: str, nvcc: str) -> Result:
    """Every kernel of one file for one architecture ("80", "90a", ...)."""
    binary, ptx = find_build(source, architecture)
    cuobjdump = find_cuobjdump(nvcc)
    resources, sass = measure.resources(cuobjdump, binary), measure.disassemble(cuobjdump, binary)
    entries = _entries(ptx.read_text())
    result = Result({}, {}, {"nvcc": nvcc_version(nvcc)})
    short = short_names(list(resources))
    stacked = [mangled for mangled, row in resources.items() if row["stack_bytes"]]  # spilled registers live there
    ptxas = str(Path(nvcc).with_name("ptxas"))
    spilled = measure.spills_of_ptx(ptxas, ptx.read_text(), f"sm_{architecture}", stacked) if stacked else {}
    for mangled, row in resources.items():
        name = f"{source.stem}.{short[mangled]} | cuda sm_{architecture}"
        if name in result.rows:
            raise RuntimeError(f"two kernels of {source.name} are called {name!r}")
        row["spill_bytes"] = spilled[mangled] if row["stack_bytes"] else 0
        row["stack_bytes"] -= min(row["stack_bytes"], row["spill_bytes"])
        arithmetic = {key: measure.of_ptx(entries[mangled])[key] for key in ("fma", "fusable")}
        result.rows[name] = {**row, **arithmetic, **measure.of_sass(sass[mangled])}
        result.promises[name] = cuda_promise(short[mangled])
    return result


def _entries(ptx: str) -> dict[str, str]:
    """Kernel (mangled name) -> its part of a PTX text."""
    parts = re.split(r"\.entry (\w+)", ptx)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def short_names(mangled: list[str]) -> dict[str, str]:
    """Mangled names -> names without namespaces, arguments and result: loss_rows_kernel<float>."""
    text = "\n".join(mangled)
    lines = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: _shorten(line) for name, line in zip(mangled, lines, strict=True)}


def _shorten(declaration: str) -> str:
    text = re.sub(r"(?:\(anonymous namespace\)|\w+)::", "", declaration).replace("> >", ">>")
    depth = 0
    for end, character in enumerate(text):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            text = text[:end]
            break
    return text.removeprefix("void ")
