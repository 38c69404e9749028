"""Number formats that numpy lacks, as functions on bits: bfloat16 (in uint16), fp8 (in uint8), tf32 (in float32).

All roundings here are single roundings. float64 goes to a narrow format through float32 rounded to odd, which keeps
enough of the lost bits that the second rounding gives what one rounding from float64 would have given.
"""

from __future__ import annotations

import numpy as np
import torch

E4M3_MAX = 448.0
E5M2_MAX = 57344.0


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """Rounds to nearest even, overflow to infinity, subnormals included; NaNs stay NaNs and keep their top bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    kept = bits >> 16
    rounded = kept if toward_zero else (bits + (0x7FFF + (kept & 1))) >> 16
    return np.where(np.isnan(values), kept | 0x40, rounded).astype(np.uint16)


def round_to_odd(values: np.ndarray) -> np.ndarray:
    """float64 to float32, toward zero, with the last bit set wherever anything was lost."""
    nearest = values.astype(np.float32)
    back = nearest.astype(np.float64)
    lost = (back != values) & ~np.isnan(values)
    bits = nearest.view(np.uint32)
    toward_zero = bits - (lost & (np.abs(back) > np.abs(values)))
    return np.where(lost, toward_zero | 1, bits).astype(np.uint32).view(np.float32)


def float32_to_float16_toward_zero(values: np.ndarray) -> np.ndarray:
    nearest = values.astype(np.float16)
    away = np.abs(nearest.astype(np.float32)) > np.abs(values)
    return np.where(away, np.nextafter(nearest, np.float16(0)), nearest).astype(np.float16)


def float32_to_fp8(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """As PTX's cvt.rn.satfinite: infinities and overflow become the largest finite value, NaN becomes 0x7f."""
    largest = E4M3_MAX if dtype == torch.float8_e4m3fn else E5M2_MAX
    clamped = np.clip(np.ascontiguousarray(values, dtype=np.float32), -largest, largest)
    bits = torch.from_numpy(clamped).to(dtype).view(torch.uint8).numpy()
    return np.where(np.isnan(values), np.uint8(0x7F), bits).astype(np.uint8)


def fp8_to_float32(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(bits)).view(dtype).to(torch.float32).numpy()


def truncate_to_tf32(values: np.ndarray) -> np.ndarray:
    """Drops the 13 low mantissa bits: a tensor core that is handed plain float32 registers does not read them."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """PTX's cvt.rna.tf32: to nearest, ties away from zero."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values).astype(np.float32)
