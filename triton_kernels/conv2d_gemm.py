"""Convolution as a matrix product that is never laid out in memory: forward, input gradient, weight gradient.

gemm_kernel: a program owns BLOCK_P output pixels and BLOCK_O output channels of a group, and walks through the taps of
the kernel and, within, blocks of BLOCK_R channels. The input gradient is cut by stride phase: pixels of one phase are
reached by the same taps, so nothing is multiplied by zeros between them.
weight_kernel: a program owns BLOCK_O output channels and BLOCK_C columns (input channels of a tap, or of all taps where
there are few), and walks through a split of the pixels of all samples; add_splits_kernel adds the splits.
Float32 is summed in short pieces (CHUNKED), and what is lost when they are added up is carried along.
"""

import triton
import triton.language as tl

from .conv2d_epilogue import activate, finish
from .conv2d_prologue_kernels import before_activation
from .conv2d_tile import along, divide, pixels_of, source, strides_of, taps_of

_SIZES = [
    "batch", "h_in", "w_in", "h_count", "w_units", "h_out", "w_out", "in_units", "out_units", "groups", "blocks",
    "h_pad", "h_stride", "h_dilation", "h_kernel", "h_step", "h_inverse", "h_phases",
    "w_pad", "w_stride", "w_dilation", "w_kernel", "w_step", "w_inverse", "w_phases",
    "x_n", "x_c", "x_h", "x_w", "y_n", "y_c", "y_h", "y_w", "r_n", "r_c", "r_h", "r_w", "bias_stride",
]  # fmt: skip
_kernel = triton.jit(do_not_specialize=_SIZES)


