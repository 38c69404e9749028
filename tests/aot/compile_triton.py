"""Compiles the Triton kernels that the cases launch, and measures them."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sample
import triton

from . import measure
from .cases import CASES, NARROW, NARROW_KERNELS
from .ratchet import Promise, Result
from .targets import TARGETS, compiling


def compile_for(target: str, every: int = 1) -> Result:
    """Every kernel of every case, or of a sample of one case in `every`, for one target of targets.TARGETS."""
    nvidia = triton.knobs.nvidia
    result = Result(
        {},
        {},
        {
            "triton": triton.__version__,
            "triton ptxas": nvidia.ptxas.version,
            "triton ptxas-blackwell": nvidia.ptxas_blackwell.version,
        },
    )
    for module, cases in CASES.items():
        for case in cases():
            elsewhere = case.only_for and target not in case.only_for
            if elsewhere or not sample.chosen(f"{module} {case.label} {target}", every):
                continue
            with compiling(target) as compiled:
                case.run()
            if not compiled:
                raise RuntimeError(f"{module} {case.label}: launched no kernel")
            for kernel_name, version, kernel in _numbered(compiled):
                name = f"{module}.{kernel_name} {case.label}{version} | triton {target}"
                if name in result.rows:
                    raise RuntimeError(f"two cases of {module} are called {name!r}")
                result.rows[name] = _measure(kernel, target, case.promise)
                result.promises[name] = NARROW if kernel_name in NARROW_KERNELS else case.promise
    return result


def _numbered(compiled: list) -> Iterator[tuple]:
    """(kernel name, " config i" where it was compiled with several, kernel)."""
    counts = collections.Counter(name for name, _ in compiled)
    seen: collections.Counter[str] = collections.Counter()
    for name, kernel in compiled:
        seen[name] += 1
        yield name, f" config {seen[name]}" if counts[name] > 1 else "", kernel


def _measure(kernel, target: str, promise: Promise) -> measure.Measurement:
    if promise.exact and kernel.metadata.enable_fp_fusion:
        raise RuntimeError(f"{kernel.metadata.name}: launched without enable_fp_fusion=False")
    if TARGETS[target].backend == "hip":
        return {**measure.of_amdgcn(kernel.asm["amdgcn"]), "shared_bytes": kernel.metadata.shared}
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (row,) = measure.resources(triton.knobs.nvidia.cuobjdump.path, Path(file.name)).values()
    row["shared_bytes"] += kernel.metadata.shared
    row["spill_bytes"] = 0
    if row["stack_bytes"]:  # spilled registers live there
        from triton.backends.nvidia.compiler import get_ptxas

        architecture = re.findall(r"\.target (\w+)", ptx)[0]
        spilled = measure.spills_of_ptx(get_ptxas(TARGETS[target].arch).path, ptx, architecture)
        row["spill_bytes"] = sum(spilled.values())
        row["stack_bytes"] -= min(row["stack_bytes"], row["spill_bytes"])
    return row | measure.of_ptx(ptx)
