"""Tiles of attention's kernels for each architecture, pass and width: committed, so that no first call is a search.

Chosen by the resources that the compilers report (registers, shared memory, no spills); no GPU has measured them yet. A
tile depends on the head dimensions and the dtype, never on the batch: the order of a sum would change with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch
import triton

from .conv2d_configs import architecture


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows that a program owns, rows that it streams at a time, and how it is run.

    Args:
        step: columns of a piece of a product over the head dimension; 0 where whole rows stay on the chip.
        width: columns of a result that a program owns at most.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int = 1
    step: int = 0
    width: int = 256

    @property
    def options(self) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # A thread may take all the registers it can have: ptxas saves some for more programs, to the point of spilling.
        return options | ({"maxnreg": min(255, 2048 // self.num_warps)} if architecture().startswith("sm_") else {})


# fp32 and fp64 are read in pieces of 16 columns, and their sums are short ones.
_FP32 = {
    "forward": (Tile(32, 16, 4, step=16), Tile(32, 16, 8, step=16)),
    "queries": (Tile(32, 16, 4, step=16), Tile(32, 16, 8, step=16)),
    "keys": (Tile(32, 16, 8, step=16), Tile(32, 16, 8, step=16, width=64)),
    "mask": (Tile(32, 16, 4, step=16),),
    "split": (Tile(16, 32, 4, step=16),),
}
_FP64 = {
    **dict.fromkeys(("forward", "queries", "mask"), (Tile(16, 16, 4, step=16, width=64),)),
    "keys": (Tile(16, 16, 4, step=16, width=32),),
}
# architecture -> kind -> pass -> tiles of head dimensions up to 64, 128 and 256. plain: a forward without options but
# causality, which take registers. split: a forward over parts of the keys, of few rows.
_TILES: dict[str, dict[str, dict[str, tuple[Tile, ...]]]] = {
    "sm_80": {
        "half": {
            "plain": (Tile(128, 32, 8, 2), Tile(64, 64, 8), Tile(32, 32, 8)),
            "forward": (Tile(64, 32, 8), Tile(64, 32, 8), Tile(32, 32, 8)),
            "queries": (Tile(32, 32, 4), Tile(32, 32, 8), Tile(16, 32, 8)),
            "keys": (Tile(32, 32, 4), Tile(32, 32, 8), Tile(16, 32, 8)),
            "mask": (Tile(16, 32, 4), Tile(16, 32, 4), Tile(16, 32, 8)),
            "split": (Tile(16, 64, 4), Tile(16, 64, 4), Tile(16, 32, 4)),
        },
        "fp32": _FP32,
        "fp64": _FP64,
    },
    "sm_90": {
        "half": {
            "plain": (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8)),
            "forward": (Tile(64, 32, 8), Tile(32, 32, 8), Tile(32, 32, 8)),
            "queries": (Tile(32, 32, 4), Tile(32, 32, 8), Tile(16, 32, 8)),
            "keys": (Tile(32, 32, 4), Tile(32, 32, 8), Tile(16, 32, 8)),
            "mask": (Tile(16, 32, 4), Tile(16, 32, 4), Tile(16, 32, 8)),
            "split": (Tile(16, 64, 4), Tile(16, 64, 4), Tile(16, 32, 4)),
        },
        "fp32": _FP32,
        "fp64": _FP64,
    },
    "gfx942": {
        "half": {
            "forward": (Tile(32, 32, 4), Tile(32, 32, 4), Tile(16, 32, 4)),
            "queries": (Tile(16, 32, 4), Tile(16, 32, 4), Tile(16, 32, 4)),
            "keys": (Tile(16, 32, 4), Tile(16, 32, 4), Tile(16, 16, 4)),
            "mask": (Tile(16, 32, 4),),
        },
        "fp32": {
            "forward": (Tile(16, 16, 4, step=16),),
            "queries": (Tile(16, 16, 4, step=16),),
            "keys": (Tile(16, 16, 4, step=16), Tile(16, 16, 4, step=16, width=64)),
            "mask": (Tile(16, 16, 4, step=16),),
        },
        "fp64": _FP64,
    },
    # The interpreter pays per program and operation, not per element; float32 has the short sums of the others.
    "interpret": {
        kind: dict.fromkeys(("forward", "queries", "keys", "mask"), (tile,))
        for kind, tile in (
            ("half", Tile(128, 128, 1)),
            ("fp32", Tile(128, 16, 1, step=16)),
            ("fp64", Tile(128, 128, 1, step=64)),
        )
    },
}
_TILES["sm_120"] = _TILES["sm_80"]


@dataclasses.dataclass(frozen=True)
class GluonTile:
    """Keys of a tile, and tiles of keys and of values that have room in shared memory."""

    columns: int
    num_stages: int


# Whether the Gluon kernel serves the forwards that it covers on sm_90. No GPU has run it yet. `make gpu` there compares
# it with the CPU kernels (gpu_check.launches, in the self-check and under compute-sanitizer), tests it (`[triton` of
# tests/test_scaled_dot_product_attention_gluon.py) and times it (rows `pynn gluon` of bench/results/<device>.csv).
# To be True when, on that device, all of these pass and the median of `pynn gluon` is below that of `pynn triton` in
# most forward rows and nowhere more than 3 % above it, causal rows and the smallest sizes among them, where the second
# launch for tiles that are not finite counts most. Otherwise it stays False, or `covers` leaves out what was slower.
gluon_on_sm_90 = False
GLUON_TILES = {64: GluonTile(128, 4), 128: GluonTile(128, 2)}  # head dimension -> tile
SECTION_BYTES = 32 << 20  # of keys and values that are read again and again, of 50 MB of L2 cache

_WIDTHS = (64, 128, 256)
# Wider heads: products in pieces, the result in columns of several programs.
_WIDE = {"nvidia": Tile(32, 32, 8, step=64, width=64), "amd": Tile(16, 16, 4, step=64, width=64)}


def tile_of(kind: str, name: str, width: int, owned: int, streamed: int) -> Tile:
    """For a pass over heads of this width, the larger of the two head dimensions.

    Args:
        kind: half, fp32 or fp64.
        name: plain, forward, split, queries, keys or mask. The statistics take the tile of queries.
        owned, streamed: rows of the matrix that programs own, and of the one that they stream.
    """
    passes = _TILES[architecture()][kind]
    tiles = passes.get(name, passes["forward"])
    tile = tiles[min(sum(width > limit for limit in _WIDTHS), len(tiles) - 1)]
    if width > _WIDTHS[-1] and kind == "half":
        tile = _WIDE["amd" if architecture() == "gfx942" else "nvidia"]
    if architecture() == "interpret":
        return dataclasses.replace(tile, rows=_fitting(tile.rows, owned), columns=_fitting(tile.columns, streamed))
    return tile


@contextlib.contextmanager
def with_gluon() -> Iterator[None]:
    """Switches the Gluon kernel on inside the block, whatever has been measured."""
    global gluon_on_sm_90
    before, gluon_on_sm_90 = gluon_on_sm_90, True
    try:
        yield
    finally:
        gluon_on_sm_90 = before


def runs_gluon() -> bool:
    """Whether the Gluon kernel is switched on, and the target is the one that it is for."""
    if not gluon_on_sm_90 or triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch == 90


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; without one, of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _fitting(most: int, length: int) -> int:
    return min(most, max(16, triton.next_power_of_2(length)))
