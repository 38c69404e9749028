"""Conversions between types, rounded and saturated as the GPU's cvt instructions do it."""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, _get_np_dtype

from . import formats, poison
from .errors import NotFaithful, Undefined
from .launch import Launch

FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
NUMPY_FLOATS = {tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}
BITS = {**dict.fromkeys(NUMPY_FLOATS), tl.bfloat16: None, **FP8}


def float_to_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, toward_zero: bool = False) -> np.ndarray:
    """Converts between any two of float16/32/64, bfloat16, float8e4nv and float8e5 with one rounding.

    Raises NotFaithful for other fp8 types and for rounding toward zero into a type where that is not implemented.
    """
    for dtype in (source, target):
        if dtype not in BITS:
            raise NotFaithful(f"conversion {source} -> {target}: {dtype} is not available")
    if source == tl.bfloat16:
        values = formats.bfloat16_to_float32(data)
    elif source in FP8:
        values = formats.fp8_to_float32(data, FP8[source])
    else:
        values = data
    narrower = target.primitive_bitwidth < source.primitive_bitwidth
    if toward_zero and narrower:
        if source != tl.float32 or target not in (tl.bfloat16, tl.float16):
            raise NotFaithful(f"conversion {source} -> {target} toward zero is not available")
        if target == tl.float16:
            return formats.float32_to_float16_toward_zero(values)
        return formats.float32_to_bfloat16(values, toward_zero=True)
    if target in NUMPY_FLOATS:
        return values.astype(NUMPY_FLOATS[target])
    if values.dtype == np.float64:
        values = formats.round_to_odd(values)
    if target == tl.bfloat16:
        return formats.float32_to_bfloat16(values)
    return formats.float32_to_fp8(values, FP8[target])


def float_to_integer(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """Truncates toward zero. 32- and 64-bit targets saturate and turn NaN into 0, as cvt.rzi does."""
    whole = np.trunc(float_to_float(data, source, tl.float64))
    numpy_dtype = _get_np_dtype(target)
    limits = np.iinfo(numpy_dtype)
    # float(limits.max) rounds up to 2**63 or 2**64 for 64-bit types, which is why the comparison is strict there
    too_big = whole > limits.max if target.primitive_bitwidth < 64 else whole >= float(limits.max)
    too_small = whole < limits.min
    if target.primitive_bitwidth < 32 and (too_big | too_small).any():
        value = whole[too_big | too_small].flat[0]
        raise Undefined(f"conversion of {value:g} from {source} to {target}: out of range, clamp it first")
    inside = np.where(np.isnan(whole) | too_big | too_small, 0, whole).astype(numpy_dtype)
    return np.where(too_big, limits.max, np.where(too_small, limits.min, inside)).astype(numpy_dtype)


def integer_to_float(data: np.ndarray, target: tl.dtype) -> np.ndarray:
    """Rounds to nearest even; into a 16-bit type by way of float32, as Triton's code does for bfloat16."""
    if target in (tl.float32, tl.float64):
        return data.astype(NUMPY_FLOATS[target])
    return float_to_float(data.astype(np.float32), tl.float32, target)


class CastOps(interpreter.InterpreterBuilder):
    launch: Launch | None = None

    def create_fp_trunc(self, src, dst_type):
        return self.create_fp_to_fp(src, dst_type, None)

    create_fp_ext = create_fp_trunc

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        toward_zero = rounding_mode == ir.ROUNDING_MODE.RTZ
        source, target = src.dtype.scalar, dst_type.scalar
        return TensorHandle(float_to_float(src.data, source, target, toward_zero), target)

    def create_fp_to_si(self, src, dst_type):
        return TensorHandle(float_to_integer(src.data, src.dtype.scalar, dst_type.scalar), dst_type.scalar)

    create_fp_to_ui = create_fp_to_si

    def create_si_to_fp(self, src, dst_type):
        values = integer_to_float(src.data, dst_type.scalar)
        if self.launch is not None and self.launch.poison_exists:
            poisoned = poison.find(src.data, src.dtype.scalar)
            if poisoned.any():
                values = poison.fill(values, dst_type.scalar, poisoned)
        return TensorHandle(values, dst_type.scalar)

    create_ui_to_fp = create_si_to_fp
