"""What the kernels of recurrent layers share: the mathematics of a unit, its gates in memory, and products of tiles.

Gate rows are torch's: i f g o of an LSTM, r z n of a GRU. Helpers hand around four values per unit, whatever the cell:
a cell with fewer repeats one, and nothing is computed for it.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

LSTM: tl.constexpr = tl.constexpr(0)  # the numbers of csrc/include/recurrent.h
GRU: tl.constexpr = tl.constexpr(1)
TANH: tl.constexpr = tl.constexpr(2)
RELU: tl.constexpr = tl.constexpr(3)


# tanh(x) = x + x^3 q(x^2) for |x| < 5/8, a minimax fit of degree 4: 0.74 units in the last place in float32.
TANH_0: tl.constexpr = tl.constexpr(-0.3333328068256378)
TANH_1: tl.constexpr = tl.constexpr(0.13331441581249237)
TANH_2: tl.constexpr = tl.constexpr(-0.05373971536755562)
TANH_3: tl.constexpr = tl.constexpr(0.02063908986747265)
TANH_4: tl.constexpr = tl.constexpr(-0.0057049901224672794)


@triton.jit
def sigmoid(x):
    """exp is asked for arguments below 0 alone: nothing overflows, no infinity meets another."""
    e = libdevice.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    """float32: 1.5 units in the last place, and without the branch per element that libdevice's has."""
    if x.dtype == tl.float64:
        return libdevice.tanh(x)
    else:
        e = libdevice.exp(-2.0 * tl.abs(x))
        far = (1.0 - e) / (1.0 + e)
        u = x * x
        q = (((TANH_4 * u + TANH_3) * u + TANH_2) * u + TANH_1) * u + TANH_0
        return tl.where(tl.abs(x) < 0.625, x + x * (u * q), tl.where(x < 0.0, -far, far))


# ---------------------------------------------------------------- one step of a unit


@triton.jit
def cell_forward(a0, a1, a2, a3, c, h, CELL: tl.constexpr):
    """Saved values s0 .. s3, c and h after the step.

    a0 .. a3: pre-activations of i f g o; of r, z, the input share of n and its hidden share; of the RNN. c, h: before.
    """
    if CELL == 0:
        i, f, g, o = sigmoid(a0), sigmoid(a1), tanh(a2), sigmoid(a3)
        c = f * c + i * g
        return i, f, g, o, c, o * tanh(c)
    elif CELL == 1:
        r, z = sigmoid(a0), sigmoid(a1)
        n = tanh(a2 + r * a3)
        return r, z, n, a3, c, n + z * (h - n)
    elif CELL == 2:
        h = tanh(a0)
        return h, h, h, h, c, h
    else:
        h = tl.where(a0 < 0.0, 0.0, a0)  # keeps NaN
        return h, h, h, h, c, h


@triton.jit
def cell_backward(dh, dc, s0, s1, s2, s3, c, before, CELL: tl.constexpr):
    """Gradients d0 .. d3 in the order of `store_gradients`, of c before the step, and h's way past the gates.

    dh, dc: of h and c after the step. c: after the step, LSTM. before: c before it, h for a GRU. s0: h for an RNN.
    """
    if CELL == 0:
        t = tanh(c)
        dc += dh * s3 * (1.0 - t * t)
        d_i = dc * s2 * s0 * (1.0 - s0)
        d_f = dc * before * s1 * (1.0 - s1)
        d_g = dc * s0 * (1.0 - s2 * s2)
        d_o = dh * t * s3 * (1.0 - s3)
        return d_i, d_f, d_g, d_o, dc * s1, tl.zeros_like(dh)
    elif CELL == 1:
        d_n = dh * (1.0 - s1) * (1.0 - s2 * s2)
        d_z = dh * (before - s2) * s1 * (1.0 - s1)
        d_r = d_n * s3 * s0 * (1.0 - s0)
        return d_n, d_r, d_z, d_n * s0, dc, dh * s1
    elif CELL == 2:
        d = dh * (1.0 - s0 * s0)
        return d, d, d, d, dc, tl.zeros_like(dh)
    else:
        d = tl.where(s0 > 0.0, dh, 0.0)
        return d, d, d, d, dc, tl.zeros_like(dh)


# ---------------------------------------------------------------- four values per unit


@triton.jit
def load4(p, width, mask, COUNT: tl.constexpr):
    """Tiles at p, p + width, ...; the first of them again where there are fewer than four."""
    v0 = tl.load(p, mask=mask, other=0.0)
    v1, v2, v3 = v0, v0, v0
    if COUNT > 1:
        v1 = tl.load(p + width, mask=mask, other=0.0)
        v2 = tl.load(p + 2 * width, mask=mask, other=0.0)
    if COUNT > 3:
        v3 = tl.load(p + 3 * width, mask=mask, other=0.0)
    return v0, v1, v2, v3


