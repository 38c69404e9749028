"""@triton.autotune as a correctness test: every configuration runs on the same memory, and all must agree."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from .errors import ConfigMismatch, KernelError
from .settings import settings

# Largest difference between two configurations, relative to an element's size plus the tensor's root mean square:
# configurations sum in different orders, and each order rounds differently.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


def _tensors(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (TensorWrapper, TensorDescriptor)):
        yield from _tensors(value.base, name)
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _tensors(part, f"{name}[{i}]")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def difference(reference: torch.Tensor, result: torch.Tensor) -> str | None:
    """What tells two results apart, or None when they agree as far as the settings demand."""
    itemsize_view = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if settings.autotune_compare == "bitwise" or reference.dtype not in TOLERANCES:
        if reference.is_complex() or reference.element_size() not in itemsize_view:
            raise TypeError(f"results of type {reference.dtype} cannot be compared")
        same_bits = itemsize_view[reference.element_size()]
        wrong = reference.contiguous().view(same_bits) != result.contiguous().view(same_bits)
    else:
        left, right = reference.double(), result.double()
        finite = left.isfinite() & right.isfinite()
        scale = left[finite].square().mean().sqrt() if finite.any() else left.new_zeros(())
        allowed = TOLERANCES[reference.dtype] * (left.abs() + scale)
        same = (left == right) | (left.isnan() & right.isnan())
        wrong = ~(same | (finite & ((left - right).abs() <= allowed)))
    if not wrong.any():
        return None
    index = tuple(int(i) for i in wrong.nonzero()[0])
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, "
        f"first at {index}: {reference[index].item()} and {result[index].item()}"
    )


def run_configurations(self: Autotuner, *args, **kwargs) -> object:
    """Replaces Autotuner.run. Leaves the memory as the last configuration wrote it.

    Each configuration starts from the caller's memory, as on a GPU once tuning is over; `reset_to_zero` and
    `restore_value` only matter while tuning, so they play no part here. Pruning functions are honoured.

    Raises:
        ConfigMismatch: two configurations wrote different results.
    """
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    configurations = self.configs if len(self.configs) == 1 else self.prune_configs(kwargs)
    if settings.autotune == "first":
        configurations = configurations[:1]
    arguments = {**self.nargs, **kwargs}
    tensors = [pair for name, value in arguments.items() for pair in _tensors(value, name)]
    storages = {tensor.untyped_storage().data_ptr(): _bytes(tensor) for _, tensor in tensors if tensor.numel()}
    before = {address: data.clone() for address, data in storages.items()}
    reference: list[torch.Tensor] = []
    returned = None
    for number, configuration in enumerate(configurations):
        if conflicts := sorted(kwargs.keys() & configuration.kwargs.keys()):
            raise ValueError(f"{self.base_fn.__name__}: {conflicts} are set by the caller and by the configuration")
        if number:
            for address, data in storages.items():
                data.copy_(before[address])
        if configuration.pre_hook is not None:
            configuration.pre_hook({**arguments, **configuration.all_kwargs()})
        try:
            returned = self.fn.run(*args, **kwargs, **configuration.all_kwargs())
        except KernelError as error:
            error.error_message = f"{error.error_message} [autotune configuration {configuration}]"
            error.args = (error.error_message,)
            raise
        if number == 0:
            reference = [tensor.clone() for _, tensor in tensors]
            continue
        for (name, tensor), expected in zip(tensors, reference, strict=True):
            what = difference(expected, tensor)
            if what is not None:
                raise ConfigMismatch(
                    f"{self.base_fn.__name__}: argument {name!r} depends on the configuration: {what} "
                    f"[{configurations[0]}] and [{configuration}]"
                )
    self.best_config = configurations[0]
    self.nargs = None
    return returned
