"""Forward kernels of recurrent layers. weight_ih x of all steps comes computed; a kernel does what is recurrent.

step_kernel: a program owns BLOCK_B rows and BLOCK_H units, with all gates of a unit, of one step or, where its units
are all there are, of the whole sequence (LOOP): then h goes through memory that only this program touches. With
counters it is one of a team that makes the whole sequence (recurrent_team.py).
resident_kernel: a program owns BLOCK_B rows of the whole sequence; h and c stay in registers and weight_hh on the chip.
project_kernel: one step of h = weight_hr (o * tanh(c)).

Steps are counted in the order in which they are made; step s is at t = s, or steps - 1 - s if REVERSE. A row is alive
at t < lengths[row]; what is not alive is not stored: the caller's output is 0 there.
"""

import triton
import triton.language as tl

from .recurrent_cells import cell_forward, dot, load4, load_biases, pre_activations, rows_product, store4
from .recurrent_team import COUNTER_STRIDE, apart, arrive, keep, kept_product, wait

_kernel = triton.jit(do_not_specialize=["slot", "begin", "end", "steps", "batch", "hidden_units", "state_units"])


@triton.jit
def rows_of(block, lengths, batch, steps, BLOCK_B: tl.constexpr):
    """Of a block of rows, (BLOCK_B, 1): int64 index, mask, length; and the longest length."""
    row = (block.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    in_batch = row < batch
    if lengths is None:
        return row, in_batch, tl.where(in_batch, steps, 0), steps
    else:
        length = tl.load(lengths + row, mask=in_batch, other=0)
        length = tl.minimum(tl.maximum(length, 0), steps).to(tl.int32)
        return row, in_batch, length, tl.max(tl.max(length, axis=1), axis=0)


@triton.jit
def before(t, length, REVERSE: tl.constexpr):
    """Whether t is a row's first step, and the step before it."""
    if REVERSE:
        return t >= length - 1, t + 1
    else:
        return t == 0, t - 1


@triton.jit
def is_last(t, length, REVERSE: tl.constexpr):
    if REVERSE:
        return t == 0
    else:
        return t == length - 1


@_kernel
def step_kernel(
    output, h_n, gates, cells, products, weight, bias_ih, bias_hh, states, slot, c_in, c_out, lengths,
    begin, end, steps, batch, hidden_units, state_units,
    CELL: tl.constexpr, REVERSE: tl.constexpr, PROJECTED: tl.constexpr, LOOP: tl.constexpr, PACK: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    hiddens=None, counters=None, CHUNKS: tl.constexpr = 0,
):  # fmt: skip
    """Steps begin <= s < end. gates, cells: None if not saved. c_in, c_out: (batch, hidden), in COMPUTE; LSTM only.

    states: (..., batch, state): h0 at `slot`, and h of the other steps: the memory of `output`, longer by h0.
    PROJECTED: o * tanh(c) goes to hiddens (batch, hidden) instead of the output and h_n.
    counters: of the teams' arrivals, 0; programs of a cooperative launch. CHUNKS: if not 0, BLOCK_K times so many are
    the columns of the weight or more, and it stays on the chip, with gates side by side.
    """
    GATES: tl.constexpr = 4 if CELL == 0 else 3 if CELL == 1 else 1
    SLOTS: tl.constexpr = 1 if CELL >= 2 else 4
    CACHE: tl.constexpr = "" if counters is None else ".cg"  # what other programs store is in the L2 cache
    hidden, state = hidden_units * PACK, state_units * PACK
    blocks = tl.cdiv(hidden, BLOCK_H)
    pid = tl.program_id(0)
    u = pid % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    unit, in_units = u[None, :], (u < hidden)[None, :]
    row, in_batch, length, longest = rows_of(pid // blocks, lengths, batch, steps, BLOCK_B)
    inside = in_batch & in_units
    own = row * hidden + unit
    b0, b1, b2, b3 = load_biases(bias_ih, bias_hh, unit, in_units, hidden, CELL, COMPUTE)
    p_w = weight + u.to(tl.int64)[:, None] * state
    if CHUNKS:
        column = tl.arange(0, BLOCK_H * SLOTS)[None, :]
        of_unit, gate = pid % blocks * BLOCK_H + column // SLOTS, column % SLOTS
        p_kept = weight + (gate.to(tl.int64) * hidden + of_unit) * state
        kept = keep(p_kept, state, 1, (of_unit < hidden) & (gate < GATES), BLOCK_K, CHUNKS)
    c = tl.zeros([BLOCK_B, BLOCK_H], COMPUTE)
    if CELL == 0:
        c = tl.load(c_in + own, mask=inside, other=0.0)
    if REVERSE:
        begin = tl.maximum(begin, steps - longest)
    else:
        end = tl.minimum(end, longest)

    for s in range(begin, end):
        t = s
        if REVERSE:
            t = steps - 1 - s
        place = t.to(tl.int64) * batch + row
        alive = inside & (t < length)
        x0, x1, x2, x3 = load4(products + place * (GATES * hidden) + unit, hidden, alive, GATES)
        first, earlier = before(t, length, REVERSE)
        p_h = states + (tl.where(first, slot, earlier).to(tl.int64) * batch + row) * state
        if counters is not None:
            wait(counters + pid // blocks * COUNTER_STRIDE, (s - begin) * blocks)
        if CHUNKS:
            zero = tl.zeros([BLOCK_B, BLOCK_H * SLOTS], COMPUTE)
            a = kept_product(p_h, kept, state, in_batch & (t < length), zero, BLOCK_K, CHUNKS)
            a0, a1, a2, a3 = apart(a, BLOCK_H, SLOTS)
        else:
            a0, a1, a2, a3 = rows_product(
                p_h, p_w, hidden.to(tl.int64) * state, state, in_batch & (t < length), (u < hidden)[:, None],
                GATES, COMPUTE, BLOCK_B, BLOCK_H, BLOCK_K, CACHE,
            )  # fmt: skip
        h = c
        if CELL == 1:
            h = tl.load(p_h + unit, mask=alive, other=0.0).to(COMPUTE)
        a0, a1, a2, a3 = pre_activations(a0, a1, a2, a3, x0, x1, x2, x3, b0, b1, b2, b3, CELL, COMPUTE)
        s0, s1, s2, s3, new_c, h = cell_forward(a0, a1, a2, a3, c, h, CELL)
        if gates is not None:
            store4(gates + place * (4 * hidden) + unit, hidden, s0, s1, s2, s3, alive, 4)
        if CELL == 0:
            c = tl.where(alive, new_c, c)
            if cells is not None:
                tl.store(cells + place * hidden + unit, c, mask=alive)
        if PROJECTED:
            tl.store(hiddens + own, h.to(hiddens.dtype.element_ty), mask=alive)
        else:
            h = h.to(output.dtype.element_ty)
            tl.store(output + place * hidden + unit, h, mask=alive)
            tl.store(h_n + own, h, mask=alive & is_last(t, length, REVERSE))
        if LOOP:
            tl.debug_barrier()  # the next step reads this h
        if counters is not None:
            arrive(counters + pid // blocks * COUNTER_STRIDE)
    if CELL == 0:
        tl.store(c_out + own, c, mask=inside)


@_kernel
def project_kernel(
    output, h_n, hiddens, weight, lengths, begin, steps, batch, hidden_units, state_units,
    REVERSE: tl.constexpr, PACK: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h = weight hiddens of step `begin`. weight: (state, hidden), hiddens: (batch, hidden)."""
    hidden, state = hidden_units * PACK, state_units * PACK
    blocks = tl.cdiv(state, BLOCK_H)
    pid = tl.program_id(0)
    n = pid % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    row, in_batch, length, longest = rows_of(pid // blocks, lengths, batch, steps, BLOCK_B)
    t = begin
    if REVERSE:
        t = steps - 1 - begin
    if t < longest:
        alive = in_batch & (t < length)
        h, _, _, _ = rows_product(
            hiddens + row * hidden, weight + n.to(tl.int64)[:, None] * hidden, 0, hidden, alive, (n < state)[:, None],
            1, COMPUTE, BLOCK_B, BLOCK_H, BLOCK_K, "",
        )  # fmt: skip
        h = h.to(output.dtype.element_ty)
        mask, column = alive & (n < state)[None, :], n[None, :]
        tl.store(output + (t.to(tl.int64) * batch + row) * state + column, h, mask=mask)
        tl.store(h_n + row * state + column, h, mask=mask & is_last(t, length, REVERSE))


@_kernel
def resident_kernel(
    output, h_n, gates, cells, products, weight, bias_ih, bias_hh, h0, c_in, c_out, lengths,
    begin, end, steps, batch, hidden_units,
    CELL: tl.constexpr, REVERSE: tl.constexpr, PACK: tl.constexpr, AHEAD: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """As step_kernel, for all steps and a state of at most BLOCK_H units. AHEAD: reads what the next step needs."""
    GATES: tl.constexpr = 4 if CELL == 0 else 3 if CELL == 1 else 1
    dtype: tl.constexpr = output.dtype.element_ty
    hidden = hidden_units * PACK
    u = tl.arange(0, BLOCK_H)
    unit, in_units = u[None, :], (u < hidden)[None, :]
    row, in_batch, length, longest = rows_of(tl.program_id(0), lengths, batch, steps, BLOCK_B)
    inside = in_batch & in_units
    own = row * hidden + unit
    b0, b1, b2, b3 = load_biases(bias_ih, bias_hh, unit, in_units, hidden, CELL, COMPUTE)
    w0, w1, w2, w3 = load4(
        weight + u[:, None] * hidden + unit, hidden * hidden, (u < hidden)[:, None] & in_units, GATES
    )
    w0, w1, w2, w3 = tl.trans(w0), tl.trans(w1), tl.trans(w2), tl.trans(w3)
    h = tl.load(h0 + own, mask=inside, other=0.0)
    c = tl.zeros([BLOCK_B, BLOCK_H], COMPUTE)
    if CELL == 0:
        c = tl.load(c_in + own, mask=inside, other=0.0)
    t, ahead = begin, 1
    if REVERSE:
        begin = tl.maximum(begin, steps - longest)
        t, ahead = steps - 1 - begin, -1
    else:
        end = tl.minimum(end, longest)

    if AHEAD:
        p_x = products + (t.to(tl.int64) * batch + row) * (GATES * hidden) + unit
        x0, x1, x2, x3 = load4(p_x, hidden, inside & (t < length) & (begin < end), GATES)
    for s in range(begin, end):
        place = t.to(tl.int64) * batch + row
        alive = inside & (t < length)
        if AHEAD:
            p_x = products + ((t + ahead).to(tl.int64) * batch + row) * (GATES * hidden) + unit
            y0, y1, y2, y3 = load4(p_x, hidden, inside & (t + ahead < length) & (s + 1 < end), GATES)
        else:
            x0, x1, x2, x3 = load4(products + place * (GATES * hidden) + unit, hidden, alive, GATES)
        zero = tl.zeros([BLOCK_B, BLOCK_H], COMPUTE)
        a0, a1, a2, a3 = pre_activations(zero, zero, zero, zero, x0, x1, x2, x3, b0, b1, b2, b3, CELL, COMPUTE)
        a0 = dot(h, w0, a0)
        if GATES > 1:
            a1 = dot(h, w1, a1)
        if CELL == 0:
            a2 = dot(h, w2, a2)
            a3 = dot(h, w3, a3)
        elif CELL == 1:
            a3 = dot(h, w2, a3)
        s0, s1, s2, s3, new_c, new_h = cell_forward(a0, a1, a2, a3, c, h.to(COMPUTE), CELL)
        if gates is not None:
            store4(gates + place * (4 * hidden) + unit, hidden, s0, s1, s2, s3, alive, 4)
        if CELL == 0:
            c = tl.where(alive, new_c, c)
            if cells is not None:
                tl.store(cells + place * hidden + unit, c, mask=alive)
        h = tl.where(alive, new_h.to(dtype), h)
        tl.store(output + place * hidden + unit, h, mask=alive)
        if AHEAD:
            x0, x1, x2, x3 = y0, y1, y2, y3
        t += ahead
    tl.store(h_n + own, h, mask=inside)
    if CELL == 0:
        tl.store(c_out + own, c, mask=inside)
