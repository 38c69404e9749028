"""Backward kernels of recurrent layers: the gradients of the pre-activations, from the last step to the first.

step_bwd_kernel: a program owns BLOCK_B rows and BLOCK_H units of one step or, where its units are all there are, of the
whole sequence (LOOP): then gradients go through memory that only this program touches. With counters it is one of a
team that makes the whole sequence (recurrent_team.py).
resident_bwd_kernel: a program owns BLOCK_B rows of the whole sequence; weight_hh and what flows back stay in registers.

A step multiplies the gradients of the step after it by weight_hh, so the gradient of h0 takes one more step: s = -1.
Where a row is not alive its state stands still: gradients of h and c pass, those of pre-activations are 0 and are not
stored. Steps are counted as in recurrent_fwd.py.

Gradients of pre-activations lie in memory as i f g o of an LSTM and as n r z n' of a GRU, n' being the hidden share of
n: the last three are what weight_hh saw, the first three what weight_ih saw.
"""

import triton
import triton.language as tl

from .recurrent_cells import cell_backward, columns_product, dot, load4, store4, tanh
from .recurrent_fwd import before, rows_of
from .recurrent_team import COUNTER_STRIDE, arrive, keep, kept_product, wait

_kernel = triton.jit(do_not_specialize=["begin", "end", "steps", "batch", "hidden_units", "state_units"])


@triton.jit
def _step_of(s, steps, REVERSE: tl.constexpr):
    """t of a step s >= -1 and of the one that follows."""
    if REVERSE:
        return steps - 1 - s, steps - 2 - s
    else:
        return s, s + 1


@triton.jit
def _before(sequence, initial, row, t, length, batch, hidden, unit, alive, REVERSE: tl.constexpr):
    """The values of the step before t, those of `initial` where t is a row's first."""
    first, earlier = before(t, length, REVERSE)
    begins = alive & first
    p_earlier = sequence + (earlier.to(tl.int64) * batch + row) * hidden + unit
    given = tl.load(initial + row * hidden + unit, mask=begins, other=0.0)
    return tl.where(begins, given, tl.load(p_earlier, mask=alive & (begins == 0), other=0.0))


