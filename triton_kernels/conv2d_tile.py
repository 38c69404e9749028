"""What the kernels of conv2d share: where a block of output pixels is, what it reads, and how sizes and strides come.

A block of pixels and channels has its pixels on one axis and its channels on the other: on the last axis the one that
memory has innermost, so that threads side by side read side by side. A size or stride in units is multiplied by a
constexpr PACK, which tells the compiler what divides it; nothing else is known of it, so no other shape compiles anew.
"""

import triton
import triton.language as tl

CHANNELS: tl.constexpr = tl.constexpr(1)  # UNIT: the dimension whose stride is 1
COLUMNS: tl.constexpr = tl.constexpr(3)


@triton.jit
def along(v, AXIS: tl.constexpr):
    """A vector along an axis of a block."""
    return v[:, None] if AXIS == 0 else v[None, :]


@triton.jit
def strides_of(n, c, h, w, UNIT: tl.constexpr, PACK: tl.constexpr):
    """Strides in elements. That of the dimension UNIT is 1, the others come in units of PACK."""
    if UNIT == 1:
        return n.to(tl.int64) * PACK, 1, h * PACK, w * PACK
    elif UNIT == 3:
        return n.to(tl.int64) * PACK, c * PACK, h * PACK, 1
    else:
        return n.to(tl.int64) * PACK, c * PACK, h * PACK, w * PACK


@triton.jit
def pixels_of(
    block, batch, h_count, w_count, h_size, w_size, h_step, w_step, h_phase, w_phase,
    BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Of a block of pixels: sample, row and column counted in steps, row and column, mask; all (BLOCK).

    Rows phase, phase + step, ... and columns likewise are counted through, h_count * w_count for each sample.
    """
    p = block.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    area = h_count.to(INDEX) * w_count
    i, j = p % area // w_count, p % w_count
    h, w = i * h_step + h_phase, j * w_step + w_phase
    return p // area, i, j, h, w, (p < batch * area) & (h < h_size) & (w < w_size)


@triton.jit
def block_of(units, PACK: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """Index of the pixel block, channels and their mask."""
    channels = units.to(INDEX) * PACK
    pid = tl.program_id(0)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    c = (pid % c_blocks).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    return pid // c_blocks, c, c < channels


@triton.jit
def taps_of(phase, pad, stride, dilation, kernel, step, inverse, TRANSPOSED: tl.constexpr):
    """Of one dimension: first tap and number of taps, what the first one reads for count 0, and the next ones' shift.

    The forward reads count * stride - pad + tap * dilation. The input gradient at count * stride + phase adds up the
    outputs i with i * stride - pad + tap * dilation = count * stride + phase. Such taps lie `step` apart, step = stride
    / gcd(stride, dilation); inverse is that of dilation / gcd modulo step.
    """
    if TRANSPOSED:
        common = stride // step
        place = phase + pad
        first = ((place // common).to(tl.int64) * inverse % step).to(tl.int32)
        count = tl.where((place % common == 0) & (first < kernel), (kernel - first + step - 1) // step, 0)
        return first, count, (place - first * dilation) // stride, -(dilation // common)
    else:
        return 0, kernel, -pad, dilation


@triton.jit
def source(i, size, PADDING: tl.constexpr):
    """The index inside the image that the padding mode puts at i, and whether there is one."""
    if PADDING == 0:
        return i, (i >= 0) & (i < size)
    else:
        if PADDING == 1:  # reflect
            i = tl.where(i < 0, -i, i)
            i = tl.where(i < size, i, 2 * (size - 1) - i)
        elif PADDING == 2:  # replicate
            i = tl.minimum(tl.maximum(i, 0), size - 1)
        else:  # circular
            i = tl.where(i < 0, i + size, i)
            i = tl.where(i < size, i, i - size)
        return i, i == i


@triton.jit
def divide(p, divisor, magic, shift, FAST: tl.constexpr):
    """p // divisor for 0 <= p < 2^31, with magic = ceil(2^shift / divisor) < 2^32."""
    if FAST:
        return (p.to(tl.int64) * magic >> shift).to(tl.int32)
    else:
        return p // divisor


@triton.jit
def ordered_sum(x, LEVELS: tl.constexpr):
    """(N, 2^LEVELS) -> (N): neighbours are added pairwise. The order of tl.sum would follow the layout of x."""
    for _ in tl.static_range(LEVELS):
        first, second = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        x = first + second
    return tl.reshape(x, [x.shape[0]])
