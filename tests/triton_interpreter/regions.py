"""What memory a kernel may touch: one region per tensor argument, exact for strided views."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from .settings import settings
from .shadow import Shadow


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether every byte between the first and the last element belongs to exactly one element."""
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(by_stride).is_contiguous()


@dataclasses.dataclass(eq=False)
class Region:
    """The bytes [start, end) behind one tensor argument; `reachable` marks which of them a view can index (None: all).

    `start` and `end` are the view's, or with settings.extent == "storage" the storage's. Offsets in messages count from
    `origin`, the address the kernel received.
    """

    name: str
    origin: int
    start: int
    end: int
    reachable: np.ndarray | None
    shadow: Shadow
    description: str

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, shadow: Shadow) -> Region:
        origin, itemsize = tensor.data_ptr(), tensor.element_size()
        description = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        if settings.extent == "storage":
            storage = tensor.untyped_storage()
            end = storage.data_ptr() + storage.nbytes()
            return cls(name, origin, storage.data_ptr(), end, None, shadow, f"the storage behind {description}")
        if tensor.numel() == 0:
            return cls(name, origin, origin, origin, None, shadow, description)
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        reachable = None
        if not _is_dense(tensor):
            elements = np.zeros(span, dtype=bool)
            byte_strides = tensor.stride()  # a bool is one byte
            np.lib.stride_tricks.as_strided(elements, tuple(tensor.shape), byte_strides)[...] = True
            reachable = None if elements.all() else np.repeat(elements, itemsize)
            description += f", strides {tensor.stride()}"
        return cls(name, origin, origin, origin + span * itemsize, reachable, shadow, description)

    def holds_all(self, low: int, high: int) -> bool:
        """Whether every byte of [low, high) is certainly inside; False means `holds` has to look at each lane."""
        return self.reachable is None and self.start <= low and high <= self.end

    def holds(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """For each address (int64), whether all `size` bytes from it are inside."""
        inside = (addresses >= self.start) & (addresses <= self.end - size)
        if self.reachable is not None:
            first = np.where(inside, addresses - self.start, 0)
            for byte in range(size):
                inside &= self.reachable[np.minimum(first + byte, self.reachable.size - 1)]
        return inside

    def place(self, address: int, size: int) -> str:
        """An address as a reader wants it: argument, offset, extent."""
        offset = address - self.origin
        count, left = divmod(offset, size)
        elements = f"element {count}" if left == 0 else f"byte {offset}, not a whole number of elements"
        extent = f"bytes {self.start - self.origin} to {self.end - self.origin}"
        where = f"argument {self.name!r}, {elements} (byte offset {offset})"
        return f"{where}; the argument spans {extent}: {self.description}"
