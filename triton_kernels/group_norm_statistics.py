"""The arithmetic of group_norm on statistics, and the kernels that put partial results together.

The steps of csrc/include/group_norm_math.h and csrc/cuda/group_norm_combine.cuh, in float64. The normalised value is
(x - center) * scale + shift: center is the rounded mean when the mean is large (then the difference is exact) and 0
otherwise; shift carries delta, what center leaves of the mean.
"""

import triton
import triton.language as tl

from .philox import exp_ieee

_kernel = triton.jit(
    do_not_specialize=["eps", "groups", "width", "pixels", "splits", "span", "rows", "channels", "blocks"]
)


@triton.jit
def is_far(mean, rstd):
    """Whether the rounding of x * scale and of mean * scale would show in their difference."""
    return tl.abs(mean) * rstd > 0.5


@triton.jit
def finish(center, first, second, size, eps):
    """Mean and rstd from the sums of x - center and of its square. eps: the bits of a float64."""
    delta = first / size
    variance = (second - first * delta) / size
    variance = tl.where(variance < 0.0, 0.0, variance)  # NaN stays
    epsilon = eps.to(tl.int64).to(tl.float64, bitcast=True)
    return center + delta, 1.0 / tl.sqrt(variance + epsilon)


@triton.jit
def recenter(mean, rstd, COMPUTE: tl.constexpr):
    """The center that elementwise passes use, and mean - center."""
    center = tl.where(is_far(mean, rstd), mean.to(COMPUTE).to(tl.float64), 0.0)
    return center, mean - center


@triton.jit
def channel_affine(weight, bias, channel, mask, delta, rstd):
    """Scale, shift and weight of channels."""
    scale = rstd
    if weight is None:
        w = tl.full([1], 1.0, tl.float64)
    else:
        w = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float64)
        scale = rstd * w
    shift = -delta * scale
    if bias is not None:
        shift = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float64) + shift
    return scale, shift, w


@triton.jit
def backward_affine(first, second, delta, rstd, size):
    """Slope and constant of a group's part of dx, (x - center) * slope + constant, from its weighted sums."""
    slope = -rstd * rstd * second / size
    return slope, -rstd * first / size - slope * delta


@triton.jit
def _exp_and_reciprocal(z, ELEMENT: tl.constexpr):
    """e = exp(-|z|) and 1 + e; for 16-bit results the GPU's approximation is exact enough."""
    negative = -tl.abs(z)
    if ELEMENT.primitive_bitwidth == 32:
        e = exp_ieee(negative)
    else:
        e = tl.exp(negative)
    return e, 1.0 + e


@triton.jit
def _divide(a, b, ELEMENT: tl.constexpr):
    if ELEMENT.primitive_bitwidth == 32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def activate(z, SILU: tl.constexpr, ELEMENT: tl.constexpr):
    """z, or silu(z) = z * sigmoid(z)."""
    if SILU:
        e, denominator = _exp_and_reciprocal(z, ELEMENT)
        z = _divide(tl.where(z < 0.0, z * e, z), denominator, ELEMENT)
    return z


@triton.jit
def activate_grad(grad, z, SILU: tl.constexpr, ELEMENT: tl.constexpr):
    """grad * act'(z); neither sigmoid(z) nor sigmoid(-z) is taken as 1 minus the other."""
    if SILU:
        e, denominator = _exp_and_reciprocal(z, ELEMENT)
        r = _divide(tl.full(denominator.shape, 1.0, denominator.dtype), denominator, ELEMENT)
        er = e * r
        plus, minus = tl.where(z < 0.0, er, r), tl.where(z < 0.0, r, er)
        grad = grad * (plus * tl.fma(z, minus, 1.0))
    return grad