@triton.jit
def store4(p, width, v0, v1, v2, v3, mask, COUNT: tl.constexpr):
    """COUNT is 4, or 1 for the first."""
    tl.store(p, v0.to(p.dtype.element_ty), mask=mask)
    if COUNT == 4:
        tl.store(p + width, v1.to(p.dtype.element_ty), mask=mask)
        tl.store(p + 2 * width, v2.to(p.dtype.element_ty), mask=mask)
        tl.store(p + 3 * width, v3.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_biases(bias_ih, bias_hh, unit, in_units, hidden, CELL: tl.constexpr, COMPUTE: tl.constexpr):
    """(1, BLOCK_H) each: for the four pre-activations of `cell_forward`; 0 without biases."""
    GATES: tl.constexpr = 4 if CELL == 0 else 3 if CELL == 1 else 1
    zero = tl.zeros([1, unit.shape[1]], COMPUTE)
    b0, b1, b2, b3 = zero, zero, zero, zero
    if bias_ih is not None:
        x0, x1, x2, x3 = load4(bias_ih + unit, hidden, in_units, GATES)
        b0, b1, b2, b3 = x0.to(COMPUTE), x1.to(COMPUTE), x2.to(COMPUTE), x3.to(COMPUTE)
        if CELL == 1:
            b3 = zero
    if bias_hh is not None:
        x0, x1, x2, x3 = load4(bias_hh + unit, hidden, in_units, GATES)
        b0 += x0.to(COMPUTE)
        b1 += x1.to(COMPUTE)
        if CELL == 1:
            b3 += x2.to(COMPUTE)
        else:
            b2 += x2.to(COMPUTE)
            b3 += x3.to(COMPUTE)
    return b0, b1, b2, b3


@triton.jit
def pre_activations(
    a0, a1, a2, a3, x0, x1, x2, x3, b0, b1, b2, b3, CELL: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Of `cell_forward`, from weight_hh h (a), weight_ih x (x) and biases; a2 of a GRU is the hidden share of n."""
    p0, p1 = a0 + (x0.to(COMPUTE) + b0), a1 + (x1.to(COMPUTE) + b1)
    if CELL == 1:
        return p0, p1, x2.to(COMPUTE) + b2, a2 + b3
    else:
        return p0, p1, a2 + (x2.to(COMPUTE) + b2), a3 + (x3.to(COMPUTE) + b3)


# ---------------------------------------------------------------- products


@triton.jit
def dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def rows_product(
    p_a, p_w, gate, size, in_batch, in_units,
    GATES: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """a weight.T for up to four gates, (BLOCK_B, BLOCK_H) each.

    p_a: (BLOCK_B, 1) rows of a. p_w: (BLOCK_H, 1) rows of the first gate's weight; the next gate's are `gate` further.
    CACHE: the cache modifier of loads of a.
    """
    a0 = tl.zeros([BLOCK_B, BLOCK_H], COMPUTE)
    a1, a2, a3 = a0, a0, a0
    for k in range(0, size, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)[None, :]
        in_k = column < size
        b_a = tl.load(p_a + column, mask=in_batch & in_k, other=0.0, cache_modifier=CACHE)
        mask = in_units & in_k
        a0 = dot(b_a, tl.trans(tl.load(p_w + column, mask=mask, other=0.0)), a0)
        if GATES > 1:
            a1 = dot(b_a, tl.trans(tl.load(p_w + gate + column, mask=mask, other=0.0)), a1)
            a2 = dot(b_a, tl.trans(tl.load(p_w + 2 * gate + column, mask=mask, other=0.0)), a2)
        if GATES > 3:
            a3 = dot(b_a, tl.trans(tl.load(p_w + 3 * gate + column, mask=mask, other=0.0)), a3)
    return a0, a1, a2, a3


@triton.jit
def columns_product(
    p_a, p_w, size, stride, in_batch, in_units,
    COMPUTE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """a weight, (BLOCK_B, BLOCK_H). p_a: (BLOCK_B, 1) rows of a; p_w: (1, BLOCK_H) columns of the weight's first row.

    stride: of the weight's rows. CACHE: the cache modifier of loads of a.
    """
    acc = tl.zeros([BLOCK_B, BLOCK_H], COMPUTE)
    for k in range(0, size, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)[None, :]
        row = k + tl.arange(0, BLOCK_K)[:, None]
        b_a = tl.load(p_a + column, mask=in_batch & (column < size), other=0.0, cache_modifier=CACHE)
        b_w = tl.load(p_w + row.to(tl.int64) * stride, mask=in_units & (row < size), other=0.0)
        acc = dot(b_a, b_w, acc)
    return acc
