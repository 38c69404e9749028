"""One run of a kernel over its grid: its tensor arguments, and the program that is running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, _get_np_dtype
from triton.runtime.jit import TensorWrapper, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from .cooperative import Alone, Team
from .regions import Region
from .settings import settings
from .shadow import Clock, Shadow


class Launch:
    """Regions, shadows and clocks of one launch.

    Args:
        kernel: its name, for messages.
        grid: (x, y, z) sizes.
    """

    def __init__(self, kernel: str, grid: tuple[int, int, int]):
        self.kernel, self.grid = kernel, grid
        self.regions: list[Region] = []
        self.poison_exists = False
        self.released: dict[int, np.ndarray] = {}  # address of an atomic -> epochs its releases made visible
        self._shadows: dict[int, Shadow] = {}
        self.index = (0, 0, 0)
        self.clock = Clock(0)
        self.team: Team | Alone = Alone()

    def begin(self, index: tuple[int, int, int]) -> None:
        """The program at `index` starts, having seen nothing of the others."""
        self.index = index
        self.clock = Clock(1 + index[0] + self.grid[0] * (index[1] + self.grid[1] * index[2]))

    def program_index(self, number: int) -> tuple[int, int, int]:
        x_and_y, x_size = (number - 1) % (self.grid[0] * self.grid[1]), self.grid[0]
        return x_and_y % x_size, x_and_y // x_size, (number - 1) // (self.grid[0] * self.grid[1])

    def register(self, name: str, tensor: torch.Tensor) -> Region:
        """Makes the memory of a tensor argument accessible. Raises TypeError for a tensor that is not on the CPU."""
        if tensor.device.type != "cpu":
            raise TypeError(f"argument {name!r} is on {tensor.device}; the interpreter takes CPU tensors")
        storage = tensor.untyped_storage()
        shadow = self._shadows.setdefault(storage.data_ptr(), Shadow(storage.data_ptr(), storage.nbytes()))
        region = Region.of(name, tensor, shadow)
        self.regions.append(region)
        return region

    def races_allowed(self, region: Region) -> bool:
        return region.name in settings.allowed_races.get(self.kernel, ())

    def acquire(self, address: int) -> None:
        """The running program sees whatever was released at this address."""
        released = self.released.get(address)
        if released is not None:
            seen = self.clock.seen
            self.clock.seen = released.copy() if seen is None else np.maximum(seen, released)

    def release(self, address: int) -> None:
        """Everything the running program did or saw until now is visible to who acquires at this address later."""
        programs = self.grid[0] * self.grid[1] * self.grid[2]
        released = self.released.setdefault(address, np.zeros(programs + 1, np.int32))
        if self.clock.seen is not None:
            np.maximum(released, self.clock.seen, out=released)
        released[self.clock.program] = self.clock.epoch
        self.clock.epoch += 1

    def convert(self, name: str, value: Any, make_descriptor: Callable[..., Any]) -> Any:
        """A kernel argument as the kernel sees it: scalars typed as a GPU launch types them, tensors as pointers.

        A Python float becomes a float32 scalar, as at a real launch. (Left as a Python number, it would take the type
        of whatever it meets: more digits next to float64, and bfloat16 arithmetic next to bfloat16.)
        """
        if isinstance(value, (bool, int, float)):
            dtype = tl.str_to_ty(mangle_type(value), None)
            return tl.tensor(TensorHandle(np.array([value], dtype=_get_np_dtype(dtype)), dtype), dtype)
        if hasattr(value, "data_ptr"):
            region = self.register(name, value.base if isinstance(value, TensorWrapper) else value)
            dtype = tl.str_to_ty(mangle_type(value), None)
            handle = TensorHandle(np.array([value.data_ptr()], dtype=np.uint64), dtype)
            handle.attr["regions"] = (region,)
            return tl.tensor(handle, dtype)
        if isinstance(value, TensorDescriptor):
            return make_descriptor(
                base=self.convert(name, value.base, make_descriptor),
                shape=[self.convert(name, size, make_descriptor) for size in value.shape],
                strides=[
                    *(self.convert(name, stride, make_descriptor) for stride in value.strides[:-1]),
                    tl.constexpr(1),
                ],
                block_shape=[tl.constexpr(size) for size in value.block_shape],
                padding_option=value.padding,
            )
        if isinstance(value, tuple):
            parts = [self.convert(f"{name}[{i}]", part, make_descriptor) for i, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value
