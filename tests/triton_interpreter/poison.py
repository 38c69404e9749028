"""Poison: the value of a lane that tl.load masked off without `other`.

A GPU leaves such a lane undefined; the plain interpreter gives 0, which hides the mistake. Here it is a NaN with a mark
in its payload. The mark sits in the top mantissa bits, so it survives conversion between the float formats, and the
processor's arithmetic carries a NaN operand's payload into the result. Integers get a large odd-looking value instead:
as an offset it leaves every tensor, and an unchanged copy is recognised when it is stored.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl

FLOAT_PATTERNS = {tl.float64: 0x7FFDA000_00000000, tl.float32: 0x7FED0000, tl.bfloat16: 0x7FED, tl.float16: 0x7F68}
INTEGER_PATTERNS = {64: 0x7FED5A5B_7FED5A5B, 32: 0x7FED5A5B, 16: 0x7FED, 8: 0x7F}


def pattern(dtype: tl.dtype) -> int:
    """The poison of a scalar type or pointer type, as the bits of an unsigned integer of its size."""
    if dtype in FLOAT_PATTERNS:
        return FLOAT_PATTERNS[dtype]
    return INTEGER_PATTERNS[max(8, dtype.primitive_bitwidth)]


def fill(data: np.ndarray, dtype: tl.dtype, masked_off: np.ndarray) -> np.ndarray:
    """A copy of `data` (any shape, interpreter representation of `dtype`) with poison where `masked_off`."""
    unsigned = np.dtype(f"u{data.itemsize}")
    bits = np.asarray(data, order="C").view(unsigned)
    return np.where(masked_off, unsigned.type(pattern(dtype)), bits).astype(unsigned).view(data.dtype)


def find(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Which elements are poison. Never for 8- and 16-bit integers and fp8, where any pattern may be real data."""
    is_float = dtype in FLOAT_PATTERNS
    if not is_float and (dtype.is_floating() or dtype.primitive_bitwidth < 32):
        return np.zeros(data.shape, dtype=bool)
    unsigned = np.dtype(f"u{data.itemsize}")
    bits = np.asarray(data, order="C").view(unsigned)
    if is_float:  # either sign
        bits = bits & unsigned.type((1 << (data.itemsize * 8 - 1)) - 1)
    return bits == unsigned.type(pattern(dtype))