@triton.jit
def _saved(
    gates, cells, output, h0, c0, row, place, t, length, batch, hidden, unit, alive,
    CELL: tl.constexpr, REVERSE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """s0 .. s3, c and `before` of `cell_backward`."""
    if CELL < 2:
        s0, s1, s2, s3 = load4(gates + place * (4 * hidden) + unit, hidden, alive, 4)
        s0, s1, s2, s3 = s0.to(COMPUTE), s1.to(COMPUTE), s2.to(COMPUTE), s3.to(COMPUTE)
    else:
        s0 = tl.load(output + place * hidden + unit, mask=alive, other=0.0).to(COMPUTE)
        s1, s2, s3 = s0, s0, s0
    c, earlier = s0, s0
    if CELL == 0:
        c = tl.load(cells + place * hidden + unit, mask=alive, other=0.0)
        earlier = _before(cells, c0, row, t, length, batch, hidden, unit, alive, REVERSE)
    elif CELL == 1:
        earlier = _before(output, h0, row, t, length, batch, hidden, unit, alive, REVERSE).to(COMPUTE)
    return s0, s1, s2, s3, c, earlier


@_kernel
def step_bwd_kernel(
    grad_gates, carry_in, carry_out, grad_c_in, grad_c_out, grad_output, gates, cells, output, h0, c0, weight, lengths,
    begin, end, steps, batch, hidden_units, state_units,
    CELL: tl.constexpr, REVERSE: tl.constexpr, LOOP: tl.constexpr, PACK: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    grad_states=None, hiddens=None, CELLS: tl.constexpr = True, counters=None, CHUNKS: tl.constexpr = 0,
):  # fmt: skip
    """Steps begin >= s > end, for all of h's gradient that does not come through the next step's gates: carry.

    carry, (batch, state), and grad_c, (batch, hidden), are in COMPUTE. With grad_states, a step of a projected LSTM is
    two launches: the gradient of h goes to grad_states, (steps, batch, state); then (CELLS) that, times weight_hr in
    the place of `weight`, is what o * tanh(c) gets, and o * tanh(c) is stored to hiddens, (steps, batch, hidden).

    counters: of the teams' arrivals, 0; programs of a cooperative launch. CHUNKS: if not 0, BLOCK_K times so many are
    the rows of the weight or more, and it stays on the chip.
    """
    GATES: tl.constexpr = 4 if CELL == 0 else 3 if CELL == 1 else 1
    STORED: tl.constexpr = 4 if CELL < 2 else 1  # gradients of a unit
    PROJECTED: tl.constexpr = grad_states is not None
    CACHE: tl.constexpr = "" if counters is None else ".cg"  # what other programs store is in the L2 cache
    hidden, state = hidden_units * PACK, state_units * PACK
    width = hidden if CELLS else state
    blocks = tl.cdiv(width, BLOCK_H)
    pid = tl.program_id(0)
    u = pid % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    unit, in_units = u[None, :], (u < width)[None, :]
    row, in_batch, length, longest = rows_of(pid // blocks, lengths, batch, steps, BLOCK_B)
    inside = in_batch & in_units
    own = row * width + unit
    if CHUNKS:
        kept = keep(weight + unit, GATES * hidden, state, in_units, BLOCK_K, CHUNKS)
    carry = tl.zeros([BLOCK_B, BLOCK_H], COMPUTE)
    dc = carry
    if not (PROJECTED and CELLS):
        carry = tl.load(carry_in + own, mask=inside, other=0.0)
    if CELL == 0 and CELLS:
        dc = tl.load(grad_c_in + own, mask=inside, other=0.0)
    last = steps - 1
    if REVERSE:
        end = tl.maximum(end, steps - longest - 2)
    else:
        last = longest - 1
        begin = tl.minimum(begin, last)

    for back in range(0, begin - end):
        s = begin - back
        t, after = _step_of(s, steps, REVERSE)
        place = t.to(tl.int64) * batch + row
        alive = inside & (t >= 0) & (t < length)
        if CELLS:  # they arrive while the product is made
            s0, s1, s2, s3, c, earlier = _saved(
                gates, cells, output, h0, c0, row, place, t, length, batch, hidden, unit, alive,
                CELL, REVERSE, COMPUTE,
            )  # fmt: skip
        if PROJECTED and CELLS:
            dh = columns_product(
                grad_states + place * state, weight + unit, state, hidden, in_batch & (t < length), in_units,
                COMPUTE, BLOCK_B, BLOCK_H, BLOCK_K, CACHE,
            )  # fmt: skip
        else:
            p_next = grad_gates + (after.to(tl.int64) * batch + row) * (STORED * hidden)
            if CELL == 1:
                p_next += hidden
            size = tl.where(s < last, GATES * hidden, 0)
            if counters is not None:
                wait(counters + pid // blocks * COUNTER_STRIDE, back * blocks)
            if CHUNKS:
                zero = tl.zeros([BLOCK_B, BLOCK_H], COMPUTE)
                dh = carry + kept_product(p_next, kept, size, in_batch & (after < length), zero, BLOCK_K, CHUNKS)
            else:
                dh = carry + columns_product(
                    p_next, weight + unit, size, state, in_batch & (after < length), in_units,
                    COMPUTE, BLOCK_B, BLOCK_H, BLOCK_K, CACHE,
                )  # fmt: skip
            if grad_output is not None:
                dh += tl.load(grad_output + place * state + unit, mask=alive, other=0.0).to(COMPUTE)
        if PROJECTED and not CELLS:
            tl.store(grad_states + place * state + unit, dh.to(grad_states.dtype.element_ty), mask=alive)
            carry = tl.where(alive, 0.0, dh)
        else:
            d0, d1, d2, d3, new_dc, past = cell_backward(dh, dc, s0, s1, s2, s3, c, earlier, CELL)
            store4(grad_gates + place * (STORED * hidden) + unit, hidden, d0, d1, d2, d3, alive, STORED)
            dc = tl.where(alive, new_dc, dc)
            carry = tl.where(alive, past, dh)
            if PROJECTED:
                h = s3 * tanh(c)
                tl.store(hiddens + place * hidden + unit, h.to(hiddens.dtype.element_ty), mask=alive)
        if LOOP:
            tl.debug_barrier()  # the next step reads these gradients
        if counters is not None:
            arrive(counters + pid // blocks * COUNTER_STRIDE)
    if not (PROJECTED and CELLS):
        tl.store(carry_out + own, carry, mask=inside)
    if CELL == 0 and CELLS:
        tl.store(grad_c_out + own, dc, mask=inside)


@_kernel
def resident_bwd_kernel(
    grad_gates, carry_in, carry_out, grad_c_in, grad_c_out, grad_output, gates, cells, output, h0, c0, weight, lengths,
    begin, end, steps, batch, hidden_units,
    CELL: tl.constexpr, REVERSE: tl.constexpr, PACK: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """As step_bwd_kernel, for all steps and a state of at most BLOCK_H units."""
    GATES: tl.constexpr = 4 if CELL == 0 else 3 if CELL == 1 else 1
    STORED: tl.constexpr = 4 if CELL < 2 else 1
    dtype: tl.constexpr = grad_gates.dtype.element_ty
    hidden = hidden_units * PACK
    u = tl.arange(0, BLOCK_H)
    unit, in_units = u[None, :], (u < hidden)[None, :]
    row, in_batch, length, longest = rows_of(tl.program_id(0), lengths, batch, steps, BLOCK_B)
    inside = in_batch & in_units
    own = row * hidden + unit
    w0, w1, w2, w3 = load4(
        weight + u[:, None] * hidden + unit, hidden * hidden, (u < hidden)[:, None] & in_units, GATES
    )
    carry = tl.load(carry_in + own, mask=inside, other=0.0)
    dc = tl.zeros([BLOCK_B, BLOCK_H], COMPUTE)
    if CELL == 0:
        dc = tl.load(grad_c_in + own, mask=inside, other=0.0)
    if REVERSE:
        end = tl.maximum(end, steps - longest - 2)
    else:
        begin = tl.minimum(begin, longest - 1)

    g0 = tl.zeros([BLOCK_B, BLOCK_H], dtype)  # gradients that weight_hh saw, of the step after
    g1, g2, g3 = g0, g0, g0
    for back in range(0, begin - end):
        s = begin - back
        t, _ = _step_of(s, steps, REVERSE)
        place = t.to(tl.int64) * batch + row
        alive = inside & (t >= 0) & (t < length)
        s0, s1, s2, s3, c, earlier = _saved(
            gates, cells, output, h0, c0, row, place, t, length, batch, hidden, unit, alive,
            CELL, REVERSE, COMPUTE,
        )  # fmt: skip
        dh = dot(g0, w0, carry)
        if GATES > 1:
            dh = dot(g2, w2, dot(g1, w1, dh))
        if GATES > 3:
            dh = dot(g3, w3, dh)
        if grad_output is not None:
            dh += tl.load(grad_output + place * hidden + unit, mask=alive, other=0.0).to(COMPUTE)
        d0, d1, d2, d3, new_dc, past = cell_backward(dh, dc, s0, s1, s2, s3, c, earlier, CELL)
        store4(grad_gates + place * (STORED * hidden) + unit, hidden, d0, d1, d2, d3, alive, STORED)
        dc = tl.where(alive, new_dc, dc)
        carry = tl.where(alive, past, dh)
        if CELL == 1:
            d0, d1, d2 = d1, d2, d3
        g0 = tl.where(alive, d0, 0.0).to(dtype)
        g1, g2, g3 = g0, g0, g0
        if GATES > 1:
            g1, g2 = tl.where(alive, d1, 0.0).to(dtype), tl.where(alive, d2, 0.0).to(dtype)
        if GATES > 3:
            g3 = tl.where(alive, d3, 0.0).to(dtype)
    tl.store(carry_out + own, carry, mask=inside)
    if CELL == 0:
        tl.store(grad_c_out + own, dc, mask=inside)
