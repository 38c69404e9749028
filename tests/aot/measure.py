"""What a compiled kernel needs and contains, read from its assembly and from its binary.

A measurement is a flat dict of ints; ratchet.py says which way each is worse.

    registers          per thread (vector registers on AMD)
    spill_bytes        registers that went to memory, must be 0
    stack_bytes        other memory of a thread
    shared_bytes       static and dynamic
    loads, stores      instructions on global memory
    loads128, stores128    those of 16 bytes or more
    fma                fused multiply-adds that the source asks for
    fusable            products and sums that an assembler may fuse: 0 where a kernel promises the CPU's bits
    mma, wgmma, tcgen05, mfma, tma, cp_async    tensor-core and asynchronous-copy instructions
    acquire, release    of one program of a GPU by another
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

Measurement = dict[str, int]

# Of what most kernels have none; left out where it is 0.
_PTX = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "tma": r"\bcp\.async\.bulk\.tensor",
    "cp_async": r"\bcp\.async\.c[ag]\.shared",
    "acquire": r"\b(?:ld|atom)\.global\.gpu\.acquire\.",
    "release": r"\b(?:atom|red)\.global\.gpu\.release\.",
}
_WIDE = r"\S*\.(?:v4\.[bfu]32|v8\.[bfu]32|v2\.[bfu]64|v4\.[bfu]64|v2\.b128|b128)\b"


def _words(text: str) -> Counter[str]:
    """How often each word but registers and numbers occurs: megabytes of text have some hundred instructions."""
    return Counter(word for word in text.split() if word[0].isalpha())


def _count(pattern: str, words: Counter[str]) -> int:
    search = re.compile(pattern).search
    return sum(number for word, number in words.items() if search(word))


def of_ptx(ptx: str) -> Measurement:
    """Counts in PTX. A multiplication or addition without a rounding mode may be fused by ptxas."""
    words = _words(ptx)
    found = {
        "loads": _count(r"\bld\.global\.", words),
        "loads128": _count(r"\bld\.global" + _WIDE, words),
        "stores": _count(r"\bst\.global\.", words),
        "stores128": _count(r"\bst\.global" + _WIDE, words),
        "fma": _count(r"\bfma\.rn\.f(?:32|64|32x2)\b", words),
        "fusable": _count(r"\b(?:mul|add|sub)\.(?:ftz\.)?f(?:32|64|32x2)\b", words),
    }
    return found | {name: n for name, pattern in _PTX.items() if (n := _count(pattern, words))}


def of_amdgcn(assembly: str) -> Measurement:
    """Counts in AMD assembly, and the resources in its metadata."""

    def metadata(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0])

    words = _words(assembly)
    private = metadata("private_segment_fixed_size")  # without one, scalar registers went to lanes of vector registers
    memory = r"(?:global|buffer|flat)_"
    found = {
        "registers": metadata("vgpr_count"),
        "spill_bytes": 4 * (metadata("vgpr_spill_count") + (metadata("sgpr_spill_count") if private else 0)),
        "stack_bytes": private,
        "loads": _count(rf"\b{memory}load_", words),
        "loads128": _count(rf"\b{memory}load_dwordx4", words),
        "stores": _count(rf"\b{memory}store_", words),
        "stores128": _count(rf"\b{memory}store_dwordx4", words),
    }
    mfma = _count(r"\bv_mfma_", words)
    return found | ({"mfma": mfma} if mfma else {})


def of_sass(sass: str) -> Measurement:
    """Counts in the disassembly of one kernel."""
    words = _words(re.sub(r"/\*.*?\*/", " ", sass))  # without addresses and encodings
    found = {
        "loads": _count(r"\bLDG\.", words),
        "loads128": _count(r"\bLDG\.\S*\b(?:128|256)\b", words),
        "stores": _count(r"\bSTG\.", words),
        "stores128": _count(r"\bSTG\.\S*\b(?:128|256)\b", words),
    }
    extra = {"mma": r"\bHMMA\.", "wgmma": r"\bHGMMA\.", "cp_async": r"\bLDGSTS\."}
    return found | {name: n for name, pattern in extra.items() if (n := _count(pattern, words))}


def resources(cuobjdump: str, binary: Path) -> dict[str, Measurement]:
    """Kernel (mangled name) -> registers, stack and static shared memory of it in a cubin."""
    text = _run(cuobjdump, "-res-usage", binary)
    rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {
        name: {"registers": int(registers), "stack_bytes": int(stack), "shared_bytes": int(shared)}
        for name, registers, stack, shared in rows
    }


def disassemble(cuobjdump: str, binary: Path) -> dict[str, str]:
    """Kernel (mangled name) -> SASS of it in a cubin."""
    text = _run(cuobjdump, "-sass", binary)
    parts = re.split(r"\n\s*Function : (\S+)\n", text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def spills(ptxas_log: str) -> dict[str, int]:
    """Kernel (mangled name) -> bytes of spill stores and loads, from the log of `ptxas -v`."""
    rows = re.findall(
        r"Function properties for (\S+)\s+.*?(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas_log, re.S
    )
    return {name: int(stores) + int(loads) for name, stores, loads in rows}


def spills_of_ptx(ptxas: str, ptx: str, architecture: str, entries: Sequence[str] = ()) -> dict[str, int]:
    """Kernel -> spilled bytes: those of a PTX text, or the `entries` among them."""
    with tempfile.TemporaryDirectory() as directory:
        source, binary = Path(directory, "kernel.ptx"), Path(directory, "kernel.cubin")
        source.write_text(ptx)
        command = [ptxas, "-v", "--fmad=false", f"--gpu-name={architecture}", str(source), "-o", str(binary)]
        command += [f"--entry={entry}" for entry in entries]
        return spills(subprocess.run(command, capture_output=True, text=True, check=True).stderr)


def _run(*command) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stderr}")
    return result.stdout
