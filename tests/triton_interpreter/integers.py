"""Integer operations: two's complement that wraps, and an error where the result would be undefined on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, _get_np_dtype

from .errors import Undefined


def _operands(lhs: TensorHandle, rhs: TensorHandle) -> tuple[np.ndarray, np.ndarray]:
    """Both operands in the numpy type of the left one, so that numpy never promotes to a wider type."""
    numpy_dtype = _get_np_dtype(lhs.dtype.scalar)
    return lhs.data.astype(numpy_dtype, copy=False), rhs.data.astype(numpy_dtype, copy=False)


def _wrapping(operation: Callable, on_bool: Callable) -> Callable:
    def method(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        left, right = _operands(lhs, rhs)
        return TensorHandle((on_bool if left.dtype == np.bool_ else operation)(left, right), lhs.dtype.scalar)

    return method


def _shift(operation: Callable) -> Callable:
    def method(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        left, right = _operands(lhs, rhs)
        width = left.dtype.itemsize * 8
        if ((right < 0) | (right >= width)).any():
            bad = right[(right < 0) | (right >= width)].flat[0]
            raise Undefined(f"shift of {lhs.dtype.scalar} by {bad}: only 0 to {width - 1} are defined")
        return TensorHandle(operation(left, right), lhs.dtype.scalar)

    return method


def _division(operation: Callable) -> Callable:
    def method(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        left, right = _operands(lhs, rhs)
        if (right == 0).any():
            raise Undefined(f"integer division of {lhs.dtype.scalar} by zero (masked-off lanes count too)")
        return TensorHandle(operation(left, right), lhs.dtype.scalar)

    return method


def _truncated_quotient(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left - np.fmod(left, right)) // right


def multiply_high(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The upper half of the double-width unsigned product, in the type of `left` (32- or 64-bit integers)."""
    unsigned = np.dtype(f"u{left.dtype.itemsize}")
    x, y = left.view(unsigned), right.view(unsigned)
    if unsigned.itemsize == 4:
        high = (x.astype(np.uint64) * y.astype(np.uint64)) >> np.uint64(32)
        return high.astype(np.uint32).view(left.dtype)
    low_mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x_low, x_high, y_low, y_high = x & low_mask, x >> half, y & low_mask, y >> half
    middle = x_high * y_low + ((x_low * y_low) >> half)  # cannot overflow: (2**32-1)**2 + 2**32-1 < 2**64
    cross = (middle & low_mask) + x_low * y_high
    return (x_high * y_high + (middle >> half) + (cross >> half)).view(left.dtype)


class IntegerOps(interpreter.InterpreterBuilder):
    create_add = _wrapping(np.add, np.logical_xor)
    create_sub = _wrapping(np.subtract, np.logical_xor)
    create_mul = _wrapping(np.multiply, np.logical_and)
    create_shl = _shift(np.left_shift)
    create_lshr = _shift(np.right_shift)
    create_ashr = _shift(np.right_shift)
    create_sdiv = _division(_truncated_quotient)
    create_udiv = _division(_truncated_quotient)
    create_srem = _division(np.fmod)
    create_urem = _division(np.fmod)

    def create_umulhi(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        left, right = np.broadcast_arrays(*_operands(lhs, rhs))
        result = multiply_high(np.ascontiguousarray(left), np.ascontiguousarray(right))
        return TensorHandle(result, lhs.dtype.scalar)

    def create_histogram(self, data: TensorHandle, bins: int, mask: TensorHandle | None) -> TensorHandle:
        values = data.data if mask is None else data.data[mask.data]
        if ((values < 0) | (values >= bins)).any():
            raise Undefined(f"histogram of {bins} bins got the value {values[(values < 0) | (values >= bins)].flat[0]}")
        return TensorHandle(np.bincount(values.ravel(), minlength=bins).astype(np.int32), tl.int32)

    def create_gather(self, src: TensorHandle, indices: TensorHandle, axis: int) -> TensorHandle:
        size = src.data.shape[axis]
        if ((indices.data < 0) | (indices.data >= size)).any():
            bad = indices.data[(indices.data < 0) | (indices.data >= size)].flat[0]
            raise Undefined(f"gather along axis {axis} of size {size} got the index {bad}")
        return TensorHandle(np.take_along_axis(src.data, indices.data, axis=axis), src.dtype.scalar)
