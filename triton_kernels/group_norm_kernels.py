"""The kernels of group_norm that read and write whole tensors: on groups in registers, and on tiles of large groups.

LAST: memory is (batch, pixels, channels), otherwise (batch, channels, pixels). Sizes are neither compiled in nor asked
for divisibility: the size of the innermost dimension is units * PACK, which tells the compiler what divides it.
"""

import triton
import triton.language as tl

from .group_norm_statistics import (
    activate,
    activate_grad,
    backward_affine,
    channel_affine,
    channel_sums,
    finish,
    is_far,
    recenter,
)

_kernel = triton.jit(
    do_not_specialize=["eps", "items", "groups", "units", "others", "channels", "width", "rows", "splits", "blocks"]
)


# ---------------------------------------------------------------- groups in registers


@triton.jit
def _groups_tile(
    items, groups, units, others,
    PACK: tl.constexpr, LAST: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Of whole groups: item (GROUPS, 1, 1), channel in the sample and its mask (GROUPS, CHANNELS, 1), offsets and mask
    of the elements, elements of a group.

    The inner one of a group's width and pixels is units * PACK, the other one is `others`.
    """
    item = (tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS))[:, None, None]
    c = tl.arange(0, CHANNELS)[None, :, None]
    p = tl.arange(0, PIXELS)[None, None, :]
    if LAST:
        width, pixels = units * PACK, others
        base = (item // groups * pixels * groups + item % groups) * width
        inner = p.to(tl.int64) * groups * width + c
    else:
        width, pixels = others, units * PACK
        base = item * width * pixels
        inner = c * pixels + p
    in_group = (item < items) & (c < width)
    return item, item % groups * width + c, in_group, base + inner, in_group & (p < pixels), width * pixels


@triton.jit
def _group_sum(values):
    """Over a group, (GROUPS, 1, 1) float64: over pixels in the type of the values, then over channels."""
    return tl.sum(tl.sum(values, axis=2).to(tl.float64), axis=1)[:, None, None]


@_kernel
def groups_fwd_kernel(
    y, mean_out, rstd_out, x, weight, bias, eps, items, groups, units, others,
    SILU: tl.constexpr, PACK: tl.constexpr, LAST: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    item, channel, in_group, offsets, mask, size = _groups_tile(
        items, groups, units, others, PACK, LAST, GROUPS, CHANNELS, PIXELS
    )
    size = size.to(tl.float64)
    b_x = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE)
    near = (_group_sum(b_x) / size).to(COMPUTE)
    d = tl.where(mask, b_x - near, 0.0)
    mean, rstd = finish(near.to(tl.float64), _group_sum(d), _group_sum(d * d), size, eps)
    tl.store(mean_out + item, mean.to(COMPUTE), mask=item < items)
    tl.store(rstd_out + item, rstd.to(COMPUTE), mask=item < items)
    center, delta = recenter(mean, rstd, COMPUTE)
    scale, shift, _ = channel_affine(weight, bias, channel, in_group, delta, rstd)
    z = tl.fma(b_x - center.to(COMPUTE), scale.to(COMPUTE), shift.to(COMPUTE))
    tl.store(y + offsets, activate(z, SILU, y.dtype.element_ty).to(y.dtype.element_ty), mask=mask)


@_kernel
def groups_bwd_kernel(
    dx, sums, dy, x, weight, bias, mean, rstd, items, groups, units, others,
    SILU: tl.constexpr, PACK: tl.constexpr, LAST: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx, and rows (2 * channels) of sums: of dz and of dz times the normalised value, per channel."""
    item, channel, in_group, offsets, mask, size = _groups_tile(
        items, groups, units, others, PACK, LAST, GROUPS, CHANNELS, PIXELS
    )
    size = size.to(tl.float64)
    b_x = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE)
    b_dy = tl.load(dy + offsets, mask=mask, other=0.0).to(COMPUTE)
    b_mean = tl.load(mean + item, mask=item < items, other=0.0).to(tl.float64)
    b_rstd = tl.load(rstd + item, mask=item < items, other=0.0).to(tl.float64)
    far = is_far(b_mean, b_rstd)
    center = tl.where(far, b_mean, 0.0)
    d = b_x - center.to(COMPUTE)
    delta = tl.where(far, _group_sum(tl.where(mask, d, 0.0)) / size, b_mean)  # what the stored mean has lost
    scale, shift, w = channel_affine(weight, bias, channel, in_group, delta, b_rstd)
    dz = activate_grad(b_dy, tl.fma(d, scale.to(COMPUTE), shift.to(COMPUTE)), SILU, x.dtype.element_ty)
    dz = tl.where(mask, dz, 0.0)
    first = tl.sum(dz, axis=2).to(tl.float64)[:, :, None]
    second = tl.sum(dz * d, axis=2).to(tl.float64)[:, :, None]
    width = units * PACK if LAST else others
    second = channel_sums(sums, item // groups, channel, groups * width, in_group, first, second, delta, b_rstd)
    group_first, group_second = tl.sum(w * first, axis=1)[:, :, None], tl.sum(w * second, axis=1)[:, :, None]
    slope, constant = backward_affine(group_first, group_second, delta, b_rstd, size)
    b_dx = tl.fma(d, slope.to(COMPUTE), constant.to(COMPUTE))
    b_dx = tl.fma(dz, scale.to(COMPUTE), b_dx)
    tl.store(dx + offsets, b_dx.to(dx.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- tiles of channels and pixels


@triton.jit
def _channels(rows, splits, blocks, CHANNELS: tl.constexpr):
    """Sample, split, row of the channels in it, and channel counted over all samples with its mask, (CHANNELS, 1).

    `blocks` programs side by side own the `rows` channels of a sample, or of the whole batch where it lies channel by
    channel.
    """
    pid = tl.program_id(0).to(tl.int64)
    sample, split = pid // blocks // splits, pid // blocks % splits
    row = (pid % blocks * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    return sample, split, row, sample * rows + row, row < rows


@triton.jit
def _elements(
    sample, split, row, rows, step, units, others,
    PACK: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Offsets and mask (CHANNELS, PIXELS) of the elements of a split's tile.

    units * PACK also bounds the mask: with `rows`, no access could be wide.
    """
    p = (split * STEPS + step) * PIXELS + tl.arange(0, PIXELS)[None, :]
    if LAST:
        pixels, limit = others.to(tl.int64), units.to(tl.int64) * PACK
        offsets = (sample * pixels + p) * limit + row
    else:
        pixels, limit = units.to(tl.int64) * PACK, rows
        offsets = row * pixels + p
    return offsets, (row < limit) & (p < pixels)


@_kernel
def moments_kernel(
    partials, x, mean, rstd, channels, width, rows, units, others, splits, blocks,
    PACK: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """partials (3, channels, splits): a center for each channel and split, sums of x - center and of its square.

    The center is the element of the first tile that is nearest to the mean of it: a large mean costs no digits.
    mean, rstd: None, or known statistics of which only means far from 0 are looked at again.
    """
    sample, split, row, channel, in_rows = _channels(rows, splits, blocks, CHANNELS)
    if mean is None:
        wanted = 1
    else:
        group = channel // width
        b_mean = tl.load(mean + group, mask=in_rows, other=0.0).to(tl.float64)
        b_rstd = tl.load(rstd + group, mask=in_rows, other=0.0).to(tl.float64)
        wanted = tl.max(tl.max(is_far(b_mean, b_rstd).to(tl.int32), axis=1), axis=0)
    if wanted != 0:
        offsets, mask = _elements(sample, split, row, rows, 0, units, others, PACK, LAST, PIXELS, STEPS)
        b_x = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE)
        count = tl.sum(mask.to(tl.int32), axis=1)[:, None]
        near = tl.sum(b_x, axis=1)[:, None] / tl.maximum(count, 1).to(COMPUTE)
        distance = tl.where(mask, tl.abs(b_x - near), float("inf"))
        nearest = tl.min(distance, axis=1)[:, None]
        center = tl.min(tl.where(distance == nearest, b_x, float("inf")), axis=1)[:, None]
        center = tl.where(in_rows, center, 0.0)
        d = tl.where(mask, b_x - center, 0.0)
        first, second = tl.sum(d, axis=1).to(tl.float64), tl.sum(d * d, axis=1).to(tl.float64)
        for step in range(1, STEPS):
            offsets, mask = _elements(sample, split, row, rows, step, units, others, PACK, LAST, PIXELS, STEPS)
            b_x = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE)
            d = tl.where(mask, b_x - center, 0.0)
            first += tl.sum(d, axis=1).to(tl.float64)
            second += tl.sum(d * d, axis=1).to(tl.float64)
        at, plane = partials + channel * splits + split, channels.to(tl.int64) * splits
        tl.store(at, center.to(tl.float64), mask=in_rows)
        tl.store(at + plane, first[:, None], mask=in_rows)
        tl.store(at + 2 * plane, second[:, None], mask=in_rows)


@triton.jit
def _coefficients(coefficients, channel, channels, mask):
    """Center, scale and shift of channels, (CHANNELS, 1)."""
    at = coefficients + channel
    channels = channels.to(tl.int64)
    center = tl.load(at, mask=mask, other=0.0)
    return center, tl.load(at + channels, mask=mask, other=0.0), tl.load(at + 2 * channels, mask=mask, other=0.0)


@_kernel
def apply_kernel(
    y, x, coefficients, channels, rows, units, others, splits, blocks,
    SILU: tl.constexpr, PACK: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    STEPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    sample, split, row, channel, in_rows = _channels(rows, splits, blocks, CHANNELS)
    center, scale, shift = _coefficients(coefficients, channel, channels, in_rows)
    for step in range(0, STEPS):
        offsets, mask = _elements(sample, split, row, rows, step, units, others, PACK, LAST, PIXELS, STEPS)
        b_x = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE)
        b_y = activate(tl.fma(b_x - center, scale, shift), SILU, y.dtype.element_ty)
        tl.store(y + offsets, b_y.to(y.dtype.element_ty), mask=mask)


@_kernel
def gradient_sums_kernel(
    partials, dy, x, coefficients, channels, rows, units, others, splits, blocks,
    SILU: tl.constexpr, PACK: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    STEPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """partials (2, channels, splits): sums of dz and of dz * (x - center)."""
    sample, split, row, channel, in_rows = _channels(rows, splits, blocks, CHANNELS)
    center, scale, shift = _coefficients(coefficients, channel, channels, in_rows)
    first = tl.zeros([CHANNELS], tl.float64)
    second = tl.zeros([CHANNELS], tl.float64)
    for step in range(0, STEPS):
        offsets, mask = _elements(sample, split, row, rows, step, units, others, PACK, LAST, PIXELS, STEPS)
        d = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE) - center
        b_dy = tl.load(dy + offsets, mask=mask, other=0.0).to(COMPUTE)
        dz = activate_grad(b_dy, tl.fma(d, scale, shift), SILU, x.dtype.element_ty)
        dz = tl.where(mask, dz, 0.0)
        first += tl.sum(dz, axis=1).to(tl.float64)
        second += tl.sum(dz * d, axis=1).to(tl.float64)
    at, plane = partials + channel * splits + split, channels.to(tl.int64) * splits
    tl.store(at, first[:, None], mask=in_rows)
    tl.store(at + plane, second[:, None], mask=in_rows)


@_kernel
def gradient_kernel(
    dx, dy, x, coefficients, gradients, channels, width, rows, units, others, splits, blocks,
    SILU: tl.constexpr, PACK: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    STEPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx = scale * dz + (x - center) * slope + constant."""
    sample, split, row, channel, in_rows = _channels(rows, splits, blocks, CHANNELS)
    center, scale, shift = _coefficients(coefficients, channel, channels, in_rows)
    group = channel // width
    slope = tl.load(gradients + group, mask=in_rows, other=0.0)
    constant = tl.load(gradients + channels // width + group, mask=in_rows, other=0.0)
    for step in range(0, STEPS):
        offsets, mask = _elements(sample, split, row, rows, step, units, others, PACK, LAST, PIXELS, STEPS)
        d = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE) - center
        b_dy = tl.load(dy + offsets, mask=mask, other=0.0).to(COMPUTE)
        dz = activate_grad(b_dy, tl.fma(d, scale, shift), SILU, x.dtype.element_ty)
        b_dx = tl.fma(dz, scale, tl.fma(d, slope, constant))
        tl.store(dx + offsets, b_dx.to(dx.dtype.element_ty), mask=mask)
