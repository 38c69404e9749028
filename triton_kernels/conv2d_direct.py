"""Convolution without a matrix product, where one would mostly multiply padding: depthwise, and few channels.

direct_kernel: few input channels in a group, depthwise above all. A program owns a block of output pixels and channels
and adds up the taps; the sums of kernel rows are added up at the end.
reduce_kernel: few output channels in a group. A program owns pixels and all of those outputs, its lanes also share out
the input channels, which are added up at the end.
direct_weight_kernel: weight gradient of groups of few input channels. A program owns output channels and a row of the
kernel, and walks through a split of the pixels; it reads a block of the gradient once for all columns of the row.
Forward and input gradient are one, as in conv2d_gemm.py.
"""

import triton
import triton.language as tl

from .conv2d_epilogue import finish
from .conv2d_tile import along, divide, ordered_sum, pixels_of, source, strides_of, taps_of

_kernel = triton.jit(
    do_not_specialize=[
        "batch", "h_in", "w_in", "h_count", "w_units", "w_count", "h_out", "w_out", "in_units", "out_units", "groups",
        "blocks", "h_pad", "h_stride", "h_dilation", "h_kernel", "h_step", "h_inverse", "h_phases",
        "w_pad", "w_stride", "w_dilation", "w_kernel", "w_step", "w_inverse", "w_phases", "bias_stride",
        "x_n", "x_c", "x_h", "x_w", "y_n", "y_c", "y_h", "y_w", "r_n", "r_c", "r_h", "r_w", "d_n", "d_c", "d_h", "d_w",
        "steps", "w_blocks", "magic_w", "shift_w", "magic_hw", "shift_hw",
    ]
)  # fmt: skip

ONE_GROUP: tl.constexpr = tl.constexpr(0)  # how groups map output channels to input channels
DEPTHWISE: tl.constexpr = tl.constexpr(1)  # one to one
GROUPS: tl.constexpr = tl.constexpr(2)


