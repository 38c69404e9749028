"""tl.reduce and tl.associative_scan over whole blocks.

Reductions combine neighbours pairwise, which is the shape of a GPU's tree (its exact order depends on the layout, so
sums agree to rounding error). Any associative combine function runs on half blocks at a time, not element by element.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.language import standard
from triton.runtime import interpreter

from . import poison
from .errors import NotFaithful

Arrays = list[np.ndarray]
ARGUMENT_EXTREMES = {
    standard._argmin_combine_tie_break_left: (np.min, np.argmin),
    standard._argmin_combine_tie_break_fast: (np.min, np.argmin),
    standard._argmax_combine_tie_break_left: (np.max, np.argmax),
    standard._argmax_combine_tie_break_fast: (np.max, np.argmax),
}
DIRECT = {
    standard._sum_combine: np.add,
    standard._elementwise_max: np.fmax,
    standard._elementwise_min: np.fmin,
}


def refuse_bfloat16(inputs: tuple[tl.tensor, ...], operation: str) -> None:
    for tensor in inputs:
        if tensor.dtype == tl.bfloat16 or tensor.dtype.is_fp8():
            raise NotFaithful(
                f"{operation} over {tensor.dtype}: every step would round to {tensor.dtype}; upcast to float32 first"
            )


def _tensor(data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    shape = list(data.shape)
    handle_data = data if shape else data.reshape(1)
    return tl.tensor(interpreter.TensorHandle(handle_data, dtype), tl.block_type(dtype, shape) if shape else dtype)


def _call(combine: Callable, left: Arrays, right: Arrays, dtypes: list[tl.dtype]) -> Arrays:
    """combine(*left, *right) on blocks, as arrays in the blocks' own types."""
    operands = [_tensor(data, dtype) for data, dtype in zip(left + right, dtypes * 2, strict=True)]
    result = combine(*operands)
    result = list(result) if isinstance(result, tuple) else [result]
    shape = left[0].shape
    arrays = []
    for value, dtype in zip(result, dtypes, strict=True):
        value = interpreter.interpreter_semantic.to_tensor(value)
        arrays.append(np.broadcast_to(value.handle.data.astype(interpreter._get_np_dtype(dtype), copy=False), shape))
    return arrays


class PairwiseReduce(interpreter.ReduceOps):
    def apply_impl(self, inputs: tuple[tl.tensor, ...]) -> tuple[tl.tensor, ...]:
        refuse_bfloat16(inputs, "reduction")
        arrays, dtypes = [tensor.handle.data for tensor in inputs], [tensor.dtype for tensor in inputs]
        axis, rank = self.axis, arrays[0].ndim
        if axis is None:
            arrays, axis = [data.reshape(-1) for data in arrays], 0
        axis %= arrays[0].ndim
        if self.combine_fn in ARGUMENT_EXTREMES:
            value, index = (function(arrays[0], axis=axis) for function in ARGUMENT_EXTREMES[self.combine_fn])
            picked = np.take_along_axis(arrays[1], np.expand_dims(index, axis), axis).squeeze(axis)
            results = [np.asarray(value), picked]
        elif self.combine_fn in DIRECT:
            results = [self._direct(arrays[0], axis, dtypes[0])]
        else:
            results = self._general(arrays, axis, dtypes)
        if self.keep_dims:
            new_axes = tuple(range(rank)) if self.axis is None else (axis,)
            results = [np.expand_dims(data, new_axes) for data in results]
        return tuple(_tensor(data, dtype) for data, dtype in zip(results, dtypes, strict=True))

    def _direct(self, data: np.ndarray, axis: int, dtype: tl.dtype) -> np.ndarray:
        operation = DIRECT[self.combine_fn]
        poisoned = np.zeros((), dtype=bool)
        launch = interpreter.interpreter_builder.launch
        if operation is not np.add and launch is not None and launch.poison_exists:
            poisoned = np.asarray(poison.find(data, dtype).any(axis=axis))  # fmax and fmin would drop the NaN
        data = np.moveaxis(data, axis, 0)
        while data.shape[0] > 1:
            data = operation(data[0::2], data[1::2])
        result = data[0]
        return poison.fill(result, dtype, poisoned) if poisoned.any() else result

    def _general(self, arrays: Arrays, axis: int, dtypes: list[tl.dtype]) -> Arrays:
        arrays = [np.moveaxis(data, axis, 0) for data in arrays]
        while arrays[0].shape[0] > 1:
            arrays = _call(self.combine_fn, [a[0::2] for a in arrays], [a[1::2] for a in arrays], dtypes)
        return [data[0] for data in arrays]


class DoublingScan(interpreter.ScanOps):
    """Sums and products run in order, any other function by doubling: step k combines 2**k neighbours."""

    def apply_impl(self, inputs: tuple[tl.tensor, ...]) -> tuple[tl.tensor, ...]:
        refuse_bfloat16(inputs, "scan")
        dtypes = [tensor.dtype for tensor in inputs]
        arrays = [np.moveaxis(tensor.handle.data, self.axis, 0) for tensor in inputs]
        if self.reverse:
            arrays = [data[::-1] for data in arrays]
        if self.combine_fn == standard._sum_combine:
            results = [np.cumsum(arrays[0], axis=0, dtype=arrays[0].dtype)]
        elif self.combine_fn == standard._prod_combine:
            results = [np.cumprod(arrays[0], axis=0, dtype=arrays[0].dtype)]
        else:
            results = self._general(arrays, dtypes)
        if self.reverse:
            results = [data[::-1] for data in results]
        results = [np.moveaxis(data, 0, self.axis) for data in results]
        return tuple(_tensor(data, dtype) for data, dtype in zip(results, dtypes, strict=True))

    def _general(self, arrays: Arrays, dtypes: list[tl.dtype]) -> Arrays:
        length, distance = arrays[0].shape[0], 1
        while distance < length:
            earlier = [np.roll(data, distance, axis=0) for data in arrays]
            combined = _call(self.combine_fn, earlier, arrays, dtypes)
            has_earlier = (np.arange(length) >= distance).reshape(-1, *[1] * (arrays[0].ndim - 1))
            arrays = [np.where(has_earlier, new, old) for new, old in zip(combined, arrays, strict=True)]
            distance *= 2
        return arrays
