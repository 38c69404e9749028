"""tl.dot: operands rounded as `input_precision` asks, products and sums in the accumulator's type.

Order and width of a tensor core's inner sums are not documented and differ between generations, so results agree with a
GPU to rounding error, not bit for bit. What is reproduced is what the operands lose:
  tf32            Triton hands float32 registers to the tensor core, which ignores their 13 low bits (no cvt is emitted)
  tf32x3          three products of operands split by cvt.rna.tf32
  bf16x3, bf16x6  the same with two or three bfloat16 parts
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from . import formats
from .casts import FP8, float_to_float
from .errors import NotFaithful


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    return formats.bfloat16_to_float32(formats.float32_to_bfloat16(values))


SPLITS = {"TF32x3": (2, formats.round_to_tf32), "BF16x3": (2, _round_to_bfloat16), "BF16x6": (3, _round_to_bfloat16)}


def _split(values: np.ndarray, parts: int, rounding: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """values = sum of `parts` arrays, each exact in the narrow format, largest first."""
    result = []
    for _ in range(parts):
        result.append(rounding(values))
        values = values - result[-1]
    return result


def _multiply_split(a: np.ndarray, b: np.ndarray, parts: int, rounding: Callable) -> np.ndarray:
    a_parts, b_parts = _split(a, parts, rounding), _split(b, parts, rounding)
    smallest_first = sorted(((i, j) for i in range(parts) for j in range(parts - i)), key=lambda ij: -(ij[0] + ij[1]))
    return sum(np.matmul(a_parts[i], b_parts[j]) for i, j in smallest_first)


def _multiply_float32(a: np.ndarray, b: np.ndarray, precision: str) -> np.ndarray:
    if precision == "IEEE":
        return np.matmul(a, b)
    if precision == "TF32":
        return np.matmul(formats.truncate_to_tf32(a), formats.truncate_to_tf32(b))
    if precision in SPLITS:
        return _multiply_split(a, b, *SPLITS[precision])
    raise NotFaithful(f"tl.dot with input_precision {precision} is not available")


class DotOps(interpreter.InterpreterBuilder):
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc) -> TensorHandle:
        """a (..., M, K), b (..., K, N), d (..., M, N) -> d + a @ b in d's type."""
        operand, result = a.dtype.scalar, d.dtype.scalar
        if operand.is_int():
            return TensorHandle(np.matmul(a.data, b.data, dtype=np.int32) + d.data, result)
        if operand == tl.float64:
            return TensorHandle(np.matmul(a.data, b.data) + d.data, result)
        if operand == tl.float32:
            product = _multiply_float32(a.data, b.data, input_precision.name)
        elif operand in (tl.float16, tl.bfloat16) or operand in FP8:
            left = float_to_float(a.data, operand, tl.float32)
            product = np.matmul(left, float_to_float(b.data, b.dtype.scalar, tl.float32))
        else:
            raise NotFaithful(f"tl.dot of {operand} is not available")
        accumulated = product + float_to_float(d.data, result, tl.float32)
        return TensorHandle(float_to_float(accumulated, tl.float32, result), result)