@_kernel
def combine_kernel(
    coefficients, stats, mean_out, rstd_out, mean, rstd, partials, weight, bias, eps,
    groups, width, pixels, splits, span,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Statistics and channel coefficients of one group.

    partials: (3, batch * channels, splits) center and sums around it, of splits of `span` pixels. coefficients: (3,
    batch * channels) center, scale, shift. Forward: mean_out and rstd_out (batch * groups) are written. Backward: mean
    and rstd are given, partials exist where the mean is far from 0; stats (3, batch * groups) gets center, delta, rstd.
    """
    item, items = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    rows = items * width
    count = width.to(tl.int64) * splits
    size = (width.to(tl.int64) * pixels).to(tl.float64)
    if mean is None:
        wanted = count
    else:
        b_mean, b_rstd = tl.load(mean + item).to(tl.float64), tl.load(rstd + item).to(tl.float64)
        far = is_far(b_mean, b_rstd)
        wanted = tl.where(far, count, 0)
    plane = rows * splits
    mine = partials + item * count
    common = tl.load(mine, mask=wanted > 0, other=0.0)
    first = tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    for start in range(0, wanted, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < wanted
        shift = tl.load(mine + i, mask=mask, other=0.0) - common
        b_first = tl.load(mine + plane + i, mask=mask, other=0.0)
        b_second = tl.load(mine + 2 * plane + i, mask=mask, other=0.0)
        n = tl.minimum(span, pixels - i % splits * span).to(tl.float64)
        second += tl.where(mask, b_second + shift * (2.0 * b_first + n * shift), 0.0)
        first += tl.where(mask, b_first + n * shift, 0.0)
    sum_first, sum_second = tl.sum(first, axis=0), tl.sum(second, axis=0)
    if mean is None:
        b_mean, b_rstd = finish(common, sum_first, sum_second, size, eps)
        tl.store(mean_out + item, b_mean.to(COMPUTE))
        tl.store(rstd_out + item, b_rstd.to(COMPUTE))
        center, delta = recenter(b_mean, b_rstd, COMPUTE)
    else:
        center = tl.where(far, b_mean, 0.0)
        delta = tl.where(far, sum_first / size + (common - center), b_mean)
        tl.store(stats + item, center)
        tl.store(stats + items + item, delta)
        tl.store(stats + 2 * items + item, b_rstd)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mask = c < width
        scale, shift, _ = channel_affine(weight, bias, item % groups * width + c, mask, delta, b_rstd)
        out = coefficients + item * width + c
        tl.store(out, tl.broadcast_to(center, [BLOCK]).to(COMPUTE), mask=mask)
        tl.store(out + rows, tl.broadcast_to(scale, [BLOCK]).to(COMPUTE), mask=mask)
        tl.store(out + 2 * rows, tl.broadcast_to(shift, [BLOCK]).to(COMPUTE), mask=mask)


@_kernel
def combine_gradient_kernel(
    gradients, sums, partials, stats, weight, groups, width, pixels, splits,
    CHANNELS: tl.constexpr, SPLITS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Of one group: channel sums into (batch, 2 * channels), and slope and constant into (2, batch * groups).

    partials: (2, batch * channels, splits) sums of dz and of dz * (x - center).
    """
    item, items = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    delta, rstd = tl.load(stats + items + item), tl.load(stats + 2 * items + item)
    size = (width.to(tl.int64) * pixels).to(tl.float64)
    plane = items * width * splits
    weighted_first = tl.zeros([CHANNELS], tl.float64)
    weighted_second = tl.zeros([CHANNELS], tl.float64)
    for start in range(0, width, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        in_group = c < width
        first = tl.zeros([CHANNELS], tl.float64)
        second = tl.zeros([CHANNELS], tl.float64)
        for start_split in range(0, splits, SPLITS):
            i = start_split + tl.arange(0, SPLITS)[None, :]
            mask = in_group[:, None] & (i < splits)
            at = partials + (item * width + c[:, None]) * splits + i
            first += tl.sum(tl.load(at, mask=mask, other=0.0), axis=1)
            second += tl.sum(tl.load(at + plane, mask=mask, other=0.0), axis=1)
        channel = item % groups * width + c
        second = channel_sums(sums, item // groups, channel, groups * width, in_group, first, second, delta, rstd)
        w = 1.0
        if weight is not None:
            w = tl.load(weight + channel, mask=in_group, other=0.0).to(tl.float64)
        weighted_first += w * first
        weighted_second += w * second
    total_first, total_second = tl.sum(weighted_first, axis=0), tl.sum(weighted_second, axis=0)
    slope, constant = backward_affine(total_first, total_second, delta, rstd, size)
    tl.store(gradients + item, slope.to(COMPUTE))
    tl.store(gradients + items + item, constant.to(COMPUTE))


@triton.jit
def channel_sums(sums, sample, channel, channels, mask, first, second, delta, rstd):
    """Stores a channel's sums of dz and of dz * (x - mean) * rstd; returns the latter."""
    normalised = (second - delta * first) * rstd
    at = sums + sample * (2 * channels) + channel
    tl.store(at, first, mask=mask)
    tl.store(at + channels, normalised, mask=mask)
    return normalised


@_kernel
def add_samples_kernel(
    out, dbias, dweight, sums, rows, channels, blocks, ROWS: tl.constexpr, STEPS: tl.constexpr, COLS: tl.constexpr
):
    """Adds ROWS * STEPS rows of sums (rows, 2 * channels): into `out`, or, without it, into dbias and dweight."""
    pid = tl.program_id(0).to(tl.int64)
    column = (pid // blocks * COLS + tl.arange(0, COLS))[None, :]
    columns = 2 * channels
    total = tl.zeros([ROWS, COLS], tl.float64)
    for step in range(0, STEPS):
        row = (pid % blocks * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        total += tl.load(sums + row * columns + column, mask=(row < rows) & (column < columns), other=0.0)
    added = tl.sum(total, axis=0)[None, :]
    if out is not None:
        tl.store(out + pid % blocks * columns + column, added, mask=column < columns)
    else:
        tl.store(dbias + column, added.to(dbias.dtype.element_ty), mask=column < channels)
        of_weight = (column >= channels) & (column < columns)
        tl.store(dweight + column - channels, added.to(dweight.dtype.element_ty), mask=of_weight)
