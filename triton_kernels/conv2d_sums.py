"""The small kernels of conv2d: sums of splits, the bias gradient, the gradient of padding, and that of activations."""

import triton
import triton.language as tl

from .conv2d_epilogue import derivative
from .conv2d_tile import along, block_of, ordered_sum, pixels_of, source, strides_of

_kernel = triton.jit(
    do_not_specialize=[
        "batch", "height", "width", "units", "splits", "steps", "size", "channels", "taps",
        "x_n", "x_c", "x_h", "x_w", "y_n", "y_c", "y_h", "y_w", "s_n", "s_c", "s_h", "s_w",
        "h_before", "h_after", "w_before", "w_after",
    ]
)  # fmt: skip


@_kernel
def add_splits_kernel(out, partials, splits, size, channels, taps, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """out (rows, channels, taps) = the sum of partials (splits, rows, taps, channels), in float64."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // (taps * channels), (at % (taps * channels)).to(tl.int32)
    place = partials + at
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, splits, SPLITS):
        split = (first + tl.arange(0, SPLITS))[:, None]
        b = tl.load(place[None, :] + split.to(tl.int64) * size, mask=(split < splits) & (at < size)[None, :], other=0.0)
        total += tl.sum(b.to(tl.float64), axis=0)
    to = row * (taps * channels) + column % channels * taps + column // channels
    tl.store(out + to, total.to(out.dtype.element_ty), mask=at < size)


@_kernel
def channel_sums_kernel(
    partials, x, x_n, x_c, x_h, x_w, batch, height, width, units, steps,
    X_UNIT: tl.constexpr, X_PACK: tl.constexpr, PACK: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """partials (splits, channels): sums over the pixels of a split."""
    AXIS: tl.constexpr = 0 if X_UNIT == 1 else 1  # of pixels
    split, c, in_channels = block_of(units, PACK, BLOCK_C, INDEX)
    x_n, x_c, x_h, x_w = strides_of(x_n, x_c, x_h, x_w, X_UNIT, X_PACK)
    channels = along(x + c.to(INDEX) * x_c, 1 - AXIS)
    if AXIS == 0:
        acc = tl.zeros([BLOCK_P, BLOCK_C], COMPUTE)
    else:
        acc = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    for step in range(0, steps):
        n, i, j, _, _, in_image = pixels_of(
            split.to(INDEX) * steps + step, batch, height, width, height, width, 1, 1, 0, 0, BLOCK_P, INDEX
        )
        place = n.to(tl.int64) * x_n + (i.to(INDEX) * x_h + j.to(INDEX) * x_w)
        mask = along(in_image, AXIS) & along(in_channels, 1 - AXIS)
        acc += tl.load(channels + along(place, AXIS), mask=mask, other=0.0).to(COMPUTE)
    sums = ordered_sum(tl.trans(acc) if AXIS == 0 else acc, LEVELS)
    tl.store(partials + split.to(tl.int64) * (units * PACK) + c, sums, mask=in_channels)


@_kernel
def activation_kernel(
    dz, dy, saved, y_n, y_c, y_h, y_w, s_n, s_c, s_h, s_w, x_n, x_c, x_h, x_w, batch, height, width, units,
    KIND: tl.constexpr, X_UNIT: tl.constexpr, X_PACK: tl.constexpr, Y_UNIT: tl.constexpr, Y_PACK: tl.constexpr,
    S_UNIT: tl.constexpr, S_PACK: tl.constexpr, PACK: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz = dy * activation'(saved); strides x are those of dz."""
    AXIS: tl.constexpr = 0 if X_UNIT == 1 else 1  # of pixels
    block, c, in_channels = block_of(units, PACK, BLOCK_C, INDEX)
    n, i, j, _, _, in_image = pixels_of(block, batch, height, width, height, width, 1, 1, 0, 0, BLOCK_P, INDEX)
    mask = along(in_image, AXIS) & along(in_channels, 1 - AXIS)
    n, i, j, c = n.to(tl.int64), i.to(INDEX), j.to(INDEX), c.to(INDEX)
    y_n, y_c, y_h, y_w = strides_of(y_n, y_c, y_h, y_w, Y_UNIT, Y_PACK)
    s_n, s_c, s_h, s_w = strides_of(s_n, s_c, s_h, s_w, S_UNIT, S_PACK)
    x_n, x_c, x_h, x_w = strides_of(x_n, x_c, x_h, x_w, X_UNIT, X_PACK)
    y_at = along(dy + n * y_n + (i * y_h + j * y_w), AXIS) + along(c * y_c, 1 - AXIS)
    s_at = along(saved + n * s_n + (i * s_h + j * s_w), AXIS) + along(c * s_c, 1 - AXIS)
    x_at = along(dz + n * x_n + (i * x_h + j * x_w), AXIS) + along(c * x_c, 1 - AXIS)
    b_dy = tl.load(y_at, mask=mask, other=0.0).to(COMPUTE)
    s = tl.load(s_at, mask=mask, other=0.0).to(COMPUTE)
    element = dz.dtype.element_ty
    tl.store(x_at, (b_dy * derivative(s, KIND, element)).to(element), mask=mask)


@triton.jit
def _candidate(k, i, size, before, PADDING: tl.constexpr):
    """Row of the padded image: the image's own for k = 0, else the k-th of the padding; and whether it repeats i."""
    row = tl.where(k <= before, k - 1, size + k - 1)
    of, _ = source(row - before, size, PADDING)
    return tl.where(k == 0, i + before, row), (k == 0) | (of == i)


@_kernel
def fold_kernel(
    dx, padded, y_n, y_c, y_h, y_w, x_n, x_c, x_h, x_w, batch, height, width, units,
    h_before, h_after, w_before, w_after,
    PADDING: tl.constexpr, X_UNIT: tl.constexpr, X_PACK: tl.constexpr, Y_UNIT: tl.constexpr, Y_PACK: tl.constexpr,
    PACK: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx: each pixel's gradient and those of its repetitions in the padding. Strides x of dx, y of padded."""
    AXIS: tl.constexpr = 0 if X_UNIT == 1 else 1  # of pixels
    block, c, in_channels = block_of(units, PACK, BLOCK_C, INDEX)
    n, i, j, _, _, in_image = pixels_of(block, batch, height, width, height, width, 1, 1, 0, 0, BLOCK_P, INDEX)
    n, i, j, c = n.to(tl.int64), i.to(INDEX), j.to(INDEX), c.to(INDEX)
    y_n, y_c, y_h, y_w = strides_of(y_n, y_c, y_h, y_w, Y_UNIT, Y_PACK)
    x_n, x_c, x_h, x_w = strides_of(x_n, x_c, x_h, x_w, X_UNIT, X_PACK)
    channels = along(c * y_c, 1 - AXIS)
    if AXIS == 0:
        acc = tl.zeros([BLOCK_P, BLOCK_C], COMPUTE)
    else:
        acc = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    for a in range(0, 1 + h_before + h_after):
        row, row_ok = _candidate(a, i, height, h_before, PADDING)
        for b in range(0, 1 + w_before + w_after):
            column, column_ok = _candidate(b, j, width, w_before, PADDING)
            places = padded + n * y_n + (row * y_h + column * y_w)
            ok = in_image & row_ok & column_ok
            acc += tl.load(
                along(places, AXIS) + channels, mask=along(ok, AXIS) & along(in_channels, 1 - AXIS), other=0.0
            )
    at = along(dx + n * x_n + (i * x_h + j * x_w), AXIS) + along(c * x_c, 1 - AXIS)
    tl.store(at, acc.to(dx.dtype.element_ty), mask=along(in_image, AXIS) & along(in_channels, 1 - AXIS))
