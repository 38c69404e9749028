"""Compiles csrc/cuda/*.cu with nvcc and the flags of setup.py, and measures the kernels."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import measure
from .cases import cuda_promise
from .ratchet import Result

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("80", "90a", "100", "120")


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


def build_flags() -> list[str]:
    """NVCC_FLAGS of setup.py, which cannot be imported: that would run the build."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_FLAGS":
            return ast.literal_eval(node.value).split()
    raise RuntimeError("setup.py: expected an assignment of a string to NVCC_FLAGS, found none")


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\bV(\d+\.\d+\.\d+)", text)[0]


def compile_for(source: Path, architecture: str, nvcc: str) -> Result:
    """Every kernel of one file for one architecture ("80", "90a", ...).

    Raises:
        RuntimeError: nvcc failed, or warned; with its messages.
    """
    with tempfile.TemporaryDirectory() as directory:
        binary, ptx = Path(directory, "kernels.cubin"), Path(directory, f"{source.stem}.ptx")
        target = f"arch=compute_{architecture},code=sm_{architecture}"
        command = [nvcc, *build_flags(), f"-I{ROOT / 'csrc/include'}", "-gencode", target, "-Xptxas", "-v"]
        command += ["-cubin", "--keep", "--keep-dir", directory, str(source), "-o", str(binary)]
        build = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
        if build.returncode:
            raise RuntimeError(f"{source.name} for sm_{architecture}: nvcc failed\n{build.stderr}")
        cuobjdump = find_cuobjdump(nvcc)
        resources, sass = measure.resources(cuobjdump, binary), measure.disassemble(cuobjdump, binary)
        spills, entries = measure.spills(build.stderr), _entries(ptx.read_text())
    result = Result({}, {}, {"nvcc": nvcc_version(nvcc)})
    short = short_names(list(resources))
    for mangled, row in resources.items():
        name = f"{source.stem}.{short[mangled]} | cuda sm_{architecture}"
        if name in result.rows:
            raise RuntimeError(f"two kernels of {source.name} are called {name!r}")
        row["spill_bytes"] = spills[mangled]
        row["stack_bytes"] -= min(row["stack_bytes"], spills[mangled])  # spilled registers live there
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
