"""Layouts that break kernels which assume more than they check, and guards around operands."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def layouts(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor): the same values in different strides, storage offsets and alignments."""
    yield "contiguous", x.contiguous()
    flat = x.new_zeros(x.numel() + 3)
    flat[1 : 1 + x.numel()] = x.reshape(-1)
    yield "offset by one element", flat[1 : 1 + x.numel()].view(x.shape)
    if x.dim() == 0:
        return
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    yield "every second element", wide[..., ::2]
    order = tuple(range(x.dim() - 1, -1, -1))
    yield "reversed dims", x.permute(order).contiguous().permute(order)
    taller = x.new_full((x.shape[0] + 2, *x.shape[1:]), float("nan"))
    taller[1:-1] = x
    yield "slice of a batch", taller[1:-1]
    wider = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
    wider[..., 1:-2] = x
    yield "slice of rows", wider[..., 1:-2]
    if x.dim() == 4:
        yield "channels last", x.contiguous(memory_format=torch.channels_last)


def constant(shape, value: float, dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose elements all share one memory location (what the backward of sum() hands down)."""
    return torch.full((), value, dtype=dtype).expand(tuple(shape))


class Canary:
    """Holds a tensor inside a larger storage full of NaN, and tells whether anything around it was written."""

    GUARD = 64

    def __init__(self, x: torch.Tensor):
        guard = self.GUARD + 1  # odd, so that the data is misaligned too
        self.storage = torch.full((x.numel() + 2 * guard,), float("nan"), dtype=x.dtype, device=x.device)
        self.tensor = self.storage[guard : guard + x.numel()].view(x.shape)
        self.tensor.copy_(x)
        self.before = self._bits().clone()

    def _bits(self) -> torch.Tensor:
        return self.storage.view(torch.uint8)

    def assert_untouched(self, what: str = "") -> None:
        assert torch.equal(self._bits(), self.before), f"{what}: an input or the memory around it was written"
