"""Compiles the Triton kernels that the cases launch, and measures them."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path

import triton

from . import measure
from .cases import CASES, NARROW, NARROW_KERNELS
from .ratchet import Promise, Rows
from .targets import TARGETS, compiling


@dataclasses.dataclass
class Result:
    """Rows of one job, the promises of their kernels, and the compilers that made them."""

    rows: Rows
    promises: dict[str, Promise]
    versions: dict[str, str]


def compile_for(target: str) -> Result:
    """Every kernel of every case for one target of targets.TARGETS."""
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
            with compiling(target) as compiled:
                case.run()
            if not compiled:
                raise RuntimeError(f"{module} {case.label}: launched no kernel")
            for kernel_name, kernel in compiled:
                name = f"{module}.{kernel_name} {case.label} | triton {target}"
                if name in result.rows:
                    raise RuntimeError(f"two cases of {module} are called {name!r}")
                result.rows[name] = _measure(kernel, target, case.promise)
                result.promises[name] = NARROW if kernel_name in NARROW_KERNELS else case.promise
    return result


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
        row["spill_bytes"] = measure.spills_of_ptx(get_ptxas(TARGETS[target].arch).path, ptx, architecture)
        row["stack_bytes"] -= min(row["stack_bytes"], row["spill_bytes"])
    return row | measure.of_ptx(ptx)
