"""Tiles of the recurrent kernels for each architecture: committed, so that no first call is a search.

Chosen by the resources that the compilers report (registers, shared memory, no spills); no GPU has measured them yet.
Which kernel runs depends on the widths and the dtype alone, so a sequence may be cut into chunks, or a batch into
parts, without another result; the rows of a tile follow the batch, which no sum shows.
"""

from __future__ import annotations

import dataclasses

import triton

from .conv2d_configs import architecture

_REGISTERS = 255


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of the batch, units, length of a step of the product, and how a program is run.

    Args:
        free: a thread may take all the registers it can have. Without this ptxas saves some for more programs, to the
            point of spilling; but steps wait for each other, so there are few programs.
    """

    rows: int
    units: int
    depth: int
    num_warps: int
    num_stages: int = 1
    free: bool = False

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


def _loops() -> Loops:
    name = architecture()
    if name == "sm_80" and triton.runtime.driver.active.get_current_target().arch > 80:
        name = "sm_120"
    return _LOOPS[name]


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
    loops, units = _loops(), max(16, triton.next_power_of_2(hidden))
    if kind == "half":
        kept = gates * units * units * 2
        full = kept > 96 << 10
        warps = 2 * loops.num_warps if full and loops.num_warps > 1 else loops.num_warps
        return (Tile(16, units, 0, warps, free=gates == 1 or not full), not full) if kept <= loops.resident else None
    depth = 2 * loops.depth if backward and kind == "fp32" else loops.depth
    tile = Tile(loops.rows, units, depth, loops.num_warps, free=True)
    return (tile, False) if hidden <= loops.most[kind] and (packed or loops.odd) else None
