"""Tiles of conv2d's kernels for each architecture and class of shape: committed, so that no first call is a search.

Chosen by the resources that the compilers report (registers, shared memory); no GPU has measured them yet. A tile
depends on the shape of a sample and the dtype, never on the batch: the order of a sum would change with it.
"""

from __future__ import annotations

import dataclasses

import triton


@dataclasses.dataclass(frozen=True)
class Tile:
    """Pixels, channels (or columns of the weight gradient) and length of a step, and how a program is run."""

    pixels: int
    channels: int
    step: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# architecture -> kind of product -> tiles of at most so many channels, narrowest first
_PRODUCTS = {
    "sm_80": {
        "half": (Tile(128, 32, 32, 4, 4), Tile(128, 64, 32, 4, 4), Tile(128, 128, 32, 8, 4)),
        "tf32": (Tile(128, 32, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(128, 64, 32, 4, 3)),
        "fp32": (Tile(64, 32, 16, 4, 3), Tile(64, 64, 16, 8, 3)),
        "fp64": (Tile(64, 32, 16, 4, 3),),
    },
    "sm_90": {
        "half": (Tile(128, 32, 64, 4, 3), Tile(128, 64, 64, 8, 4), Tile(128, 128, 64, 8, 4)),
        "tf32": (Tile(128, 32, 32, 4, 3), Tile(128, 64, 32, 4, 3), Tile(128, 128, 32, 8, 3)),
        "fp32": (Tile(64, 32, 16, 4, 3), Tile(64, 64, 16, 8, 3)),
        "fp64": (Tile(64, 32, 16, 4, 3),),
    },
    "sm_120": {
        "half": (Tile(128, 32, 32, 4, 3), Tile(128, 64, 32, 4, 3), Tile(128, 128, 32, 8, 3)),
        "tf32": (Tile(64, 32, 32, 4, 3), Tile(64, 64, 32, 4, 3)),
        "fp32": (Tile(64, 32, 16, 4, 3), Tile(64, 64, 16, 8, 3)),
        "fp64": (Tile(32, 32, 16, 4, 2),),
    },
    "gfx942": {
        "half": (Tile(128, 32, 32, 4, 2), Tile(128, 64, 32, 4, 2), Tile(128, 128, 32, 8, 2)),
        "tf32": (Tile(64, 32, 32, 4, 2), Tile(64, 64, 32, 4, 2)),
        "fp32": (Tile(64, 32, 16, 4, 2), Tile(64, 64, 16, 4, 2)),
        "fp64": (Tile(64, 32, 16, 4, 2),),
    },
    # The interpreter pays per program and operation, not per element.
    "interpret": {
        "half": (Tile(128, 16, 32, 1, 1), Tile(256, 64, 64, 1, 1)),
        "tf32": (Tile(256, 64, 32, 1, 1),),
        "fp32": (Tile(128, 16, 16, 1, 1), Tile(256, 64, 16, 1, 1)),
        "fp64": (Tile(128, 16, 16, 1, 1), Tile(256, 64, 64, 1, 1)),
    },
}

PROGRAMS = 132 * 4  # so many programs keep a large GPU busy; the same for all, the number of splits decides the bits
SPLIT_STEPS = 4  # a split has no fewer steps
MOST_REPEATS = 4  # how often a large matrix product may apply a prologue to the same pixel


def architecture() -> str:
    if triton.knobs.runtime.interpret:
        return "interpret"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    return "sm_80" if target.arch < 90 else "sm_90" if target.arch < 120 else "sm_120"


def product_tile(kind: str, channels: int, prologue: bool = False) -> Tile:
    """For the matrix products of the forward, the input gradient and the weight gradient.

    Args:
        kind: half, tf32, fp32 or fp64.
        channels: output channels of a group.
        prologue: whether the image is changed between its load and the product.
    """
    tiles = _PRODUCTS[architecture()][kind]
    tile = next((tile for tile in tiles if channels <= tile.channels), tiles[-1])
    if prologue and architecture() == "sm_120":  # what is loaded goes through registers, of which four warps lack some
        return dataclasses.replace(tile, num_warps=8)
    return tile


def weight_tile(kind: str, outputs: int, inputs: int) -> tuple[Tile, int, bool]:
    """For the weight gradient: the tile, whose `pixels` are the length of a step; columns; whether they are of one tap.

    Where a block of columns goes through several taps, each has its own mask: that takes registers.
    """
    tile = product_tile(kind, min(outputs, 64))
    tile = dataclasses.replace(tile, pixels=tile.step)
    if triton.knobs.runtime.interpret:
        return tile, 128, inputs >= 64
    columns = 64 if kind in ("half", "tf32") else 32
    by_tap = inputs >= columns // 2
    return tile, columns if by_tap else 32, by_tap


def direct_tile(channels: int, last: bool, itemsize: int, elements: int = 1024, one_channel: bool = True) -> Tile:
    """A block of pixels and channels of the kernels without a matrix product, the inner dimension of memory long.

    Args:
        channels: output channels of all groups.
        last: channels are the innermost dimension.
        itemsize: bytes of an element; a lane takes 16 at once.
        one_channel: each result reads one input channel, as in a depthwise convolution; otherwise every element may
            have a mask of its own, and a wave of 64 lanes takes fewer of them.
    """
    warps = 4
    if triton.knobs.runtime.interpret:
        elements, warps = 4096, 1
    elif architecture() == "gfx942":
        elements, warps = (elements, max(1, min(elements * itemsize // 1024, 4))) if one_channel else (elements // 2, 4)
    most = triton.next_power_of_2(channels)
    width = min(most, 64) if last else min(most, max(1, elements // 256))
    return Tile(elements // width, width, 1, warps, 2)


def row_tile(channels: int) -> Tile:
    """One pixel of many channels, for elementwise passes over tensors of one layout."""
    interpreted = triton.knobs.runtime.interpret
    return Tile(1, min(triton.next_power_of_2(channels), 4096 if interpreted else 2048), 1, 1 if interpreted else 4, 2)


def reduce_tile(channels: int, outputs: int) -> Tile:
    """`step` counts the input channels of a block; together about 2048 sums, in the same order for every layout."""
    width = min(triton.next_power_of_2(channels), 32)
    interpreted = triton.knobs.runtime.interpret
    pixels = max(1, (8192 if interpreted else 2048) // (width * outputs))
    return Tile(pixels, outputs, width, 1 if interpreted else 4, 2)


def sum_tile(channels: int, itemsize: int, elements: int, one_channel: bool = True) -> Tile:
    """A block of pixels and channels that is summed over pixels: the same one for every layout, as the sums show it."""
    tile = direct_tile(channels, True, itemsize, elements, one_channel)
    width = min(tile.channels, 32)
    return dataclasses.replace(tile, pixels=tile.pixels * tile.channels // width, channels=width)
