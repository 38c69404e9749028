"""How a kernel that works on rows of independent elements is cut into programs, and how it is launched.

A tensor is (batch, inner), one row per sample. A program owns a tile of ROWS x COLS elements; tiles of one row follow
each other on grid axis 0, which has room for 2^31 - 1 programs.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl


@dataclasses.dataclass(frozen=True)
class Config:
    """Elements of a tile and its rows at most (powers of two), and warps of the program that owns it."""

    tile: int
    rows: int
    num_warps: int


# Bytes of an element -> config. 16 elements per thread of a warp of 32 hide the coefficients of a row behind its noise
# and keep 32 bytes or more of each tensor in flight.
_CONFIGS = {
    "cuda": {2: Config(2048, 8, 4), 4: Config(2048, 8, 4), 8: Config(1024, 8, 4)},
    "hip": {2: Config(2048, 8, 4), 4: Config(2048, 8, 4), 8: Config(1024, 8, 4)},
    # The interpreter pays per program, not per element.
    "interpret": {size: Config(8192, 1024, 1) for size in (2, 4, 8)},
}
_SUMS = 512  # partial sums that a program of launch_sums adds at once
_INT32 = 2**31  # longer rows are indexed with 64 bits
_NARROW = 128  # columns; a narrower tile is not worth the lanes it saves


def config_for(itemsize: int) -> Config:
    """The launch config for elements of this many bytes on the current target."""
    if triton.knobs.runtime.interpret:
        return _CONFIGS["interpret"][itemsize]
    return _CONFIGS[triton.runtime.driver.active.get_current_target().backend][itemsize]


def columns_for(inner: int, tile: int) -> int:
    """Columns of a tile: as wide as possible with at most an eighth of the lanes beyond the row's end."""
    columns = min(max(8, triton.next_power_of_2(inner)), tile)
    while columns > _NARROW and triton.cdiv(inner, columns) * columns > inner + inner // 8:
        columns //= 2
    return columns


@dataclasses.dataclass(frozen=True)
class Rows:
    """A tensor of `batch` rows of `inner` elements; the tiling of it depends on `inner` and the dtype alone.

    Args:
        like: (batch, ...) tensor, not empty.
        shift: a row may begin up to three elements after the start of its first tile (see `diffusion._tile`).
        flat: the rows need not be told apart: the tensor is one long row.
    """

    like: torch.Tensor
    shift: bool = False
    flat: bool = False

    @property
    def batch(self) -> int:
        return 1 if self.flat else self.like.shape[0]

    @property
    def inner(self) -> int:
        return self.like.numel() // self.batch

    @property
    def pack(self) -> int:
        """Elements that stay together in every row: a 16-byte pack if possible, one Philox counter at least, or 1."""
        wanted = (8, 4) if self.like.element_size() == 2 else (4,)
        return next((size for size in wanted if self.inner % size == 0), 1)

    @property
    def shifted(self) -> bool:
        return self.shift and not self.flat and self.pack == 1

    @property
    def columns(self) -> int:
        return columns_for(self._padded, config_for(self.like.element_size()).tile)

    @property
    def rows(self) -> int:
        """Rows of a tile: each costs coefficients, so no more of them than fill the warps twice."""
        config = config_for(self.like.element_size())
        return min(config.tile // self.columns, config.rows * max(1, 32 // self.columns))

    @property
    def tiles(self) -> int:
        """Tiles of one row."""
        return triton.cdiv(self._padded, self.columns)

    @property
    def _padded(self) -> int:
        return self.inner + (3 if self.shifted else 0)

    def launch(self, kernel, *args, **constants) -> None:
        """Runs kernel(*args, batch, units, tiles, **constants, PACK, ...) on every tile.

        The row length is units * PACK, so that the compiler sees by what it is divisible. INDEX is the type of a
        column index, COMPUTE that of the arithmetic.
        """
        config = config_for(self.like.element_size())
        with torch.cuda.device_of(self.like):
            kernel[(triton.cdiv(self.batch, self.rows) * self.tiles,)](
                *args,
                self.batch,
                self.inner // self.pack,
                self.tiles,
                **constants,
                PACK=self.pack,
                ROWS=self.rows,
                COLS=self.columns,
                SHIFTED=self.shifted,
                INDEX=tl.int32 if self.inner + config.tile < _INT32 else tl.int64,
                COMPUTE=tl.float64 if self.like.dtype is torch.float64 else tl.float32,
                num_warps=config.num_warps,
                enable_fp_fusion=False,
            )

    def launch_sums(self, kernel, *args, **constants) -> None:
        """Runs kernel(*args, batch, inner, tiles, **constants, ROWS, COLS) on tiles of the (batch, tiles) sums."""
        columns = min(triton.next_power_of_2(self.tiles), _SUMS)
        rows = _SUMS // columns
        with torch.cuda.device_of(self.like):
            kernel[(triton.cdiv(self.batch, rows),)](
                *args,
                self.batch,
                self.inner,
                self.tiles,
                **constants,
                ROWS=rows,
                COLS=columns,
                num_warps=4,
                enable_fp_fusion=False,
            )
