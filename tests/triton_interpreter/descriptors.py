"""Block pointers and tensor descriptors: their pointers keep their origin; the hardware's 16-byte rules are checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter

from .errors import Misaligned

ALIGNMENT = 16  # bytes: base, all strides but the last, and the innermost offset of every block


def _argument(descriptor: interpreter.TensorDescHandle) -> str:
    regions = descriptor.base.attr.get("regions", ())
    return f"tensor descriptor of argument {', '.join(repr(region.name) for region in regions) or '(unknown)'}"


def _itemsize(descriptor: interpreter.TensorDescHandle) -> int:
    return descriptor.base.dtype.element_ty.primitive_bitwidth // 8


def validate(descriptor: interpreter.TensorDescHandle) -> None:
    """Replaces TensorDescHandle.validate. Raises Misaligned with the argument, the value and the rule."""
    base = descriptor.base.data.item()
    if base % ALIGNMENT:
        raise Misaligned(f"{_argument(descriptor)}: base is {base % ALIGNMENT} bytes past a {ALIGNMENT}-byte boundary")
    for dim, stride in enumerate(descriptor.strides[:-1]):
        in_bytes = stride.data.item() * _itemsize(descriptor)
        if in_bytes % ALIGNMENT:
            raise Misaligned(
                f"{_argument(descriptor)}: stride {dim} is {in_bytes} bytes, expected a multiple of {ALIGNMENT}"
            )
    if descriptor.strides[-1].data.item() != 1:
        last = descriptor.strides[-1].data.item()
        raise Misaligned(f"{_argument(descriptor)}: the last stride is {last}, expected 1")


def _with_origin(handle_type: Any) -> None:
    original = handle_type.materialize_pointers

    def materialize_pointers(self, argument):
        if isinstance(self, interpreter.TensorDescHandle):
            in_bytes = int(np.asarray(argument[-1].data).item()) * _itemsize(self)
            if in_bytes % ALIGNMENT:
                raise Misaligned(
                    f"{_argument(self)}: the block starts {in_bytes} bytes into the last dimension, "
                    f"expected a multiple of {ALIGNMENT}"
                )
        pointers, masks = original(self, argument)
        if "regions" in self.base.attr:
            pointers.attr["regions"] = self.base.attr["regions"]
        return pointers, masks

    handle_type.materialize_pointers = materialize_pointers


def install() -> None:
    interpreter.TensorDescHandle.validate = validate
    _with_origin(interpreter.TensorDescHandle)
    if hasattr(interpreter, "BlockPointerHandle"):  # until Triton 3.7
        _with_origin(interpreter.BlockPointerHandle)
