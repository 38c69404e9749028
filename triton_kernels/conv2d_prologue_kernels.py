"""The prologue of a convolution, activation(x * scale + shift) per channel: of a block, a pass, and its gradient."""

import triton
import triton.language as tl

from .conv2d_epilogue import SIGMOID, TANH, activate, derivative
from .conv2d_tile import along, block_of, ordered_sum, pixels_of, strides_of

_kernel = triton.jit(
    do_not_specialize=[
        "batch", "height", "width", "units", "steps", "splits",
        "x_n", "x_c", "x_h", "x_w", "y_n", "y_c", "y_h", "y_w", "s_n", "s_c", "s_h", "s_w",
    ]
)  # fmt: skip


@triton.jit
def _values(values, n, c, mask, channels, SAMPLES: tl.constexpr):
    """Of scale or shift, (channels) or (samples, channels), for the samples and channels of a block."""
    if SAMPLES:
        return tl.load(values + (n.to(tl.int64) * channels + c), mask=mask, other=0.0)
    else:
        return tl.load(values + c, mask=c < channels, other=0.0)


@triton.jit
def before_activation(
    x, mask, n, c, channels, scale, shift,
    SCALE_SAMPLES: tl.constexpr, SHIFT_SAMPLES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """x * scale + shift for a block x of samples n along one axis and channels c along the other."""
    u = x.to(COMPUTE)
    if scale is not None:
        factor = tl.broadcast_to(_values(scale, n, c, mask, channels, SCALE_SAMPLES), u.shape)
        if shift is not None:
            u = tl.fma(u, factor, tl.broadcast_to(_values(shift, n, c, mask, channels, SHIFT_SAMPLES), u.shape))
        else:
            u = u * factor
    elif shift is not None:
        u = u + _values(shift, n, c, mask, channels, SHIFT_SAMPLES)
    return u


@_kernel
def prologue_kernel(
    y, x, y_n, y_c, y_h, y_w, x_n, x_c, x_h, x_w, batch, height, width, units, scale, shift,
    KIND: tl.constexpr, SCALE_SAMPLES: tl.constexpr, SHIFT_SAMPLES: tl.constexpr,
    X_UNIT: tl.constexpr, X_PACK: tl.constexpr, Y_UNIT: tl.constexpr, Y_PACK: tl.constexpr, PACK: tl.constexpr,
    INDEX: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = activation(x * scale + shift). Strides x are those of y and the other way round, as elementwise() has it."""
    AXIS: tl.constexpr = 0 if X_UNIT == 1 else 1  # of pixels
    block, c, in_channels = block_of(units, PACK, BLOCK_C, INDEX)
    n, i, j, _, _, in_image = pixels_of(block, batch, height, width, height, width, 1, 1, 0, 0, BLOCK_P, INDEX)
    mask = along(in_image, AXIS) & along(in_channels, 1 - AXIS)
    n, i, j, c = n.to(tl.int64), i.to(INDEX), j.to(INDEX), c.to(INDEX)
    y_n, y_c, y_h, y_w = strides_of(y_n, y_c, y_h, y_w, Y_UNIT, Y_PACK)
    x_n, x_c, x_h, x_w = strides_of(x_n, x_c, x_h, x_w, X_UNIT, X_PACK)
    from_ = along(x + n * y_n + (i * y_h + j * y_w), AXIS) + along(c * y_c, 1 - AXIS)
    to = along(y + n * x_n + (i * x_h + j * x_w), AXIS) + along(c * x_c, 1 - AXIS)
    element = y.dtype.element_ty
    u = before_activation(
        tl.load(from_, mask=mask, other=0.0), mask, along(n, AXIS), along(c, 1 - AXIS), units * PACK,
        scale, shift, SCALE_SAMPLES, SHIFT_SAMPLES, COMPUTE,
    )  # fmt: skip
    tl.store(to, activate(u, KIND, element).to(element), mask=mask)


@triton.jit
def _derivative(u, KIND: tl.constexpr, ELEMENT: tl.constexpr):
    """At the activation's input u, without cancellation where it is small."""
    if KIND == SIGMOID:
        q = activate(-tl.abs(u), SIGMOID, ELEMENT)
        d = q * (1.0 - q)
    elif KIND == TANH:
        q = activate(-2.0 * tl.abs(u), SIGMOID, ELEMENT)
        d = 4.0 * q * (1.0 - q)
    else:
        d = derivative(u, KIND, ELEMENT)
    return d


@_kernel
def prologue_gradient_kernel(
    dx, partials, dy, x, y_n, y_c, y_h, y_w, s_n, s_c, s_h, s_w, x_n, x_c, x_h, x_w,
    batch, height, width, units, steps, splits, scale, shift,
    KIND: tl.constexpr, SCALE_SAMPLES: tl.constexpr, SHIFT_SAMPLES: tl.constexpr,
    X_UNIT: tl.constexpr, X_PACK: tl.constexpr, Y_UNIT: tl.constexpr, Y_PACK: tl.constexpr,
    S_UNIT: tl.constexpr, S_PACK: tl.constexpr, PACK: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """dx, and partials (splits, 2, batch, channels) of the gradients of scale and shift unless they are None.

    A program owns a split of a sample and BLOCK_C channels. Strides x of dx, y of dy, s of x.
    """
    AXIS: tl.constexpr = 0 if X_UNIT == 1 else 1  # of pixels
    place, c, in_channels = block_of(units, PACK, BLOCK_C, INDEX)
    sample, split = (place // splits).to(tl.int64), place % splits
    channels = units * PACK
    y_n, y_c, y_h, y_w = strides_of(y_n, y_c, y_h, y_w, Y_UNIT, Y_PACK)
    s_n, s_c, s_h, s_w = strides_of(s_n, s_c, s_h, s_w, S_UNIT, S_PACK)
    x_n, x_c, x_h, x_w = strides_of(x_n, x_c, x_h, x_w, X_UNIT, X_PACK)
    y_channels, s_channels = along(dy + sample * y_n + c * y_c, 1 - AXIS), along(x + sample * s_n + c * s_c, 1 - AXIS)
    x_channels = along(dx + sample * x_n + c * x_c, 1 - AXIS)
    element = dx.dtype.element_ty
    if AXIS == 0:
        products = tl.zeros([BLOCK_P, BLOCK_C], COMPUTE)
    else:
        products = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    totals = products
    for step in range(0, steps):
        _, i, j, _, _, in_image = pixels_of(
            split.to(INDEX) * steps + step, 1, height, width, height, width, 1, 1, 0, 0, BLOCK_P, INDEX
        )
        i, j = i.to(INDEX), j.to(INDEX)
        mask = along(in_image, AXIS) & along(in_channels, 1 - AXIS)
        value = tl.load(s_channels + along(i * s_h + j * s_w, AXIS), mask=mask, other=0.0).to(COMPUTE)
        gradient = tl.load(y_channels + along(i * y_h + j * y_w, AXIS), mask=mask, other=0.0).to(COMPUTE)
        u = before_activation(
            value, mask, sample, along(c, 1 - AXIS), channels, scale, shift, SCALE_SAMPLES, SHIFT_SAMPLES, COMPUTE
        )
        gradient = tl.where(mask, gradient * _derivative(u, KIND, element), 0.0)
        products, totals = tl.fma(gradient, value, products), totals + gradient
        if scale is not None:
            gradient = gradient * _values(scale, sample, along(c, 1 - AXIS), mask, channels, SCALE_SAMPLES)
        tl.store(x_channels + along(i * x_h + j * x_w, AXIS), gradient.to(element), mask=mask)
    if partials is not None:
        to = partials + (split.to(tl.int64) * 2 * batch + sample) * channels + c
        tl.store(to, ordered_sum(tl.trans(products) if AXIS == 0 else products, LEVELS), mask=in_channels)
        to += batch.to(tl.int64) * channels
        tl.store(to, ordered_sum(tl.trans(totals) if AXIS == 0 else totals, LEVELS), mask=in_channels)
