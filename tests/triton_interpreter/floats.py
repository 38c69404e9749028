"""Floating-point operations of the kernel language, each rounded once to its own type.

float16, float32 and float64 use numpy's operation of that type, which is IEEE's. bfloat16 computes in float32 and
rounds back: for + - * / and square root that equals a single rounding, since 24 bits >= 2 * 8 + 2. Transcendental
functions compute in float64 and round once, so results do not depend on which vector instructions numpy found.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from . import formats, poison
from .errors import NotFaithful
from .launch import Launch

_libm_fma = ctypes.CDLL(ctypes.util.find_library("m")).fma
_libm_fma.restype = ctypes.c_double
_libm_fma.argtypes = [ctypes.c_double] * 3
_float64_fma = np.vectorize(_libm_fma, otypes=[np.float64])

NUMPY_FLOATS = {tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}


def widen(handle: TensorHandle) -> np.ndarray:
    """The values of a float16, bfloat16, float32 or float64 handle in a numpy type that has the arithmetic."""
    dtype = handle.dtype.scalar
    if dtype == tl.bfloat16:
        return formats.bfloat16_to_float32(handle.data)
    if dtype not in NUMPY_FLOATS:
        raise NotFaithful(f"arithmetic on {dtype} is not available; convert to float32 first")
    return handle.data


def narrow(values: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """Rounds numpy values of any float type to `dtype`."""
    if dtype == tl.bfloat16:
        if values.dtype == np.float64:
            values = formats.round_to_odd(values)
        return TensorHandle(formats.float32_to_bfloat16(values), tl.bfloat16)
    return TensorHandle(values.astype(NUMPY_FLOATS[dtype], copy=False), dtype)


def fused_multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """x * y + z with one rounding. The operands hold values of `dtype` in any wider numpy type."""
    x, y, z = (operand.astype(np.float64) for operand in (x, y, z))
    if dtype == tl.float64:
        return TensorHandle(_float64_fma(x, y, z), dtype)
    product = x * y  # exact: at most 48 bits
    total = product + z
    # Knuth's two-sum gives what the addition lost; the result is then rounded to odd, so that rounding it again is safe
    virtual = total - product
    lost = (product - (total - virtual)) + (z - virtual)
    inexact = np.isfinite(total) & (lost != 0)
    bits = total.view(np.int64)
    shrink = inexact & ((lost > 0) != (total > 0))  # the true value is nearer to zero than `total`
    odd = np.where(inexact, (bits - shrink) | 1, bits).astype(np.int64).view(np.float64)
    return narrow(odd, dtype)


def _torch_double(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    def apply(values: np.ndarray) -> np.ndarray:
        return function(torch.from_numpy(np.ascontiguousarray(values))).numpy()

    return apply


erf = _torch_double(torch.special.erf)


def _binary(operation: Callable) -> Callable:
    def method(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return narrow(operation(widen(lhs), widen(rhs)), lhs.dtype.scalar)

    return method


def _unary(operation: Callable) -> Callable:
    def method(self, arg: TensorHandle) -> TensorHandle:
        return narrow(operation(widen(arg).astype(np.float64)), arg.dtype.scalar)

    return method


def _comparison(operation: Callable, ordered: bool) -> Callable:
    def method(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        left, right = widen(lhs), widen(rhs)
        nan = np.isnan(left) | np.isnan(right)
        result = operation(left, right)
        return TensorHandle(result & ~nan if ordered else result | nan, tl.int1)

    return method


def _nan_ignoring(operation: Callable) -> Callable:
    """max.f32 and min.f32 return the operand that is a number. Poison is the exception: it must not be lost here."""

    def method(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        result = narrow(operation(widen(lhs), widen(rhs)), lhs.dtype.scalar)
        if self.launch is not None and self.launch.poison_exists:
            dtype = lhs.dtype.scalar
            poisoned = poison.find(lhs.data, dtype) | poison.find(rhs.data, dtype)
            if poisoned.any():
                return TensorHandle(poison.fill(result.data, dtype, poisoned), dtype)
        return result

    return method


class FloatOps(interpreter.InterpreterBuilder):
    launch: Launch | None = None

    create_fadd = _binary(np.add)
    create_fsub = _binary(np.subtract)
    create_fmul = _binary(np.multiply)
    create_fdiv = _binary(np.divide)
    create_precise_divf = _binary(np.divide)
    create_frem = _binary(np.fmod)
    create_minimumf = _binary(np.minimum)
    create_maximumf = _binary(np.maximum)
    create_minnumf = _nan_ignoring(np.fmin)
    create_maxnumf = _nan_ignoring(np.fmax)

    create_exp = _unary(np.exp)
    create_exp2 = _unary(np.exp2)
    create_log = _unary(np.log)
    create_log2 = _unary(np.log2)
    create_sin = _unary(np.sin)
    create_cos = _unary(np.cos)
    create_sqrt = _unary(np.sqrt)
    create_precise_sqrt = _unary(np.sqrt)
    create_rsqrt = _unary(lambda values: 1 / np.sqrt(values))
    create_erf = _unary(erf)
    create_floor = _unary(np.floor)
    create_ceil = _unary(np.ceil)

    create_fcmpOLT = _comparison(np.less, ordered=True)
    create_fcmpOGT = _comparison(np.greater, ordered=True)
    create_fcmpOLE = _comparison(np.less_equal, ordered=True)
    create_fcmpOGE = _comparison(np.greater_equal, ordered=True)
    create_fcmpOEQ = _comparison(np.equal, ordered=True)
    create_fcmpONE = _comparison(np.not_equal, ordered=True)
    create_fcmpULT = _comparison(np.less, ordered=False)
    create_fcmpUGT = _comparison(np.greater, ordered=False)
    create_fcmpULE = _comparison(np.less_equal, ordered=False)
    create_fcmpUGE = _comparison(np.greater_equal, ordered=False)
    create_fcmpUEQ = _comparison(np.equal, ordered=False)
    create_fcmpUNE = _comparison(np.not_equal, ordered=False)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        return fused_multiply_add(widen(x), widen(y), widen(z), z.dtype.scalar)

    def create_clampf(self, arg, low, high, propagate_nan) -> TensorHandle:
        if propagate_nan == tl.PropagateNan.ALL:
            return self.create_minimumf(self.create_maximumf(arg, low), high)
        return self.create_minnumf(self.create_maxnumf(arg, low), high)