@triton.jit
def accumulate(acc, lost, a, b, CHUNKED: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b, and what the sum has lost to rounding (Kahan 1965) if CHUNKED."""
    if CHUNKED:
        part = tl.dot(a, b, input_precision=PRECISION, out_dtype=acc.dtype) - lost
        total = acc + part
        lost = (total - acc) - part
        return total, tl.where(lost == lost, lost, 0.0)  # infinity loses nothing
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype), lost


@_kernel
def gemm_kernel(
    y, pre, x, weight, bias, residual, bias_stride,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, r_n, r_c, r_h, r_w,
    batch, in_units, out_units, groups, blocks,
    h_in, h_count, h_out, h_pad, h_stride, h_dilation, h_kernel, h_step, h_inverse, h_phases,
    w_in, w_units, w_out, w_pad, w_stride, w_dilation, w_kernel, w_step, w_inverse, w_phases,
    TRANSPOSED: tl.constexpr, PADDING: tl.constexpr, ACTIVATION: tl.constexpr, CHUNKED: tl.constexpr,
    PRECISION: tl.constexpr, X_UNIT: tl.constexpr, X_PACK: tl.constexpr, Y_UNIT: tl.constexpr, Y_PACK: tl.constexpr,
    R_UNIT: tl.constexpr, R_PACK: tl.constexpr, IN_PACK: tl.constexpr, OUT_PACK: tl.constexpr, W_PACK: tl.constexpr,
    INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
    scale=None, shift=None,
    PROLOGUE: tl.constexpr = None, SCALE_SAMPLES: tl.constexpr = False, SHIFT_SAMPLES: tl.constexpr = False,
):  # fmt: skip
    """weight: (groups, out, h_kernel, w_kernel, in), out and in being channels of a group; see conv2d.py.

    scale and shift are those of PROLOGUE, an activation's number, see conv2d_prologue_kernels.py. Where samples have
    their own (*_SAMPLES), a block of pixels is part of one sample.
    """
    AXIS: tl.constexpr = 0 if X_UNIT == 1 else 1  # of pixels
    channels_in, channels_out, w_count = in_units * IN_PACK, out_units * OUT_PACK, w_units * W_PACK
    pid = tl.program_id(0)
    o_blocks = tl.cdiv(channels_out, BLOCK_O)
    o = pid % o_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    pid = pid // o_blocks
    p_block = pid % blocks
    pid = pid // blocks
    group = pid % groups
    phase = pid // groups
    h_phase, w_phase = phase // w_phases, phase % w_phases
    if TRANSPOSED:
        h_every, w_every, h_read, w_read = h_stride, w_stride, 1, 1
    else:
        h_every, w_every, h_read, w_read = 1, 1, h_stride, w_stride
    n, i, j, h, w, in_image = pixels_of(
        p_block, batch, h_count, w_count, h_out, w_out, h_every, w_every, h_phase, w_phase, BLOCK_P, INDEX
    )
    h_first, h_taps, h_from, h_shift = taps_of(
        h_phase, h_pad, h_stride, h_dilation, h_kernel, h_step, h_inverse, TRANSPOSED
    )
    w_first, w_taps, w_from, w_shift = taps_of(
        w_phase, w_pad, w_stride, w_dilation, w_kernel, w_step, w_inverse, TRANSPOSED
    )
    x_n, x_c, x_h, x_w = strides_of(x_n, x_c, x_h, x_w, X_UNIT, X_PACK)
    images = x + group.to(tl.int64) * channels_in * x_c + n.to(tl.int64) * x_n
    i, j = i * h_read + h_from, j * w_read + w_from
    in_out = o < channels_out
    taps = h_kernel * w_kernel
    columns = weight + (group.to(tl.int64) * channels_out + o) * taps * channels_in

    if AXIS == 0:
        acc = tl.zeros([BLOCK_P, BLOCK_O], COMPUTE)
    else:
        acc = tl.zeros([BLOCK_O, BLOCK_P], COMPUTE)
    lost = acc if CHUNKED else 0.0
    sample = p_block.to(INDEX) * BLOCK_P // (h_count.to(INDEX) * w_count)  # of all pixels, where that is asked for
    r_blocks = tl.cdiv(channels_in, BLOCK_R)
    h_tap, w_tap, r_block = 0, 0, 0
    for _ in range(h_taps * w_taps * r_blocks):
        r = r_block * BLOCK_R + tl.arange(0, BLOCK_R)
        in_r = r < channels_in
        row, row_ok = source(i + h_tap * h_shift, h_in, PADDING)
        column, column_ok = source(j + w_tap * w_shift, w_in, PADDING)
        places = images + (row.to(INDEX) * x_h + column.to(INDEX) * x_w)
        in_x = along(in_image & row_ok & column_ok, AXIS) & along(in_r, 1 - AXIS)
        b_x = tl.load(along(places, AXIS) + along(r.to(INDEX) * x_c, 1 - AXIS), mask=in_x, other=0.0)
        if PROLOGUE is not None:
            u = before_activation(
                b_x, along(in_r, 1 - AXIS), sample, along(group * channels_in + r, 1 - AXIS), groups * channels_in,
                scale, shift, SCALE_SAMPLES, SHIFT_SAMPLES, COMPUTE,
            )  # fmt: skip
            b_x = tl.where(in_x, activate(u, PROLOGUE, b_x.dtype), 0.0).to(b_x.dtype)
        tap = (h_first + h_tap * h_step) * w_kernel + w_first + w_tap * w_step
        b_w = tl.load(
            along(columns + tap * channels_in, 1 - AXIS) + along(r, AXIS),
            mask=along(in_out, 1 - AXIS) & along(in_r, AXIS),
            other=0.0,
        )
        if AXIS == 0:
            acc, lost = accumulate(acc, lost, b_x, b_w, CHUNKED, PRECISION)
        else:
            acc, lost = accumulate(acc, lost, b_w, b_x, CHUNKED, PRECISION)
        r_block += 1
        next_tap = r_block == r_blocks
        r_block = tl.where(next_tap, 0, r_block)
        w_tap += next_tap.to(tl.int32)
        next_row = w_tap == w_taps
        w_tap = tl.where(next_row, 0, w_tap)
        h_tap += next_row.to(tl.int32)

    finish(
        acc, n, h, w, in_image, group * channels_out + o, in_out,
        y, pre, y_n, y_c, y_h, y_w, bias, bias_stride, residual, r_n, r_c, r_h, r_w,
        AXIS, Y_UNIT, Y_PACK, R_UNIT, R_PACK, ACTIVATION, INDEX,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        *_SIZES, "d_n", "d_c", "d_h", "d_w", "steps", "magic_w", "shift_w", "magic_hw", "shift_hw"
    ]
)  # fmt: skip
def weight_kernel(
    partials, dy, x, d_n, d_c, d_h, d_w, x_n, x_c, x_h, x_w,
    batch, out_units, in_units, groups, steps,
    h_in, h_out, h_pad, h_stride, h_dilation, h_kernel, w_in, w_out, w_pad, w_stride, w_dilation, w_kernel,
    magic_w, shift_w, magic_hw, shift_hw,
    PADDING: tl.constexpr, BY_TAP: tl.constexpr, CHUNKED: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    D_UNIT: tl.constexpr, D_PACK: tl.constexpr, X_UNIT: tl.constexpr, X_PACK: tl.constexpr,
    IN_PACK: tl.constexpr, OUT_PACK: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, STEP: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials: (splits, groups * out, h_kernel, w_kernel, in), out and in being channels of a group.

    BY_TAP: a block of columns belongs to one tap; otherwise it goes through all (tap, channel).
    STEP: pixels of a step, where fewer than BLOCK_P, the least that a product takes.
    """
    D_AXIS: tl.constexpr = 0 if D_UNIT == 1 else 1  # of pixels
    X_AXIS: tl.constexpr = 0 if X_UNIT == 1 else 1
    channels_out, channels_in, taps = out_units * OUT_PACK, in_units * IN_PACK, h_kernel * w_kernel
    pid = tl.program_id(0)
    o_blocks = tl.cdiv(channels_out, BLOCK_O)
    o, pid = pid % o_blocks * BLOCK_O + tl.arange(0, BLOCK_O), pid // o_blocks
    if BY_TAP:
        tap, pid = pid % taps, pid // taps
        c_blocks = tl.cdiv(channels_in, BLOCK_C)
        c, pid = pid % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C), pid // c_blocks
        in_columns = c < channels_in
        at_column = tap * channels_in + c
        h_tap, w_tap = tap // w_kernel * h_dilation - h_pad, tap % w_kernel * w_dilation - w_pad
    else:
        c_blocks = tl.cdiv(taps * channels_in, BLOCK_C)
        at_column, pid = pid % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C), pid // c_blocks
        in_columns = at_column < taps * channels_in
        tap, c = at_column // channels_in, at_column % channels_in
        h_tap = along(tap // w_kernel * h_dilation - h_pad, 1 - X_AXIS)
        w_tap = along(tap % w_kernel * w_dilation - w_pad, 1 - X_AXIS)
    group, split = pid % groups, pid // groups
    in_out = o < channels_out
    d_n, d_c, d_h, d_w = strides_of(d_n, d_c, d_h, d_w, D_UNIT, D_PACK)
    x_n, x_c, x_h, x_w = strides_of(x_n, x_c, x_h, x_w, X_UNIT, X_PACK)
    d_channels = along(dy + group.to(tl.int64) * channels_out * d_c + o.to(INDEX) * d_c, 1 - D_AXIS)
    x_channels = along(x + group.to(tl.int64) * channels_in * x_c + c.to(INDEX) * x_c, 1 - X_AXIS)
    total = batch.to(INDEX) * h_out * w_out

    acc = tl.zeros([BLOCK_O, BLOCK_C], COMPUTE)
    lost = acc if CHUNKED else 0.0
    for step in range(0, steps):
        lane = tl.arange(0, BLOCK_P)
        p = (split.to(INDEX) * steps + step) * STEP + lane
        rows = divide(p, w_out, magic_w, shift_w, FAST)
        n = divide(p, h_out.to(INDEX) * w_out, magic_hw, shift_hw, FAST)
        i, j = rows - n * h_out, p - rows * w_out
        in_image = (p < total) & (lane < STEP)
        d_place = n.to(tl.int64) * d_n + (i.to(INDEX) * d_h + j.to(INDEX) * d_w)
        b_dy = tl.load(
            d_channels + along(d_place, D_AXIS), mask=along(in_image, D_AXIS) & along(in_out, 1 - D_AXIS), other=0.0
        )
        row, row_ok = source(along(i * h_stride, X_AXIS) + h_tap, h_in, PADDING)
        column, column_ok = source(along(j * w_stride, X_AXIS) + w_tap, w_in, PADDING)
        x_place = along(n.to(tl.int64) * x_n, X_AXIS) + (row.to(INDEX) * x_h + column.to(INDEX) * x_w)
        b_x = tl.load(
            x_channels + x_place,
            mask=along(in_image, X_AXIS) & row_ok & column_ok & along(in_columns, 1 - X_AXIS),
            other=0.0,
        )
        if D_AXIS == 0:
            b_dy = tl.trans(b_dy)
        if X_AXIS == 1:
            b_x = tl.trans(b_x)
        acc, lost = accumulate(acc, lost, b_dy, b_x, CHUNKED, PRECISION)

    channel = split.to(tl.int64) * groups * channels_out + group * channels_out + o
    at = (channel * taps * channels_in)[:, None] + at_column[None, :]
    tl.store(partials + at, acc, mask=in_out[:, None] & in_columns[None, :])
