"""One step of an LSTM with layer normalisation and its kin in Triton; see csrc/include/layer_norm_lstm.h.

The products are the library's. A program of the kernels owns a row of the batch and holds all its units, UNITS of them
with the padding to a power of two, so the sums over a row stay inside a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox import philox4x32
from .products import compute_dtype, product
from .recurrent import _states_before
from .recurrent_cells import sigmoid, tanh

MOST_UNITS = 8192  # a row's values in the registers of one program
STATISTICS = 6


@triton.jit
def is_dropped(p_key, plane, row, batch, o_unit, hidden, threshold):
    """Whether the word of each unit in a plane of random words is below the threshold."""
    groups = (hidden + 3) // 4
    counter = tl.load(p_key + 1) + (plane * batch + row) * groups + o_unit // 4
    w0, w1, w2, w3 = philox4x32(tl.load(p_key).to(tl.uint64, bitcast=True), counter.to(tl.uint64, bitcast=True))
    word = o_unit % 4
    low = tl.where(word == 0, w0, w1)
    high = tl.where(word == 2, w2, w3)
    return tl.where(word < 2, low, high).to(tl.int64) < threshold


@triton.jit
def kept(p_key, plane, row, batch, o_unit, hidden, rate, threshold, RANDOM: tl.constexpr, A: tl.constexpr):
    """What zoneout keeps of the old values."""
    if RANDOM:
        return is_dropped(p_key, plane, row, batch, o_unit, hidden, threshold).to(A)
    else:
        return tl.zeros_like(o_unit).to(A) + rate.to(A)


@triton.jit
def survivors(p_key, row, batch, o_unit, hidden, scale, threshold, A: tl.constexpr):
    """The factors of the dropout."""
    gone = is_dropped(p_key, row * 0, row, batch, o_unit, hidden, threshold)
    return tl.where(gone, 0.0, scale.to(A))


@triton.jit
def load_gates(p, o_unit, hidden, valid, COUPLED: tl.constexpr, A: tl.constexpr):
    """Rows of i f g o; f is i again where gates are coupled."""
    v0 = tl.load(p + o_unit, valid, 0.0).to(A)
    v1 = v0
    if COUPLED:
        v2 = tl.load(p + hidden + o_unit, valid, 0.0).to(A)
        v3 = tl.load(p + 2 * hidden + o_unit, valid, 0.0).to(A)
    else:
        v1 = tl.load(p + hidden + o_unit, valid, 0.0).to(A)
        v2 = tl.load(p + 2 * hidden + o_unit, valid, 0.0).to(A)
        v3 = tl.load(p + 3 * hidden + o_unit, valid, 0.0).to(A)
    return v0, v1, v2, v3


@triton.jit
def store_gates(p, o_unit, hidden, valid, v0, v1, v2, v3, COUPLED: tl.constexpr):
    tl.store(p + o_unit, v0.to(p.dtype.element_ty), valid)
    if COUPLED:
        tl.store(p + hidden + o_unit, v2.to(p.dtype.element_ty), valid)
        tl.store(p + 2 * hidden + o_unit, v3.to(p.dtype.element_ty), valid)
    else:
        tl.store(p + hidden + o_unit, v1.to(p.dtype.element_ty), valid)
        tl.store(p + 2 * hidden + o_unit, v2.to(p.dtype.element_ty), valid)
        tl.store(p + 3 * hidden + o_unit, v3.to(p.dtype.element_ty), valid)


@triton.jit
def add_gates(p, o_unit, hidden, valid, v0, v1, v2, v3, COUPLED: tl.constexpr):
    """Adds to sums of the compute type."""
    s0, s1, s2, s3 = load_gates(p, o_unit, hidden, valid, COUPLED, v0.dtype)
    store_gates(p, o_unit, hidden, valid, s0 + v0, s1 + v1, s2 + v2, s3 + v3, COUPLED)


@triton.jit
def sum_gates(v0, v1, v2, v3, COUPLED: tl.constexpr):
    """Over all gates of the row."""
    if COUPLED:
        return tl.sum(v0 + v2 + v3, 0)
    else:
        return tl.sum((v0 + v1) + (v2 + v3), 0)


@triton.jit
def moments_of_gates(v0, v1, v2, v3, valid, width, eps, COUPLED: tl.constexpr):
    mean = sum_gates(v0, v1, v2, v3, COUPLED) / width
    d0, d1 = tl.where(valid, v0 - mean, 0.0), tl.where(valid, v1 - mean, 0.0)
    d2, d3 = tl.where(valid, v2 - mean, 0.0), tl.where(valid, v3 - mean, 0.0)
    square = sum_gates(d0 * d0, d1 * d1, d2 * d2, d3 * d3, COUPLED) / width
    return mean, 1.0 / tl.sqrt(square + eps)


@triton.jit
def normalised(v0, v1, v2, v3, mean, scale):
    return (v0 - mean) * scale, (v1 - mean) * scale, (v2 - mean) * scale, (v3 - mean) * scale


@triton.jit
def gates_of(
    x0, x1, x2, x3, y0, y1, y2, y3, p_bias, p_norm_ih, p_norm_hh, p_peephole, b_c, o_unit, hidden, valid,
    COUPLED: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """i, f, g, o and the new c before zoneout; x and y are the shares of input and state, with the norm normalised."""
    if p_norm_ih is not None:
        g0, g1, g2, g3 = load_gates(p_norm_ih, o_unit, hidden, valid, COUPLED, A)
        x0, x1, x2, x3 = x0 * g0, x1 * g1, x2 * g2, x3 * g3
        g0, g1, g2, g3 = load_gates(p_norm_hh, o_unit, hidden, valid, COUPLED, A)
        y0, y1, y2, y3 = y0 * g0, y1 * g1, y2 * g2, y3 * g3
    a0, a1, a2, a3 = x0 + y0, x1 + y1, x2 + y2, x3 + y3
    if p_bias is not None:
        g0, g1, g2, g3 = load_gates(p_bias, o_unit, hidden, valid, COUPLED, A)
        a0, a1, a2, a3 = a0 + g0, a1 + g1, a2 + g2, a3 + g3
    if p_peephole is not None:
        a0 += tl.load(p_peephole + o_unit, valid, 0.0).to(A) * b_c
        if not COUPLED:
            a1 += tl.load(p_peephole + hidden + o_unit, valid, 0.0).to(A) * b_c
    b_i = sigmoid(a0)
    if COUPLED:
        b_f = 1.0 - b_i
    else:
        b_f = sigmoid(a1)
    b_g = tanh(a2)
    b_new = b_f * b_c + b_i * b_g
    if p_peephole is not None:
        LAST: tl.constexpr = 1 if COUPLED else 2
        a3 += tl.load(p_peephole + LAST * hidden + o_unit, valid, 0.0).to(A) * b_new
    return b_i, b_f, b_g, sigmoid(a3), b_new


@triton.jit
def through_norm(
    p_to, p_gain, o_unit, hidden, valid, d0, d1, d2, d3, n0, n1, n2, n3, scale, COUPLED: tl.constexpr
):  # fmt: skip
    """Writes the gradient of a share from that of its normalised and scaled form; n0 .. n3 are normalised."""
    g0, g1, g2, g3 = load_gates(p_gain, o_unit, hidden, valid, COUPLED, d0.dtype)  # 0 outside: so are the sums there
    g0, g1, g2, g3 = g0 * d0, g1 * d1, g2 * d2, g3 * d3
    width = hidden * (3 if COUPLED else 4)
    mean = sum_gates(g0, g1, g2, g3, COUPLED) / width
    along = sum_gates(g0 * n0, g1 * n1, g2 * n2, g3 * n3, COUPLED) / width
    store_gates(
        p_to, o_unit, hidden, valid, (g0 - mean - n0 * along) * scale, (g1 - mean - n1 * along) * scale,
        (g2 - mean - n2 * along) * scale, (g3 - mean - n3 * along) * scale, COUPLED,
    )  # fmt: skip


@triton.jit
def length_of(p_lengths, row, steps):
    if p_lengths is None:
        return steps
    else:
        return tl.minimum(tl.maximum(tl.load(p_lengths + row), 0), steps)


@triton.jit
def drop_kernel(
    p_h, p_out, p_key, steps, batch, hidden, p_scale, threshold, UNITS: tl.constexpr, A: tl.constexpr
):  # fmt: skip
    """out = h after the dropout, the same mask at all steps."""
    row = tl.program_id(0).to(tl.int64)
    o_unit = tl.arange(0, UNITS)
    valid = o_unit < hidden
    b_factor = survivors(p_key, row, batch, o_unit, hidden, tl.load(p_scale), threshold, A)
    for t in range(steps):
        o = (t * batch + row) * hidden + o_unit
        tl.store(p_out + o, (tl.load(p_h + o, valid, 0.0).to(A) * b_factor).to(p_out.dtype.element_ty), valid)


@triton.jit(do_not_specialize=["t"])
def forward_kernel(
    p_ih, p_hh, p_bias, p_norm_ih, p_norm_hh, p_norm_cell, p_norm_cell_bias, p_peephole, p_lengths, p_key,
    p_output, p_h, p_c, p_operand, p_cells, p_statistics, t, steps, batch, hidden, p_rates,
    hidden_threshold, cell_threshold, dropout_threshold,
    COUPLED: tl.constexpr, RANDOM_HIDDEN: tl.constexpr, RANDOM_CELL: tl.constexpr, UNITS: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """A row's next state. p_rates: eps, zoneout_hidden, zoneout_cell and the dropout's factor, in the compute type."""
    row = tl.program_id(0).to(tl.int64)
    GATES: tl.constexpr = 3 if COUPLED else 4
    STATS: tl.constexpr = 6
    width = GATES * hidden
    o_unit = tl.arange(0, UNITS)
    valid = o_unit < hidden
    i_t = row * 0 + t  # 64 bits
    place = i_t * batch + row
    o_state = row * hidden + o_unit
    if t >= length_of(p_lengths, row, steps):
        tl.store(p_output + place * hidden + o_unit, tl.zeros([UNITS], p_output.dtype.element_ty), valid)
    else:
        eps, rate_h, rate_c = tl.load(p_rates), tl.load(p_rates + 1), tl.load(p_rates + 2)
        b_c = tl.load(p_c + o_state, valid, 0.0)
        x0, x1, x2, x3 = load_gates(p_ih + place * width, o_unit, hidden, valid, COUPLED, A)
        y0, y1, y2, y3 = load_gates(p_hh + row * width, o_unit, hidden, valid, COUPLED, A)
        if p_norm_ih is not None:
            mean_ih, scale_ih = moments_of_gates(x0, x1, x2, x3, valid, width, eps, COUPLED)
            mean_hh, scale_hh = moments_of_gates(y0, y1, y2, y3, valid, width, eps, COUPLED)
            x0, x1, x2, x3 = normalised(x0, x1, x2, x3, mean_ih, scale_ih)
            y0, y1, y2, y3 = normalised(y0, y1, y2, y3, mean_hh, scale_hh)
        _, _, _, b_o, b_new = gates_of(
            x0, x1, x2, x3, y0, y1, y2, y3, p_bias, p_norm_ih, p_norm_hh, p_peephole, b_c, o_unit, hidden, valid,
            COUPLED, A,
        )  # fmt: skip
        b_seen = b_new
        if p_norm_ih is not None:
            mean = tl.sum(tl.where(valid, b_new, 0.0), 0) / hidden
            b_centred = tl.where(valid, b_new - mean, 0.0)
            scale = 1.0 / tl.sqrt(tl.sum(b_centred * b_centred, 0) / hidden + eps)
            b_seen = b_centred * scale * tl.load(p_norm_cell + o_unit, valid, 0.0).to(A)
            if p_norm_cell_bias is not None:
                b_seen += tl.load(p_norm_cell_bias + o_unit, valid, 0.0).to(A)
            if p_statistics is not None:
                p_to = p_statistics + place * STATS
                tl.store(p_to, mean_ih)
                tl.store(p_to + 1, scale_ih)
                tl.store(p_to + 2, mean_hh)
                tl.store(p_to + 3, scale_hh)
                tl.store(p_to + 4, mean)
                tl.store(p_to + 5, scale)
        b_keep_h = kept(
            p_key, 1 + 2 * i_t, row, batch, o_unit, hidden, rate_h, hidden_threshold, RANDOM_HIDDEN, A
        )  # fmt: skip
        b_keep_c = kept(p_key, 2 + 2 * i_t, row, batch, o_unit, hidden, rate_c, cell_threshold, RANDOM_CELL, A)
        b_new = b_keep_c * b_c + (1.0 - b_keep_c) * b_new
        b_old = tl.load(p_h + o_state, valid, 0.0).to(A)
        b_h = (b_keep_h * b_old + (1.0 - b_keep_h) * (b_o * tanh(b_seen))).to(p_h.dtype.element_ty)
        tl.store(p_c + o_state, b_new, valid)
        if p_cells is not None:
            tl.store(p_cells + place * hidden + o_unit, b_new, valid)
        tl.store(p_h + o_state, b_h, valid)
        tl.store(p_output + place * hidden + o_unit, b_h, valid)
        if p_operand is not None:
            b_factor = survivors(p_key, row, batch, o_unit, hidden, tl.load(p_rates + 3), dropout_threshold, A)
            tl.store(p_operand + o_state, (b_h.to(A) * b_factor).to(p_operand.dtype.element_ty), valid)


@triton.jit(do_not_specialize=["t"])
def backward_kernel(
    p_grad_output, p_ih, p_hh, p_c0, p_cells, p_statistics, p_bias, p_norm_ih, p_norm_hh, p_norm_cell, p_norm_cell_bias,
    p_peephole, p_lengths, p_key, p_grad_operand, p_grad_h, p_grad_c, p_grad_ih, p_grad_hh, p_sums,
    t, steps, batch, hidden, sums_width, at_norm_ih, at_norm_hh, at_norm_cell, at_norm_cell_bias, at_peephole, p_rates,
    hidden_threshold, cell_threshold, dropout_threshold,
    COUPLED: tl.constexpr, RANDOM_HIDDEN: tl.constexpr, RANDOM_CELL: tl.constexpr, DROPOUT: tl.constexpr,
    REVERSE: tl.constexpr, UNITS: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """A row's gradients: of both products, of the states before, and its part of the sums. t is -1 after the last."""
    row = tl.program_id(0).to(tl.int64)
    GATES: tl.constexpr = 3 if COUPLED else 4
    STATS: tl.constexpr = 6
    width = GATES * hidden
    o_unit = tl.arange(0, UNITS)
    valid = o_unit < hidden
    i_t = row * 0 + t  # 64 bits
    place = i_t * batch + row
    o_state = row * hidden + o_unit
    b_dh = tl.load(p_grad_h + o_state, valid, 0.0)
    if p_grad_operand is not None:
        b_operand = tl.load(p_grad_operand + o_state, valid, 0.0)
        if DROPOUT:
            b_operand *= survivors(p_key, row, batch, o_unit, hidden, tl.load(p_rates + 3), dropout_threshold, A)
        b_dh += b_operand
        tl.store(p_grad_h + o_state, b_dh, valid)
    length = length_of(p_lengths, row, steps)
    p_to_ih, p_to_hh = p_grad_ih + place * width, p_grad_hh + place * width
    if t >= length:
        b_none = tl.zeros([UNITS], A)
        store_gates(p_to_ih, o_unit, hidden, valid, b_none, b_none, b_none, b_none, COUPLED)
        store_gates(p_to_hh, o_unit, hidden, valid, b_none, b_none, b_none, b_none, COUPLED)
    elif t >= 0:
        rate_h, rate_c = tl.load(p_rates + 1), tl.load(p_rates + 2)
        if REVERSE:
            before = tl.where(i_t + 1 < length, i_t + 1, -1)
        else:
            before = i_t - 1
        started = valid & (before < 0)
        b_c = tl.load(p_cells + (before * batch + row) * hidden + o_unit, valid & (before >= 0), 0.0)
        b_c += tl.load(p_c0 + o_state, started, 0.0)
        x0, x1, x2, x3 = load_gates(p_ih + place * width, o_unit, hidden, valid, COUPLED, A)
        y0, y1, y2, y3 = load_gates(p_hh + place * width, o_unit, hidden, valid, COUPLED, A)
        if p_norm_ih is not None:
            p_from = p_statistics + place * STATS
            mean_ih, scale_ih, mean_hh, scale_hh = (
                tl.load(p_from), tl.load(p_from + 1), tl.load(p_from + 2), tl.load(p_from + 3)
            )  # fmt: skip
            mean, scale = tl.load(p_from + 4), tl.load(p_from + 5)
            x0, x1, x2, x3 = normalised(x0, x1, x2, x3, mean_ih, scale_ih)
            y0, y1, y2, y3 = normalised(y0, y1, y2, y3, mean_hh, scale_hh)
        b_i, b_f, b_g, b_o, b_new = gates_of(
            x0, x1, x2, x3, y0, y1, y2, y3, p_bias, p_norm_ih, p_norm_hh, p_peephole, b_c, o_unit, hidden, valid,
            COUPLED, A,
        )  # fmt: skip
        b_seen = b_new
        if p_norm_ih is not None:
            b_normed = tl.where(valid, (b_new - mean) * scale, 0.0)
            b_gain = tl.load(p_norm_cell + o_unit, valid, 0.0).to(A)
            b_seen = b_normed * b_gain
            if p_norm_cell_bias is not None:
                b_seen += tl.load(p_norm_cell_bias + o_unit, valid, 0.0).to(A)
        b_tanh = tanh(b_seen)
        b_keep_h = kept(
            p_key, 1 + 2 * i_t, row, batch, o_unit, hidden, rate_h, hidden_threshold, RANDOM_HIDDEN, A
        )  # fmt: skip
        b_keep_c = kept(p_key, 2 + 2 * i_t, row, batch, o_unit, hidden, rate_c, cell_threshold, RANDOM_CELL, A)
        if p_grad_output is not None:
            b_dh += tl.load(p_grad_output + place * hidden + o_unit, valid, 0.0).to(A)
        tl.store(p_grad_h + o_state, b_dh * b_keep_h, valid)
        b_dh *= 1.0 - b_keep_h
        b_dc = tl.load(p_grad_c + o_state, valid, 0.0)
        b_carry = b_dc * b_keep_c
        b_dc *= 1.0 - b_keep_c
        d3 = b_dh * b_tanh * b_o * (1.0 - b_o)
        b_to_seen = b_dh * b_o * (1.0 - b_tanh) * (1.0 + b_tanh)
        p_sum = p_sums + row * sums_width
        if p_peephole is not None:
            LAST: tl.constexpr = 1 if COUPLED else 2
            b_dc += d3 * tl.load(p_peephole + LAST * hidden + o_unit, valid, 0.0).to(A)
            p_peep = p_sum + at_peephole + LAST * hidden + o_unit
            tl.store(p_peep, tl.load(p_peep, valid, 0.0) + d3 * b_new, valid)
        if p_norm_ih is not None:
            p_gain = p_sum + at_norm_cell + o_unit
            tl.store(p_gain, tl.load(p_gain, valid, 0.0) + b_to_seen * b_normed, valid)
            if p_norm_cell_bias is not None:
                p_shift = p_sum + at_norm_cell_bias + o_unit
                tl.store(p_shift, tl.load(p_shift, valid, 0.0) + b_to_seen, valid)
            b_hat = b_to_seen * b_gain
            b_dc += scale * (b_hat - tl.sum(b_hat, 0) / hidden - b_normed * (tl.sum(b_hat * b_normed, 0) / hidden))
        else:
            b_dc += b_to_seen
        if COUPLED:
            d0 = b_dc * (b_g - b_c) * b_i * (1.0 - b_i)
        else:
            d0 = b_dc * b_g * b_i * (1.0 - b_i)
        d1 = b_dc * b_c * b_f * (1.0 - b_f)
        d2 = b_dc * b_i * (1.0 - b_g) * (1.0 + b_g)
        b_carry += b_dc * b_f
        if p_peephole is not None:
            p_peep = p_sum + at_peephole + o_unit
            b_carry += d0 * tl.load(p_peephole + o_unit, valid, 0.0).to(A)
            tl.store(p_peep, tl.load(p_peep, valid, 0.0) + d0 * b_c, valid)
            if not COUPLED:
                b_carry += d1 * tl.load(p_peephole + hidden + o_unit, valid, 0.0).to(A)
                tl.store(p_peep + hidden, tl.load(p_peep + hidden, valid, 0.0) + d1 * b_c, valid)
        tl.store(p_grad_c + o_state, b_carry, valid)
        if p_bias is not None:
            add_gates(p_sum, o_unit, hidden, valid, d0, d1, d2, d3, COUPLED)
        if p_norm_ih is None:
            store_gates(p_to_ih, o_unit, hidden, valid, d0, d1, d2, d3, COUPLED)
        else:
            add_gates(p_sum + at_norm_ih, o_unit, hidden, valid, d0 * x0, d1 * x1, d2 * x2, d3 * x3, COUPLED)
            add_gates(p_sum + at_norm_hh, o_unit, hidden, valid, d0 * y0, d1 * y1, d2 * y2, d3 * y3, COUPLED)
            through_norm(p_to_ih, p_norm_ih, o_unit, hidden, valid, d0, d1, d2, d3, x0, x1, x2, x3, scale_ih, COUPLED)
            through_norm(p_to_hh, p_norm_hh, o_unit, hidden, valid, d0, d1, d2, d3, y0, y1, y2, y3, scale_hh, COUPLED)


