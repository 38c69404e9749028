"""tl.multiple_of and tl.max_contiguous promise facts that the compiler builds vector accesses on: they must be true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl

from .errors import Undefined
from .settings import settings


def _values(hint: Any, rank: int, name: str) -> list[int]:
    listed = list(hint) if isinstance(hint, (list, tuple)) else [hint]
    values = [int(value.value if isinstance(value, tl.constexpr) else value) for value in listed]
    if len(values) != max(1, rank):
        raise ValueError(f"tl.{name} takes one value per dimension, {max(1, rank)}, got {len(values)}")
    return values


def _as_int64(tensor: tl.tensor) -> np.ndarray:
    """The block's integers as int64; pointers as addresses in bytes."""
    data = tensor.handle.data
    return data.view(np.int64) if isinstance(tensor.dtype, tl.pointer_type) else data.astype(np.int64)


def multiple_of(tensor: tl.tensor, values: object, **_: object) -> tl.tensor:
    """Along every dimension, the first element must be a multiple of the value (of bytes, for a block of pointers)."""
    if not isinstance(tensor, tl.tensor) or not settings.hints:
        return tensor
    data = _as_int64(tensor)
    for axis, value in enumerate(_values(values, len(tensor.shape), "multiple_of")):
        first = data.take(0, axis=axis)
        if (first % value).any():
            bad = int(np.ravel(first)[np.flatnonzero(np.ravel(first) % value)[0]])
            raise Undefined(f"tl.multiple_of promises multiples of {value} along dimension {axis}, got {bad}")
    return tensor


def max_contiguous(tensor: tl.tensor, values: object, **_: object) -> tl.tensor:
    """Along every dimension, each group of `value` elements must count up by one (element, for a block of pointers)."""
    if not isinstance(tensor, tl.tensor) or not tensor.shape or not settings.hints:
        return tensor
    data = _as_int64(tensor)
    step = 1
    if isinstance(tensor.dtype, tl.pointer_type):
        step = max(1, tensor.dtype.element_ty.primitive_bitwidth // 8)
    for axis, value in enumerate(_values(values, len(tensor.shape), "max_contiguous")):
        within_group = np.arange(1, data.shape[axis]) % value != 0
        steps = np.diff(np.moveaxis(data, axis, -1))[..., within_group]
        if (steps != step).any():
            raise Undefined(
                f"tl.max_contiguous promises groups of {value} consecutive elements along dimension {axis}, "
                f"got a step of {int(steps[steps != step].flat[0]) / step:g}"
            )
    return tensor


REPLACEMENTS: dict[str, Callable] = {"multiple_of": multiple_of, "max_contiguous": max_contiguous}
