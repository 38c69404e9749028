"""The products of whole sequences and levels, by the library's matrix multiplication."""

from __future__ import annotations

import torch


def compute_dtype(like: torch.Tensor) -> torch.dtype:
    """What sums are formed in: float64 for float64, otherwise float32."""
    return torch.promote_types(like.dtype, torch.float32)


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """a @ b summed in the compute dtype, whatever autocast would make of it; in `dtype`, by default their own."""
    dtype = a.dtype if dtype is None else dtype
    with torch.autocast(a.device.type, enabled=False):
        if a.device.type == "cpu":
            return _interpreted(a, b, dtype)
        if a.element_size() > 2 or torch.version.hip is not None:
            return torch.mm(a, b).to(dtype)
        return torch.mm(a, b, out_dtype=torch.float32).to(dtype)


def _interpreted(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Beside the interpreter: summed so widely that the bits follow neither an alignment nor the number of rows."""
    import numpy as np  # the interpreter needs it, a GPU does not

    if a.dtype is not torch.float64:
        return torch.mm(a.double(), b.double()).to(dtype)
    return torch.from_numpy(np.matmul(*(t.numpy().astype(np.longdouble) for t in (a, b))).astype(np.float64))
