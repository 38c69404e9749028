"""Tiles of the recurrent kernels for each architecture: committed, so that no first call is a search.

Chosen by the resources that the compilers report (registers, shared memory, no spills); no GPU has measured them yet.
Which kernel runs depends on the widths and the dtype alone, so a sequence may be cut into chunks, or a batch into
parts, without another result; the rows of a tile follow the batch, which no sum shows.
"""

from __future__ import annotations

import dataclasses

import triton

from .conv2d_configs import architecture


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of the batch, units, length of a step of the product, and how a program is run."""

    rows: int
    units: int
    depth: int
    num_warps: int
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# kind -> tiles of one step, for the smallest batches first.
_STEPS = {
    "sm_80": {
        "half": (Tile(16, 16, 128, 4, 3), Tile(32, 32, 64, 4, 3), Tile(64, 32, 64, 4, 3)),
        "fp32": (Tile(4, 32, 32, 4, 3), Tile(32, 32, 16, 4, 3)),
        "fp64": (Tile(16, 16, 16, 4, 3),),
    },
    "gfx942": {
        "half": (Tile(16, 16, 64, 4, 2), Tile(32, 32, 64, 4, 2), Tile(64, 32, 32, 4, 2)),
        "fp32": (Tile(16, 16, 32, 4, 2), Tile(32, 32, 16, 4, 2)),
        "fp64": (Tile(16, 16, 16, 4, 2),),
    },
    # The interpreter pays per program and operation, not per element.
    "interpret": {kind: (Tile(16, 64, 64, 1),) for kind in ("half", "fp32", "fp64")},
}
_STEPS["sm_90"] = _STEPS["sm_120"] = _STEPS["sm_80"]

# kind -> the most units of a whole sequence in one program, for LSTM, GRU and RNN; rows and depth.
_LOOPS = {
    "half": (128, Tile(16, 0, 0, 8)),  # weight_hh in registers: 128 KiB of an LSTM
    "fp32": (128, Tile(4, 0, 16, 8)),
    "fp64": (64, Tile(16, 0, 16, 8)),
}


def step_tile(kind: str, batch: int) -> Tile:
    """For one step of a launch of its own.

    Args:
        kind: half, fp32 or fp64.
    """
    tiles = _STEPS[architecture()][kind]
    return next((tile for tile in tiles if batch <= tile.rows), tiles[-1])


def loop_tile(kind: str, hidden: int, *, backward: bool) -> Tile | None:
    """For whole sequences of so many units in one program, or None where they are too many.

    A depth of 0 says that weight_hh stays in registers.
    """
    most, tile = _LOOPS[kind]
    if hidden > most:
        return None
    units = max(16, triton.next_power_of_2(hidden))
    if triton.knobs.runtime.interpret:
        return dataclasses.replace(tile, rows=16, units=units, num_warps=1)
    return dataclasses.replace(tile, units=units)
