"""The tile of a program in a (batch, inner) tensor, see launch.py: its place, loads, stores and noise."""

import triton
import triton.language as tl

from .philox import normal4


@triton.jit
def tile_of(
    batch, units, tiles,
    PACK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SHIFTED: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Rows (ROWS, 1) int64, the element they begin with, columns (1 or ROWS, COLS), mask (ROWS, COLS).

    With one key for the whole draw and rows that are not whole quads (SHIFTED), a row begins in the middle of a quad:
    columns count from the start of that quad, so they begin below 0.
    """
    pid = tl.program_id(0)
    rows = ((pid // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    inner = units.to(INDEX) * PACK
    begin = rows * inner
    columns = ((pid % tiles).to(INDEX) * COLS + tl.arange(0, COLS))[None, :]
    mask = rows < batch
    if SHIFTED:
        columns = columns - (begin & 3).to(INDEX)
        mask = mask & (columns >= 0)
    mask = mask & (columns < inner)
    return rows, begin, columns, mask


@triton.jit
def noise_of(
    noise, key, rows, begin, columns, mask, batch, tiles,
    KEY_PER_ROW: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """The tile's noise (ROWS, COLS): given, or regenerated from the key(s), a quad of elements per Philox counter."""
    if noise is not None:
        z = tl.load(noise + begin + columns, mask=mask, other=0.0)
    else:
        if KEY_PER_ROW:
            seed = tl.load(key + 2 * rows, mask=rows < batch, other=0).to(tl.uint64, bitcast=True)
            first = tl.load(key + 2 * rows + 1, mask=rows < batch, other=0)
        else:
            seed = tl.load(key).to(tl.uint64, bitcast=True)
            first = tl.load(key + 1) + (begin >> 2)
        quads = (tl.program_id(0) % tiles).to(INDEX) * (COLS // 4)
        if PACK == 8:  # two quads per thread: the layout in which packs of 8 are loaded, so nothing is exchanged
            counter = (first + (quads + 2 * tl.arange(0, COLS // 8))[None, :]).to(tl.uint64, bitcast=True)
            a0, a1, a2, a3 = normal4(seed, counter)
            b0, b1, b2, b3 = normal4(seed, counter + 1)
            z0, z1, z2, z3 = tl.join(a0, b0), tl.join(a1, b1), tl.join(a2, b2), tl.join(a3, b3)
        else:
            counter = (first + (quads + tl.arange(0, COLS // 4))[None, :]).to(tl.uint64, bitcast=True)
            z0, z1, z2, z3 = normal4(seed, counter)
        z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [ROWS, COLS])
    return z.to(COMPUTE)


@triton.jit
def load(x, begin, columns, mask, COMPUTE: tl.constexpr):
    return tl.load(x + begin + columns, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def store(y, begin, columns, mask, value):
    tl.store(y + begin + columns, value.to(y.dtype.element_ty), mask=mask)
