"""Memoises what Triton's front end computes anew for every operation: most of the time an interpreted kernel takes.

Nothing here changes a result. Types and shapes are immutable, so equal ones may share their parts.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

NUMPY_TYPES: dict[str, np.dtype] = {}


def numpy_dtype(dtype: tl.dtype) -> np.dtype:
    """Replaces interpreter._get_np_dtype, which builds its table at every call."""
    scalar = dtype.scalar
    if isinstance(scalar, tl.pointer_type):
        return np.dtype(np.uint64)
    if scalar.name not in NUMPY_TYPES:
        NUMPY_TYPES[scalar.name] = _original_numpy_dtype(scalar)
    return NUMPY_TYPES[scalar.name]


def _sizes(shape: object) -> tuple[int, ...] | None:
    """The shape as a tuple of Python integers, or None when it is anything unusual."""
    if not isinstance(shape, (list, tuple, tl.tuple)):
        return None
    sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    return sizes if all(type(size) is int for size in sizes) else None


_block_types: dict[tuple[str, tuple[int, ...]], tuple] = {}
_tensor_shapes: dict[tuple[int, ...], tuple] = {}


def _init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: object) -> None:
    sizes = _sizes(shape)
    if sizes is None or (element_ty.name, sizes) not in _block_types:
        _original_init_block_type(self, element_ty, shape)
        if sizes is not None:
            _block_types[element_ty.name, sizes] = (self.shape, self.numel, self.name)
        return
    self.element_ty = element_ty
    self.shape, self.numel, self.name = _block_types[element_ty.name, sizes]


def _init_tensor(self: tl.tensor, handle: object, type: tl.dtype) -> None:
    sizes = _sizes(type.shape) if type.is_block() else ()
    if sizes is None or sizes not in _tensor_shapes:
        _original_init_tensor(self, handle, type)
        if sizes is not None:
            _tensor_shapes[sizes] = (self.shape, self.numel)
        return
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _tensor_shapes[sizes]


_original_numpy_dtype = interpreter._get_np_dtype
_original_init_block_type = tl.block_type.__init__
_original_init_tensor = tl.tensor.__init__


def install() -> None:
    """Call before other modules take _get_np_dtype from the interpreter by name."""
    interpreter._get_np_dtype = numpy_dtype
    tl.block_type.__init__ = _init_block_type
    tl.tensor.__init__ = _init_tensor