def _rates(like, eps, zoneout_hidden, zoneout_cell, dropout):
    """What the kernels read as numbers of the compute type."""
    values = (eps, zoneout_hidden, zoneout_cell, 1 / (1 - dropout))
    return torch.tensor(values, dtype=compute_dtype(like), device=like.device)


def _threshold(rate: float) -> int:
    return int(rate * 2**32)


def _constants(like, hidden, coupled, zoneout_hidden, zoneout_cell, training):
    units = max(16, triton.next_power_of_2(hidden))
    if units > MOST_UNITS:
        raise NotImplementedError(f"layer_norm_lstm: triton has hidden_size up to {MOST_UNITS}, got {hidden}")
    wide = like.dtype is torch.float64
    return {
        "COUPLED": coupled,
        "RANDOM_HIDDEN": training and zoneout_hidden > 0,
        "RANDOM_CELL": training and zoneout_cell > 0,
        "UNITS": units,
        "A": tl.float64 if wide else tl.float32,
        "num_warps": min(16, max(1, units // (64 if wide else 128))),  # two numbers of float64 fill four registers
    }


def _drop(h, key, rates, dropout, constants):
    """h (T, B, H) after the dropout."""
    out = torch.empty_like(h)
    names = {name: constants[name] for name in ("UNITS", "A", "num_warps")}
    steps, batch, hidden = h.shape
    with torch.cuda.device_of(h):
        drop_kernel[(batch,)](h, out, key, steps, batch, hidden, rates[3:], _threshold(dropout), **names)
    return out


def layer_norm_lstm_fwd(
    input, hx, cx, weight_ih, weight_hh, bias, norm_ih, norm_hh, norm_cell, norm_cell_bias, peephole, lengths, key,
    coupled, eps, zoneout_hidden, zoneout_cell, dropout, training, reverse, save,
):  # fmt: skip
    """As pynn.ops.layer_norm_lstm has it."""
    steps, batch, size = input.shape
    width, hidden = weight_hh.shape
    wide = compute_dtype(input)
    constants = _constants(input, hidden, coupled, zoneout_hidden, zoneout_cell, training)
    h, c = input.new_empty((batch, hidden)), input.new_empty((batch, hidden), dtype=wide)
    h.copy_(hx.reshape(batch, hidden))
    c.copy_(cx.reshape(batch, hidden))
    output = input.new_empty((steps, batch, hidden))
    saved_hh, cells, statistics = (
        input.new_empty((steps, batch, columns) if save and wanted else 0, dtype=dtype)
        for columns, wanted, dtype in (
            (width, True, input.dtype), (hidden, True, wide), (STATISTICS, norm_ih is not None, wide)
        )
    )  # fmt: skip
    products_ih = product(input.reshape(-1, size), weight_ih.t()).view(steps, batch, width)
    if batch > 0:
        tensors = [
            None if t is None else t.contiguous()
            for t in (bias, norm_ih, norm_hh, norm_cell, norm_cell_bias, peephole, lengths, key)
        ]
        rates = _rates(input, eps, zoneout_hidden, zoneout_cell, dropout)
        operand = _drop(h[None], tensors[-1], rates, dropout, constants)[0] if dropout > 0 else None
        kept_tensors = (cells if save else None, statistics if statistics.numel() else None)
        thresholds = [_threshold(rate) for rate in (zoneout_hidden, zoneout_cell, dropout)]
        with torch.cuda.device_of(input):
            for t in reversed(range(steps)) if reverse else range(steps):
                products_hh = product(h if operand is None else operand, weight_hh.t())
                if save:
                    saved_hh[t] = products_hh
                forward_kernel[(batch,)](
                    products_ih, products_hh, *tensors, output, h, c, operand, *kept_tensors,
                    t, steps, batch, hidden, rates, *thresholds, **constants,
                )  # fmt: skip
    products_ih = products_ih if save else input.new_empty(0)
    return output, h.view(hx.shape), c.to(cx.dtype, copy=True).view(cx.shape), products_ih, saved_hh, cells, statistics


def layer_norm_lstm_bwd(
    grad_output, grad_h_n, grad_c_n, input, hx, cx, weight_ih, weight_hh, bias, norm_ih, norm_hh, norm_cell,
    norm_cell_bias, peephole, lengths, key, output, products_ih, products_hh, cells, statistics,
    coupled, eps, zoneout_hidden, zoneout_cell, dropout, training, reverse, output_mask,
):  # fmt: skip
    """As pynn.ops.layer_norm_lstm has it."""
    steps, batch, size = input.shape
    width, hidden = weight_hh.shape
    wide = compute_dtype(input)
    constants = _constants(input, hidden, coupled, zoneout_hidden, zoneout_cell, training)
    grad_ih = input.new_zeros((steps, batch, width))
    grad_hh = grad_ih if norm_ih is None else torch.zeros_like(grad_ih)

    def start(grad):
        zeros = input.new_zeros((batch, hidden), dtype=wide)
        return zeros if grad is None else zeros.copy_(grad.reshape(batch, hidden))

    grad_h, grad_c = start(grad_h_n), start(grad_c_n)
    weights = (bias, norm_ih, norm_hh, norm_cell, norm_cell_bias, peephole)
    counts = [0 if t is None else t.numel() for t in weights]
    places = [sum(counts[:i]) for i in range(len(counts))]
    sums = input.new_zeros((batch, sum(counts)), dtype=wide)
    tensors = [None if t is None else t.contiguous() for t in (*weights, lengths, key)]
    rates = _rates(input, eps, zoneout_hidden, zoneout_cell, dropout)
    if batch > 0:
        grad_output = None if grad_output is None else grad_output.contiguous()
        saved = [t.contiguous() for t in (products_ih, products_hh, cx.reshape(batch, hidden).to(wide), cells)]
        statistics = statistics.contiguous() if statistics.numel() else None
        thresholds = [_threshold(rate) for rate in (zoneout_hidden, zoneout_cell, dropout)]
        grad_operand = None
        times = list(range(steps) if reverse else reversed(range(steps)))
        with torch.cuda.device_of(input):
            for t in (*times, -1):
                backward_kernel[(batch,)](
                    grad_output, *saved, statistics, *tensors, grad_operand, grad_h, grad_c, grad_ih, grad_hh, sums,
                    t, steps, batch, hidden, sums.shape[1], *places[1:], rates, *thresholds,
                    DROPOUT=dropout > 0, REVERSE=reverse, **constants,
                )  # fmt: skip
                if t >= 0:
                    grad_operand = product(grad_hh[t], weight_hh, wide)
    nothing = input.new_empty(0)
    rows = steps * batch
    before = nothing
    if output_mask[4]:
        before = _states_before(output, hx.reshape(batch, hidden), lengths, reverse).contiguous()
        before = _drop(before, tensors[-1], rates, dropout, constants) if dropout > 0 and batch > 0 else before
    totals = sums.sum(0).to(input.dtype).split(counts)
    return (
        product(grad_ih.view(rows, width), weight_ih).view(input.shape) if output_mask[0] else nothing,
        grad_h.to(hx.dtype, copy=True).view(hx.shape),
        grad_c.to(cx.dtype, copy=True).view(cx.shape),
        product(grad_ih.view(rows, width).t(), input.reshape(rows, size)) if output_mask[3] else nothing,
        product(grad_hh.view(rows, width).t(), before.view(rows, hidden)) if output_mask[4] else nothing,
        *(
            total.clone() if mask and weight is not None else input.new_empty(0)
            for total, mask, weight in zip(totals, output_mask[5:], weights, strict=True)
        ),
    )
