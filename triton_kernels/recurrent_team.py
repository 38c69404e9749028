"""Programs that make a whole sequence together: how they wait for each other, and weights that they keep.

The launch is cooperative, so all programs run at once. Those with the same rows of the batch form a team: each owns a
part of the units, and a step needs the states that all of them stored in the step before. A team has a counter of the
steps that its programs have finished, 0 before the launch. It only grows, so nothing has to be set back between steps,
and a program may be a step ahead of another. Every step is stored at a place of its own: nobody overwrites what another
still reads.
"""

import triton
import triton.language as tl

from .recurrent_cells import dot

COUNTER_STRIDE: tl.constexpr = tl.constexpr(32)  # int32 between the counters of two teams: a cache line


@triton.jit
def wait(counter, arrivals):
    """Until the counter has come to `arrivals`; then what was stored before those arrivals can be read.

    One thread asks, acquiring, and hands the answer to the others across a barrier: their loads come after it.
    """
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < arrivals:
        pass


@triton.jit
def arrive(counter):
    """This program's stores are done, and will be seen by who waits for this arrival."""
    tl.debug_barrier()  # the release is one thread's: without this, stores of other warps may still be on their way
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def keep(p_w, size, stride, in_columns, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr):
    """The right operand of `kept_product`, loaded once: CHUNKS tiles of BLOCK_K rows. p_w: (1, columns), of row 0.

    The compiler keeps it in shared memory.
    """
    kept = ()
    for i in tl.static_range(CHUNKS):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
        kept += (tl.load(p_w + k.to(tl.int64) * stride, mask=in_columns & (k < size), other=0.0),)
    return kept


@triton.jit
def kept_product(p_a, kept, size, in_batch, acc, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr):
    """acc + a kept. p_a: (BLOCK_B, 1) rows of a, which other programs stored: read from the L2 cache, all at once."""
    if size > 0:
        rows = ()
        for i in tl.static_range(CHUNKS):
            k = i * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
            rows += (tl.load(p_a + k, mask=in_batch & (k < size), other=0.0, cache_modifier=".cg"),)
        for i in tl.static_range(CHUNKS):
            acc = dot(rows[i], kept[i], acc)
    return acc


@triton.jit
def apart(values, BLOCK_H: tl.constexpr, SLOTS: tl.constexpr):
    """(BLOCK_B, BLOCK_H) for each of the SLOTS values of a unit, which stand side by side; the only one repeated."""
    if SLOTS == 1:
        return values, values, values, values
    else:
        even, odd = tl.split(tl.reshape(values, [values.shape[0], BLOCK_H, 2, 2]))
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
        return v0, v1, v2, v3