@_kernel
def direct_kernel(
    y, pre, x, weight, bias, residual, bias_stride,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, r_n, r_c, r_h, r_w,
    batch, in_units, out_units, groups, blocks,
    h_in, h_count, h_out, h_pad, h_stride, h_dilation, h_kernel, h_step, h_inverse, h_phases,
    w_in, w_units, w_out, w_pad, w_stride, w_dilation, w_kernel, w_step, w_inverse, w_phases,
    TRANSPOSED: tl.constexpr, PADDING: tl.constexpr, ACTIVATION: tl.constexpr, GROUPING: tl.constexpr,
    W_TAPS: tl.constexpr, IN: tl.constexpr,
    X_UNIT: tl.constexpr, X_PACK: tl.constexpr, Y_UNIT: tl.constexpr, Y_PACK: tl.constexpr,
    R_UNIT: tl.constexpr, R_PACK: tl.constexpr, IN_PACK: tl.constexpr, OUT_PACK: tl.constexpr, W_PACK: tl.constexpr,
    INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """weight: (h_kernel, w_kernel, IN, groups * out). out_units counts the output channels of all groups.

    W_TAPS: the taps of a row where they are always all there, then they are unrolled; otherwise 0.
    """
    AXIS: tl.constexpr = 0 if X_UNIT == 1 else 1  # of pixels
    channels_out, w_count = out_units * OUT_PACK, w_units * W_PACK
    pid = tl.program_id(0)
    o_blocks = tl.cdiv(channels_out, BLOCK_O)
    o = pid % o_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    pid = pid // o_blocks
    p_block, phase = pid % blocks, pid // blocks
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
    images = x + n.to(tl.int64) * x_n
    i, j = i * h_read + h_from, j * w_read + w_from
    in_out = o < channels_out
    if GROUPING == 1:
        first_in = o
    else:
        first_in = o // (channels_out // groups) * IN

    acc = tl.zeros([BLOCK_P, BLOCK_O] if AXIS == 0 else [BLOCK_O, BLOCK_P], COMPUTE)
    for h_tap in range(0, h_taps):
        row, row_ok = source(i + h_tap * h_shift, h_in, PADDING)
        rows, row_ok = images + row.to(INDEX) * x_h, in_image & row_ok
        weights = weight + ((h_first + h_tap * h_step) * w_kernel + w_first) * (IN * channels_out) + o
        line = tl.zeros([BLOCK_P, BLOCK_O] if AXIS == 0 else [BLOCK_O, BLOCK_P], COMPUTE)
        if W_TAPS > 0:
            for w_tap in tl.static_range(W_TAPS):
                line = _add_tap(
                    line, rows, weights + w_tap * (IN * channels_out), first_in, j + w_tap * w_shift, w_in, row_ok,
                    in_out, x_c, x_w, channels_out, PADDING, GROUPING, IN, AXIS, INDEX,
                )  # fmt: skip
        else:
            for w_tap in range(0, w_taps):
                line = _add_tap(
                    line, rows, weights + w_tap * w_step * (IN * channels_out), first_in, j + w_tap * w_shift, w_in,
                    row_ok, in_out, x_c, x_w, channels_out, PADDING, GROUPING, IN, AXIS, INDEX,
                )  # fmt: skip
        acc += line

    finish(
        acc, n, h, w, in_image, o, in_out,
        y, pre, y_n, y_c, y_h, y_w, bias, bias_stride, residual, r_n, r_c, r_h, r_w,
        AXIS, Y_UNIT, Y_PACK, R_UNIT, R_PACK, ACTIVATION, INDEX,
    )  # fmt: skip


@triton.jit
def _add_tap(
    line, rows, weights, first_in, j, w_in, row_ok, in_out, x_c, x_w, channels_out,
    PADDING: tl.constexpr, GROUPING: tl.constexpr, IN: tl.constexpr, AXIS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    column, column_ok = source(j, w_in, PADDING)
    places, ok = rows + column.to(INDEX) * x_w, row_ok & column_ok
    for c in tl.static_range(IN):
        if GROUPING == 0:  # one input channel for all lanes
            b_x = tl.load(along(places + c * x_c, AXIS), mask=along(ok, AXIS), other=0.0)
        else:
            b_x = tl.load(
                along(places, AXIS) + along((first_in + c).to(INDEX) * x_c, 1 - AXIS),
                mask=along(ok, AXIS) & along(in_out, 1 - AXIS),
                other=0.0,
            )
        b_w = along(tl.load(weights + c * channels_out, mask=in_out, other=0.0), 1 - AXIS)
        line = tl.fma(b_x.to(line.dtype), b_w.to(line.dtype), line)
    return line


@_kernel
def reduce_kernel(
    y, pre, x, weight, bias, residual, bias_stride,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, r_n, r_c, r_h, r_w,
    batch, in_units, out_units, groups, blocks,
    h_in, h_count, h_out, h_pad, h_stride, h_dilation, h_kernel, h_step, h_inverse, h_phases,
    w_in, w_units, w_out, w_pad, w_stride, w_dilation, w_kernel, w_step, w_inverse, w_phases,
    TRANSPOSED: tl.constexpr, PADDING: tl.constexpr, ACTIVATION: tl.constexpr,
    X_UNIT: tl.constexpr, X_PACK: tl.constexpr, Y_UNIT: tl.constexpr, Y_PACK: tl.constexpr,
    R_UNIT: tl.constexpr, R_PACK: tl.constexpr, IN_PACK: tl.constexpr, OUT_PACK: tl.constexpr, W_PACK: tl.constexpr,
    INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """weight: (groups, out, h_kernel, w_kernel, in). BLOCK_O holds all output channels of a group.

    LEVELS: BLOCK_R = 2^LEVELS.
    """
    AXIS: tl.constexpr = 0 if X_UNIT == 1 else 1  # of pixels among pixels and input channels
    channels_in, channels_out, w_count = in_units * IN_PACK, out_units * OUT_PACK, w_units * W_PACK
    pid = tl.program_id(0)
    p_block, pid = pid % blocks, pid // blocks
    group, phase = pid % groups, pid // groups
    o = tl.arange(0, BLOCK_O)
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
    outs = weight + (group.to(tl.int64) * channels_out + o) * taps * channels_in

    if AXIS == 0:
        acc = tl.zeros([BLOCK_O, BLOCK_P, BLOCK_R], COMPUTE)
    else:
        acc = tl.zeros([BLOCK_O, BLOCK_R, BLOCK_P], COMPUTE)
    for h_tap in range(0, h_taps):
        row, row_ok = source(i + h_tap * h_shift, h_in, PADDING)
        for w_tap in range(0, w_taps):
            column, column_ok = source(j + w_tap * w_shift, w_in, PADDING)
            places = images + (row.to(INDEX) * x_h + column.to(INDEX) * x_w)
            tap = (h_first + h_tap * h_step) * w_kernel + w_first + w_tap * w_step
            for r_first in range(0, channels_in, BLOCK_R):
                r = r_first + tl.arange(0, BLOCK_R)
                in_r = r < channels_in
                b_x = tl.load(
                    along(places, AXIS) + along(r.to(INDEX) * x_c, 1 - AXIS),
                    mask=along(in_image & row_ok & column_ok, AXIS) & along(in_r, 1 - AXIS),
                    other=0.0,
                )
                b_w = tl.load(
                    (outs + tap * channels_in)[:, None] + r[None, :], mask=in_out[:, None] & in_r[None, :], other=0.0
                )
                if AXIS == 0:
                    b_w = b_w[:, None, :]
                else:
                    b_w = b_w[:, :, None]
                acc = tl.fma(b_x[None, :, :].to(COMPUTE), b_w.to(COMPUTE), acc)

    if AXIS == 1:
        acc = tl.permute(acc, (0, 2, 1))
    acc = ordered_sum(tl.reshape(acc, [BLOCK_O * BLOCK_P, BLOCK_R]), LEVELS)
    finish(
        tl.reshape(acc, [BLOCK_O, BLOCK_P]), n, h, w, in_image, group * channels_out + o, in_out,
        y, pre, y_n, y_c, y_h, y_w, bias, bias_stride, residual, r_n, r_c, r_h, r_w,
        1, Y_UNIT, Y_PACK, R_UNIT, R_PACK, ACTIVATION, INDEX,
    )  # fmt: skip


@_kernel
def direct_weight_kernel(
    partials, dy, x, d_n, d_c, d_h, d_w, x_n, x_c, x_h, x_w,
    batch, out_units, in_units, groups, steps, w_blocks,
    h_in, h_out, h_pad, h_stride, h_dilation, h_kernel, w_in, w_out, w_pad, w_stride, w_dilation, w_kernel,
    magic_w, shift_w, magic_hw, shift_hw,
    PADDING: tl.constexpr, DEPTHWISE: tl.constexpr, FAST: tl.constexpr,
    D_UNIT: tl.constexpr, D_PACK: tl.constexpr, X_UNIT: tl.constexpr, X_PACK: tl.constexpr,
    OUT_PACK: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """partials: (splits, out, h_kernel, w_kernel, in), in being the channels of a group, out those of all groups.

    LEVELS: BLOCK_P = 2^LEVELS.
    """
    AXIS: tl.constexpr = 0 if X_UNIT == 1 else 1  # of pixels
    channels_out, channels_in = out_units * OUT_PACK, in_units
    pid = tl.program_id(0)
    w_first, pid = pid % w_blocks * BLOCK_W, pid // w_blocks
    h_tap, pid = pid % h_kernel, pid // h_kernel
    r, pid = pid % channels_in, pid // channels_in
    o_blocks = tl.cdiv(channels_out, BLOCK_O)
    o, split = pid % o_blocks * BLOCK_O + tl.arange(0, BLOCK_O), pid // o_blocks
    w_tap = w_first + tl.arange(0, BLOCK_W)
    in_out = o < channels_out
    d_n, d_c, d_h, d_w = strides_of(d_n, d_c, d_h, d_w, D_UNIT, D_PACK)
    x_n, x_c, x_h, x_w = strides_of(x_n, x_c, x_h, x_w, X_UNIT, X_PACK)
    if DEPTHWISE:
        c = o
    else:
        c = o // (channels_out // groups) * channels_in + r
    d_channels, x_channels = along(o.to(INDEX) * d_c, 1 - AXIS), along(c.to(INDEX) * x_c, 1 - AXIS)
    total = batch.to(INDEX) * h_out * w_out

    if AXIS == 0:
        acc = tl.zeros([BLOCK_W, BLOCK_P, BLOCK_O], COMPUTE)
    else:
        acc = tl.zeros([BLOCK_W, BLOCK_O, BLOCK_P], COMPUTE)
    for step in range(0, steps):
        p = (split.to(INDEX) * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        rows = divide(p, w_out, magic_w, shift_w, FAST)
        n = divide(p, h_out.to(INDEX) * w_out, magic_hw, shift_hw, FAST)
        i, j = rows - n * h_out, p - rows * w_out
        in_image = p < total
        mask = along(in_image, AXIS) & along(in_out, 1 - AXIS)
        d_rows = dy + n.to(tl.int64) * d_n + (i.to(INDEX) * d_h + j.to(INDEX) * d_w)
        b_dy = tl.load(along(d_rows, AXIS) + d_channels, mask=mask, other=0.0)
        row, row_ok = source(i * h_stride - h_pad + h_tap * h_dilation, h_in, PADDING)
        x_rows = x + n.to(tl.int64) * x_n + row.to(INDEX) * x_h
        shifted = (j * w_stride - w_pad)[None, :] + (w_tap * w_dilation)[:, None]  # (BLOCK_W, BLOCK_P)
        column, column_ok = source(shifted, w_in, PADDING)
        places = x_rows[None, :] + column.to(INDEX) * x_w
        ok = (in_image & row_ok)[None, :] & column_ok & (w_tap < w_kernel)[:, None]
        if AXIS == 0:
            b_x = tl.load(places[:, :, None] + x_channels[None, :, :], ok[:, :, None] & in_out[None, None, :], 0.0)
        else:
            b_x = tl.load(places[:, None, :] + x_channels[None, :, :], ok[:, None, :] & in_out[None, :, None], 0.0)
        acc = tl.fma(b_x.to(COMPUTE), b_dy[None, :, :].to(COMPUTE), acc)

    if AXIS == 0:
        acc = tl.permute(acc, (0, 2, 1))
    sums = ordered_sum(tl.reshape(acc, [BLOCK_W * BLOCK_O, BLOCK_P]), LEVELS)
    sums = tl.reshape(sums, [BLOCK_W, BLOCK_O])
    at = (split.to(tl.int64) * channels_out + o)[None, :] * h_kernel + h_tap
    at = (at * w_kernel + w_tap[:, None]) * channels_in + r
    tl.store(partials + at, sums, mask=(w_tap < w_kernel)[:, None] & in_out[None, :])
