"""The end of a convolution: activation(sum + bias + residual), rounded once and stored; and activation gradients."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .conv2d_tile import along, strides_of
from .philox import exp_ieee

RELU: tl.constexpr = tl.constexpr(1)  # the numbers of csrc/include/conv2d.h
LEAKY_RELU: tl.constexpr = tl.constexpr(2)
SILU: tl.constexpr = tl.constexpr(3)
GELU: tl.constexpr = tl.constexpr(4)
GELU_TANH: tl.constexpr = tl.constexpr(5)
SIGMOID: tl.constexpr = tl.constexpr(6)
TANH: tl.constexpr = tl.constexpr(7)

SLOPE: tl.constexpr = tl.constexpr(0.01)
SQRT_HALF: tl.constexpr = tl.constexpr(0.70710678118654752)
SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(0.79788456080286536)
INV_SQRT_2PI: tl.constexpr = tl.constexpr(0.39894228040143268)
CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def _exp(x, ELEMENT: tl.constexpr):
    """For 16-bit results the GPU's approximation is exact enough."""
    if ELEMENT.primitive_bitwidth == 32:
        return exp_ieee(x)
    else:
        return tl.exp(x)


@triton.jit
def _sigmoid(z, ELEMENT: tl.constexpr):
    e = _exp(-tl.abs(z), ELEMENT)
    return tl.where(z < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh(z):
    return libdevice.tanh(z)


@triton.jit
def activate(z, KIND: tl.constexpr, ELEMENT: tl.constexpr):
    """z is float32, or float64 when ELEMENT, the type of the result, is."""
    if KIND == RELU:
        z = tl.where(z < 0.0, 0.0, z)
    elif KIND == LEAKY_RELU:
        z = tl.where(z < 0.0, z * SLOPE, z)
    elif KIND == SILU:
        z = z * _sigmoid(z, ELEMENT)
    elif KIND == GELU:
        z = z * 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
    elif KIND == GELU_TANH:
        z = z * 0.5 * (1.0 + _tanh(z * (1.0 + z * z * CUBIC) * SQRT_2_OVER_PI))
    elif KIND == SIGMOID:
        z = _sigmoid(z, ELEMENT)
    elif KIND == TANH:
        z = _tanh(z)
    return z


@triton.jit
def derivative(s, KIND: tl.constexpr, ELEMENT: tl.constexpr):
    """s is the activation's input for silu and gelu, its output for the others."""
    if KIND == RELU:
        d = tl.where(s <= 0.0, 0.0, 1.0).to(s.dtype)
    elif KIND == LEAKY_RELU:
        d = tl.where(s <= 0.0, s * 0.0 + SLOPE, s * 0.0 + 1.0)
    elif KIND == SILU:
        p = _sigmoid(s, ELEMENT)
        d = tl.fma(s * p, 1.0 - p, p)
    elif KIND == GELU:
        d = 0.5 * (1.0 + tl.erf(s * SQRT_HALF)) + s * (_exp(s * s * -0.5, ELEMENT) * INV_SQRT_2PI)
    elif KIND == GELU_TANH:
        t = _tanh(s * (1.0 + s * s * CUBIC) * SQRT_2_OVER_PI)
        inner = (1.0 + s * s * (3.0 * CUBIC)) * SQRT_2_OVER_PI
        d = 0.5 * (1.0 + t) + 0.5 * s * (1.0 - t * t) * inner
    elif KIND == SIGMOID:
        d = s * (1.0 - s)
    elif KIND == TANH:
        d = 1.0 - s * s
    else:
        d = s * 0.0 + 1.0
    return d


@triton.jit
def finish(
    z, n, h, w, in_image, o, in_channels,
    y, pre, y_n, y_c, y_h, y_w, bias, bias_stride, residual, r_n, r_c, r_h, r_w,
    AXIS: tl.constexpr, Y_UNIT: tl.constexpr, Y_PACK: tl.constexpr, R_UNIT: tl.constexpr, R_PACK: tl.constexpr,
    ACTIVATION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Stores a block of finished sums z, whose pixels (n, h, w) lie along AXIS and whose channels o along the other.

    Args:
        y, pre: of one layout; pre may be None and receives the value before the activation.
        bias, residual: may be None.
    """
    mask = along(in_image, AXIS) & along(in_channels, 1 - AXIS)
    if bias is not None:
        b = tl.load(bias + o.to(tl.int64) * bias_stride, mask=in_channels, other=0.0).to(z.dtype)
        z += along(b, 1 - AXIS)
    h, w, o = h.to(INDEX), w.to(INDEX), o.to(INDEX)
    if residual is not None:
        r_n, r_c, r_h, r_w = strides_of(r_n, r_c, r_h, r_w, R_UNIT, R_PACK)
        rows = along(residual + n.to(tl.int64) * r_n, AXIS)
        at = along(h * r_h + w * r_w, AXIS) + along(o * r_c, 1 - AXIS)
        z += tl.load(rows + at, mask=mask, other=0.0).to(z.dtype)
    y_n, y_c, y_h, y_w = strides_of(y_n, y_c, y_h, y_w, Y_UNIT, Y_PACK)
    image = n.to(tl.int64) * y_n
    at = along(h * y_h + w * y_w, AXIS) + along(o * y_c, 1 - AXIS)
    element = y.dtype.element_ty
    if pre is not None:
        tl.store(along(pre + image, AXIS) + at, z.to(element), mask=mask)
    z = activate(z, ACTIVATION, element)
    tl.store(along(y + image, AXIS) + at, z.to(element), mask=mask)
