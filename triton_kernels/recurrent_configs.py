"""Tiles of the recurrent kernels for each architecture: committed, so that no first call is a search.

Chosen by the resources that the compilers report (registers, shared memory, no spills); no GPU has measured them yet.
Which kernel runs depends on the widths and the dtype alone, so a sequence may be cut into chunks, or a batch into
parts, without another result; the rows of a tile follow the batch, which no sum shows. Nor does it show whether a
sequence is made by a team of programs or in a launch per step: both add the same products in the same order, and are
compiled without fusing what rounds twice. So that choice may follow batch, steps and the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch
import triton

from .conv2d_configs import architecture

_REGISTERS = 255


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of the batch, units, length of a step of the product, and how a program is run.

    Args:
        kept: a program of a team keeps its weights on the chip, in pieces of `depth` terms of a sum.
        free: a thread may take all the registers it can have. Without this ptxas saves some for more programs, to the
            point of spilling; but steps wait for each other, so there are few programs.
    """

    rows: int
    units: int
    depth: int
    num_warps: int
    num_stages: int = 1
    free: bool = False
    kept: bool = False

    @property
    def options(self) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | (
            {"maxnreg": min(_REGISTERS, 2048 // self.num_warps)}
            if self.free and architecture().startswith("sm_")
            else {}
        )


# kind -> tiles of one step: the first whose programs are not too many. Tiles for tensor cores are wider than high:
# the warps of a program that makes several products of one operand stand side by side.
_STEPS = {
    "sm_80": {
        "half": (Tile(16, 32, 32, 4, 4, free=True), Tile(32, 64, 32, 8, 3)),
        "fp32": (Tile(4, 32, 32, 4, 3), Tile(32, 32, 16, 8, 3)),
        "fp64": (Tile(16, 16, 16, 4, 3),),
    },
    "sm_90": {
        "half": (Tile(16, 32, 32, 4, 4, free=True), Tile(64, 32, 64, 8, 3)),
        "fp32": (Tile(4, 32, 32, 4, 3), Tile(32, 32, 16, 8, 3)),
        "fp64": (Tile(16, 16, 16, 4, 3),),
    },
    "gfx942": {
        "half": (Tile(16, 32, 64, 4, 2),),
        "fp32": (Tile(16, 32, 32, 4, 2), Tile(32, 32, 16, 4, 2)),
        "fp64": (Tile(16, 16, 16, 4),),
    },
    # The interpreter pays per program and operation, not per element.
    "interpret": {kind: (Tile(16, 64, 64, 1),) for kind in ("half", "fp32", "fp64")},
}
_STEPS["sm_120"] = _STEPS["sm_80"]
_ODD_UNITS = 16  # of a tile whose elements each take an address and a mask
_PROGRAMS = 2 * 132  # more of them wait for each other


@dataclasses.dataclass(frozen=True)
class Loops:
    """Which sequences one program makes from begin to end.

    Args:
        resident: bytes of weight_hh that a program may keep, its units padded to a power of two.
        rows, depth, most: without tensor cores weight_hh streams from the caches; up to so many units.
        odd: also for rows that are not made of 16 bytes.
    """

    resident: int
    rows: int
    depth: int
    most: dict[str, int]
    num_warps: int = 8
    odd: bool = True


_LOOPS = {
    "sm_80": Loops(128 << 10, 4, 16, {"fp32": 128, "fp64": 64}),
    "sm_90": Loops(128 << 10, 4, 16, {"fp32": 128, "fp64": 64}),
    "sm_120": Loops(64 << 10, 4, 16, {"fp32": 128, "fp64": 64}),  # and the sm_86 and sm_89: 99 KiB of shared memory
    "gfx942": Loops(64 << 10, 16, 16, {"fp32": 128, "fp64": 0}, 4, odd=False),
    "interpret": Loops(128 << 10, 16, 16, {"fp32": 64, "fp64": 64}, 1),
}


@dataclasses.dataclass(frozen=True)
class Teams:
    """Tiles of programs that wait for each other.

    Those of 16 bits keep their weights on the chip, a warp making 8 columns of the product. Wider layers than fit, and
    products without tensor cores, read the weights from the L2 cache in every step, as a launch per step does.

    Args:
        side_by_side: lstm and gru in 16 bits, whose products have four columns for a unit, forward.
        plain: rnn in 16 bits, and the backward of all; the one with the fewest programs first.
        fp32: with half as many terms at once as in a launch per step: those take all registers there are, and spill.
        shared: bytes for the kept weights and the rows they are multiplied with, what else a program needs aside.
    """

    side_by_side: tuple[Tile, ...]
    plain: tuple[Tile, ...]
    fp32: tuple[Tile, ...]
    shared: int

    def kept(self, length: int, side_by_side: bool) -> Iterator[Tile]:
        for tile in self.side_by_side if side_by_side else self.plain:
            columns = tile.units * (4 if side_by_side else 1)
            if 2 * triton.cdiv(length, tile.depth) * tile.depth * (columns + tile.rows) <= self.shared:
                yield tile


# Chosen by the shared memory and the registers that the compilers report; no GPU has measured them. There are none on
# AMD: Triton's barrier does not wait there for stores to memory, so one thread cannot release those of the others.
_SIDE_BY_SIDE = (Tile(16, 16, 128, 8, free=True, kept=True),)
_PLAIN = (Tile(16, 32, 128, 4, free=True, kept=True), Tile(16, 16, 128, 4, free=True, kept=True))
_FP32 = (Tile(4, 32, 16, 4, 3, free=True), Tile(16, 32, 16, 8, 3, free=True))
_TEAMS = {
    "sm_80": Teams(_SIDE_BY_SIDE, _PLAIN, _FP32, 161 << 10),
    "sm_90": Teams(_SIDE_BY_SIDE, _PLAIN, _FP32, 224 << 10),
    "sm_120": Teams(_SIDE_BY_SIDE, _PLAIN, _FP32, 96 << 10),  # and the sm_86 and sm_89
    "interpret": Teams(
        (Tile(16, 16, 64, 1, kept=True),), (Tile(16, 16, 64, 1, kept=True),), (Tile(16, 64, 64, 1),), 128 << 10
    ),
}
_teams = True


@contextlib.contextmanager
def without_teams() -> Iterator[None]:
    """No sequence is made by programs that wait for each other inside the block: for tests and comparisons."""
    global _teams
    before, _teams = _teams, False
    try:
        yield
    finally:
        _teams = before


@functools.cache
def processors(device: torch.device) -> int:
    """Of a GPU; without one, of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def programs_held(registers: int, shared: int, num_warps: int, device: torch.device) -> int:
    """Programs of a kernel that a processor of an NVIDIA GPU holds at once, by the rules of CUDA's occupancy.

    Registers are given to a warp 256 at a time, and a processor's four parts have a quarter of them each; a program
    takes 1 KiB of shared memory for the system.
    """
    properties = torch.cuda.get_device_properties(device)
    warps = properties.regs_per_multiprocessor // 4 // (triton.cdiv(registers * 32, 256) * 256) * 4
    return min(
        warps // num_warps,
        properties.max_threads_per_multi_processor // (32 * num_warps),
        properties.shared_memory_per_multiprocessor // (shared + 1024),
    )


def team_tiles(kind: str, batch: int, width: int, length: int, packed: bool, *, side_by_side: bool) -> list[Tile]:
    """For whole sequences of more units than one program makes: tiles, the best first; none where there are no teams.

    A launch per step pays for the launch, about as much as a step takes. A team pays for arriving and waiting, a few
    trips to the L2 cache. So a team is preferred wherever all its programs run at once, whatever the widths: reasoned,
    unmeasured.

    Args:
        width, length: units, and terms of a sum of theirs.
        side_by_side: the gates of a unit are columns of one product.
    """
    teams = _TEAMS.get(_generation()) if _teams else None
    if teams is None:
        return []
    if kind == "fp32" and packed:
        return list(teams.fp32)
    kept = teams.kept(length, side_by_side) if kind == "half" and packed else ()
    return [*kept, dataclasses.replace(step_tile(kind, batch, width, packed), free=True)]


def _generation() -> str:
    """`architecture`, where it is shared memory that counts."""
    name = architecture()
    if name == "sm_80" and triton.runtime.driver.active.get_current_target().arch > 80:
        return "sm_120"
    return name


def step_tile(kind: str, batch: int, units: int, packed: bool) -> Tile:
    """For one step in a launch of its own.

    Args:
        kind: half, fp32 or fp64.
        packed: rows are made of 16 bytes. Others are read element by element.
    """
    tiles = _STEPS[architecture()][kind]
    if not packed and architecture() != "interpret":
        return dataclasses.replace(tiles[0], units=min(tiles[0].units, _ODD_UNITS), depth=16, num_stages=1)
    fitting = (t for t in tiles if triton.cdiv(batch, t.rows) * triton.cdiv(units, t.units) <= _PROGRAMS)
    return next(fitting, tiles[-1])


def loop_tile(kind: str, gates: int, hidden: int, packed: bool, *, backward: bool) -> tuple[Tile, bool] | None:
    """For whole sequences of `hidden` units in one program, or None where they are too many; whether to read ahead.

    A depth of 0 says that weight_hh stays on the chip.
    """
    loops, units = _LOOPS[_generation()], max(16, triton.next_power_of_2(hidden))
    if kind == "half":
        kept = gates * units * units * 2
        full = kept > 96 << 10
        warps = 2 * loops.num_warps if full and loops.num_warps > 1 else loops.num_warps
        return (Tile(16, units, 0, warps, free=gates == 1 or not full), not full) if kept <= loops.resident else None
    depth = 2 * loops.depth if backward and kind == "fp32" else loops.depth
    tile = Tile(loops.rows, units, depth, loops.num_warps, free=True)
    return (tile, False) if hidden <= loops.most[kind] and (packed or loops.odd) else None
