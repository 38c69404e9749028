"""Attention, forward, for sm_90 in Gluon: 16-bit heads of 64 or 128, all scores or the causal ones, grouped heads.

A program has three parts that run at the same time and meet at barriers in shared memory. The producer has the copy
engine (TMA) bring tiles of queries, keys and values; each of two consumers, of one warpgroup, owns half of the rows of
a tile of queries. A consumer starts the product with the next tile of keys, then that of its last weights with their
values, and makes weights of the new scores while the tensor cores work on the values.

Programs stay: each takes one tile of queries after the other, and the producer runs ahead into the next one. Tiles of
keys are taken from the last one seen to the first, so that those with scores that take no part come first.

As in the other kernels, weights enter their product as a sum of two 16-bit numbers: rounded once, they would make an
error as large as the rounding of the result. That is three products for every two of FlashAttention-3 (Shah et al.
2024, arXiv 2407.08608), whose structure this is.

Barriers come in pairs, full and free, per tile of shared memory. Use number n of a tile waits for the parity of n in
`full` (what was to come has come), and of n - 1 in `free` (who read use n - 1 is done; the first passes at once).
"""

from __future__ import annotations

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import scaled_dot_product_attention_configs as configs
from .scaled_dot_product_attention_launch import MOST, Problem

INFINITY: gl.constexpr = gl.constexpr(float("inf"))
LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634074)
HALF = 64  # rows of a consumer: those of a product of a warpgroup
_REGISTERS = 240  # of a thread of a consumer; the producer's have what remains, 24
# Renamed in Triton 3.8; 3.9 has no longer the first names.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def turns_of(sizes, ROWS: gl.constexpr):
    """Tiles of queries of this program."""
    tiles = (sizes[0] + ROWS - 1) // ROWS * sizes[3]
    return (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def place_of(number, sizes, ROWS: gl.constexpr, COLS: gl.constexpr):
    """Head of all, its first query, tiles of keys in which all scores take part, and all tiles, of tile `number`.

    The heads of a section, whose keys and values fit into the L2 cache, are taken together; their last queries, which
    see the most keys of causal heads, come first.
    """
    queries, keys, all_heads, section, upper = sizes[0], sizes[1], sizes[3], sizes[4], sizes[5]
    row_tiles = (queries + ROWS - 1) // ROWS
    first_head = number // (section * row_tiles) * section
    inside = number % (section * row_tiles)
    width = gl.minimum(section, all_heads - first_head)
    row = (row_tiles - 1 - inside // width) * ROWS
    head = first_head + inside % width
    last = gl.minimum(row + ROWS, queries) - 1
    end = (gl.minimum(gl.maximum(last + upper + 1, 0), keys) + COLS - 1) // COLS
    whole = gl.minimum(gl.maximum(row + upper + 1, 0), keys) // COLS
    return head, row, whole, end


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, tiles, barriers, sizes, group,
    HALF: gl.constexpr, COLS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings every tile as soon as there is room for it."""
    q_tiles, k_tiles, v_tiles = tiles[0], tiles[1], tiles[2]
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    used = 0
    heads = sizes[2]
    for turn in range(0, turns_of(sizes, 2 * HALF)):
        number = turn * gl.num_programs(0) + gl.program_id(0)
        head, row, _whole, end = place_of(number, sizes, 2 * HALF, COLS)
        batch = head // heads
        key_head = head % heads // group
        for c in gl.static_range(2):
            mbarrier.wait(q_free.index(c), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(c), HALF * DIM * 2)
            load_tile(q_desc, [batch, head % heads, row + c * HALF, 0], q_full.index(c), q_tiles.index(c))
        for n in range(0, end):
            stage = used % STAGES
            free = ((used // STAGES) & 1) ^ 1
            key = (end - 1 - n) * COLS
            mbarrier.wait(k_free.index(stage), free)
            mbarrier.expect(k_full.index(stage), COLS * DIM * 2)
            load_tile(k_desc, [batch, key_head, key, 0], k_full.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_free.index(stage), free)
            mbarrier.expect(v_full.index(stage), COLS * DIM * 2)
            load_tile(v_desc, [batch, key_head, key, 0], v_full.index(stage), v_tiles.index(stage))
            used += 1


@gluon.jit
def weights_of(
    s, top, total, row, key, sizes, factor,
    CHECKED: gl.constexpr, CAUSAL: gl.constexpr, DTYPE: gl.constexpr, SCORES: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Scores become weights, as a sum of two numbers; the rows' maxima and totals, and what scales sums so far.

    CHECKED: some scores may take no part.
    """
    if CHECKED:
        j = key + gl.arange(0, s.shape[1], gl.SliceLayout(0, SCORES))[None, :]
        seen = j < sizes[1]
        if CAUSAL:
            i = row + gl.arange(0, s.shape[0], gl.SliceLayout(1, SCORES))[:, None]
            seen = seen & (j <= i + sizes[5])
        s = gl.where(seen, s, -INFINITY)
    most = gl.maximum(top, gl.max(s, 1) * factor)
    shift = gl.where(most == -INFINITY, 0.0, most)
    p = gl.exp2(s * factor - shift[:, None])
    correction = gl.exp2(top - shift)
    large = p.to(DTYPE)
    small = (p - large.to(gl.float32)).to(DTYPE)
    large, small = gl.convert_layout(large, WEIGHTS), gl.convert_layout(small, WEIGHTS)
    return large, small, most, total * correction + gl.sum(p, 1), correction


@gluon.jit
def consume_tile(
    acc, large, small, top, total, q_tile, tiles, barriers, used, row, key, sizes, factor,
    CHECKED: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, RESULT: gl.constexpr,
    WEIGHTS: gl.constexpr,
):  # fmt: skip
    """The sums with the values of tile used - 1, whose weights come in, and the weights of tile `used`."""
    k_tiles, v_tiles = tiles[1], tiles[2]
    k_full, k_free, v_full, v_free = barriers[2], barriers[3], barriers[4], barriers[5]
    HALF: gl.constexpr = acc.shape[0]
    COLS: gl.constexpr = k_tiles.shape[3]
    DIM: gl.constexpr = acc.shape[1]
    stage = used % STAGES
    last = (used - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (used // STAGES) & 1)
    nothing = gl.zeros([HALF, COLS], gl.float32, SCORES)
    b_k = k_tiles.index(stage).reshape([COLS, DIM]).permute([1, 0])
    s = warpgroup_mma(q_tile, b_k, nothing, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(last), ((used - 1) // STAGES) & 1)
    b_v = v_tiles.index(last).reshape([COLS, DIM])
    acc = warpgroup_mma(small, b_v, acc, is_async=True)
    acc = warpgroup_mma(large, b_v, acc, is_async=True)
    # The few tiles that are checked need the registers of weights that are under way.
    s = warpgroup_mma_wait(0 if CHECKED else 2, deps=(s,))
    mbarrier.arrive(k_free.index(stage), count=1)
    new_large, new_small, top, total, correction = weights_of(
        s, top, total, row, key, sizes, factor, CHECKED, CAUSAL, k_tiles.dtype, SCORES, WEIGHTS
    )
    acc, new_large, new_small = warpgroup_mma_wait(0, deps=(acc, new_large, new_small))
    mbarrier.arrive(v_free.index(last), count=1)
    acc = acc * gl.convert_layout(correction, gl.SliceLayout(1, RESULT))[:, None]
    return acc, new_large, new_small, top, total


@gluon.jit
def consume(
    o_desc, lse, spoiled, tiles, barriers, sizes, factor,
    CONSUMER: gl.constexpr, CAUSAL: gl.constexpr, HALF: gl.constexpr, COLS: gl.constexpr, DIM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Half of the rows of every tile of queries of this program."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    q_tiles, k_tiles, v_tiles, o_tiles = tiles
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    q_tile = q_tiles.index(CONSUMER).reshape([HALF, DIM])
    o_tile = o_tiles.index(CONSUMER)
    queries = sizes[0]
    used = 0
    for turn in range(0, turns_of(sizes, 2 * HALF)):
        number = turn * gl.num_programs(0) + gl.program_id(0)
        head, tile_row, whole, end = place_of(number, sizes, 2 * HALF, COLS)
        row = tile_row + CONSUMER * HALF
        acc = gl.zeros([HALF, DIM], gl.float32, RESULT)
        top = gl.full([HALF], -INFINITY, gl.float32, ROW)
        total = gl.zeros([HALF], gl.float32, ROW)
        mbarrier.wait(q_full.index(CONSUMER), turn & 1)
        if end > 0:
            stage = used % STAGES
            mbarrier.wait(k_full.index(stage), (used // STAGES) & 1)
            nothing = gl.zeros([HALF, COLS], gl.float32, SCORES)
            b_k = k_tiles.index(stage).reshape([COLS, DIM]).permute([1, 0])
            s = warpgroup_mma(q_tile, b_k, nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(k_free.index(stage), count=1)
            large, small, top, total, _correction = weights_of(
                s, top, total, row, (end - 1) * COLS, sizes, factor, True, CAUSAL, k_tiles.dtype, SCORES, WEIGHTS
            )
            checked = gl.maximum(end - whole, 1)
            if CAUSAL:
                for n in range(1, checked):
                    acc, large, small, top, total = consume_tile(
                        acc, large, small, top, total, q_tile, tiles, barriers, used + n, row, (end - 1 - n) * COLS,
                        sizes, factor, True, CAUSAL, STAGES, SCORES, RESULT, WEIGHTS,
                    )  # fmt: skip
            for n in range(checked, end):
                acc, large, small, top, total = consume_tile(
                    acc, large, small, top, total, q_tile, tiles, barriers, used + n, row, (end - 1 - n) * COLS,
                    sizes, factor, False, CAUSAL, STAGES, SCORES, RESULT, WEIGHTS,
                )  # fmt: skip
            used += end
            stage = (used - 1) % STAGES
            mbarrier.wait(v_full.index(stage), ((used - 1) // STAGES) & 1)
            b_v = v_tiles.index(stage).reshape([COLS, DIM])
            acc = warpgroup_mma(small, b_v, acc, is_async=True)
            acc = warpgroup_mma(large, b_v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(v_free.index(stage), count=1)
        mbarrier.arrive(q_free.index(CONSUMER), count=1)

        i = row + gl.arange(0, HALF, ROW)
        sums = gl.where(total == 0.0, -INFINITY, (top + gl.log2(total)) / LOG2_E)
        gl.store(lse + gl.cast(head, gl.int64) * queries + i, sums, mask=i < queries)
        divisor = gl.convert_layout(gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, RESULT))[:, None]
        result = gl.div_rn(acc, divisor + gl.zeros_like(acc))
        # An infinite value may have become NaN, and one that is not seen has: weights of 0 do not hide it.
        finite = gl.sum(gl.sum(result * 0.0, 1), 0) == 0.0
        halves = (queries + 2 * HALF - 1) // (2 * HALF) * 2
        gl.store(spoiled + head * halves + row // HALF, (finite == 0).to(gl.int32))
        tma.store_wait(0)
        o_tile.reshape([HALF, DIM]).store(result.to(o_tile.dtype))
        fence_async_shared()
        store_tile(o_desc, [head // sizes[2], head % sizes[2], row, 0], o_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["queries", "keys", "heads", "all_heads", "section", "upper", "group", "factor"])
def gluon_forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse, spoiled, queries, keys, heads, all_heads, section, upper, group, factor,
    CAUSAL: gl.constexpr, HALF: gl.constexpr, COLS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """out (batch, heads, queries, DIM), lse (batch * heads, queries) contiguous; spoiled (batch * heads, tiles of HALF
    queries): whether a result is not finite."""
    DTYPE: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 1, HALF, DIM], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, COLS, DIM], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, COLS, DIM], v_desc.layout)
    o_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 1, HALF, DIM], o_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(2):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_free.index(c), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    tiles = (q_tiles, k_tiles, v_tiles, o_tiles)
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    sizes = (queries, keys, heads, all_heads, section, upper)
    gl.warp_specialize(
        [
            (consume, (o_desc, lse, spoiled, tiles, barriers, sizes, factor, 0, CAUSAL, HALF, COLS, DIM, STAGES)),
            (consume, (o_desc, lse, spoiled, tiles, barriers, sizes, factor, 1, CAUSAL, HALF, COLS, DIM, STAGES)),
            (produce, (q_desc, k_desc, v_desc, tiles, barriers, sizes, group, HALF, COLS, DIM, STAGES)),
        ],
        [4, 4],
        [REGISTERS, 504 - 2 * REGISTERS],
    )


def covers(p: Problem) -> bool:
    """Whether this kernel can take the call; strides do not count, so that the same numbers give the same bits."""
    dim = p.query.shape[-1]
    if not p.is_plain or p.sinks is not None or p.kind != "half" or dim != p.value.shape[-1]:
        return False
    return dim in configs.GLUON_TILES and 1e-30 < p.scale < 1e30  # so that the largest product makes the largest score


def forward(p: Problem, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Writes out and lse of a problem that it covers, which is not empty.

    Returns:
        (heads, tiles of HALF queries) int32: where a result is not finite. A value that is infinite, or NaN and not
        seen, has spoiled those; they are to be computed by another kernel, which rounds otherwise.
    """
    tiles = triton.cdiv(p.queries, 2 * HALF)
    if p.queries + p.keys >= MOST or 2 * p.heads * tiles >= 2**31:
        raise RuntimeError("scaled_dot_product_attention: too large for one launch")
    dim, keys, (_, upper, _) = p.query.shape[-1], p.keys, p.window
    causal, tile = upper < keys - 1, configs.GLUON_TILES[dim]
    heads = p.query.shape[-3] if p.query.dim() > 2 else 1
    spoiled = p.query.new_empty((p.heads, 2 * tiles), dtype=torch.int32)
    section = max(1, configs.SECTION_BYTES // (4 * keys * dim)) * p.group
    with torch.cuda.device_of(p.query):
        gluon_forward_kernel[(min(p.heads * tiles, configs.processors(p.query.device)),)](
            q_desc=_descriptor(p.query, HALF), k_desc=_descriptor(p.key, tile.columns),
            v_desc=_descriptor(p.value, tile.columns), o_desc=_descriptor(out, HALF), lse=lse, spoiled=spoiled,
            queries=p.queries, keys=keys, heads=heads, all_heads=p.heads, section=min(section, p.heads),
            upper=upper, group=p.group, factor=p.scale * math.log2(math.e),
            CAUSAL=causal, HALF=HALF, COLS=tile.columns, DIM=dim, STAGES=tile.num_stages, REGISTERS=_REGISTERS,
            num_warps=4,
        )  # fmt: skip
    return spoiled


def _descriptor(t: torch.Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` rows of a head. Of t (..., H, L, D), or of a copy where the copy engine cannot read t: it wants
    rows that begin at multiples of 16 bytes."""
    t = t[(None,) * (4 - t.dim())] if t.dim() < 4 else t.flatten(0, -4)
    apart = [t.stride(d) for d in range(3) if t.shape[d] > 1]
    if t.stride(-1) != 1 or t.data_ptr() % 16 or any(stride <= 0 or stride * t.element_size() % 16 for stride in apart):
        t = t.clone(memory_format=torch.contiguous_format)
    strides = [t.stride(d) if t.shape[d] > 1 else t.shape[-1] for d in range(3)]
    block = [1, 1, rows, t.shape[-1]]
    dtype = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[t.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(t, list(t.shape), [*strides, 1], block, layout)
