"""triton.language.extra.libdevice on the CPU: float64 mathematics rounded once; what is not listed is refused by name.

A GPU's libdevice is correct to 1-4 units in the last place, so results agree to that, not bit for bit. As on a GPU,
arguments must be float32 or float64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from .errors import NotFaithful
from .floats import _torch_double, erf, fused_multiply_add

UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **{name: getattr(np, name) for name in ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "cbrt")},
    **{name: getattr(np, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    **{name: getattr(np, name) for name in ("floor", "ceil", "trunc", "rint", "abs")},
    **{f"a{name}": getattr(np, f"arc{name}") for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    "erf": erf,
    "erfc": _torch_double(torch.special.erfc),
    "erfinv": _torch_double(torch.special.erfinv),
    "normcdf": _torch_double(torch.special.ndtr),
    "lgamma": _torch_double(torch.lgamma),
    "exp10": lambda values: np.power(10.0, values),
    "nearbyint": np.rint,
    "rsqrt": lambda values: 1 / np.sqrt(values),
    "sqrt_rn": np.sqrt,
    "rcp_rn": lambda values: 1 / values,
}
BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "pow": np.power,
    "fmod": np.fmod,
    "atan2": np.arctan2,
    "hypot": np.hypot,
    "copysign": np.copysign,
    "nextafter": np.nextafter,
    "add_rn": np.add,
    "sub_rn": np.subtract,
    "mul_rn": np.multiply,
    "div_rn": np.divide,
}
PREDICATES: dict[str, Callable] = {"isnan": np.isnan, "isinf": np.isinf, "signbit": np.signbit}
IN_OWN_TYPE = {"add_rn", "sub_rn", "mul_rn", "div_rn", "sqrt_rn", "rcp_rn", "fmod", "nextafter"}


def _operands(name: str, args: tuple[object, ...]) -> list[tl.tensor]:
    """Arguments as tensors of one shape and one type, float32 or float64."""
    semantic = interpreter.interpreter_semantic
    tensors = [semantic.to_tensor(arg) for arg in args]
    for tensor in tensors:
        if tensor.dtype not in (tl.float32, tl.float64) or tensor.dtype != tensors[0].dtype:
            given = ", ".join(str(tensor.dtype) for tensor in tensors)
            raise TypeError(f"libdevice.{name} takes float32 or float64 arguments of one type, got {given}")
    for _ in tensors[1:]:  # one pass per pair brings all of them to one shape
        for i in range(len(tensors) - 1):
            tensors[i], tensors[i + 1] = semantic.broadcast_impl_value(tensors[i], tensors[i + 1])
    return tensors


def _function(name: str, arity: int, operation: Callable[..., np.ndarray], result: tl.dtype | None = None) -> Callable:
    def function(*args: object, _semantic: object = None) -> tl.tensor:
        if len(args) != arity:
            raise TypeError(f"libdevice.{name} takes {arity} arguments, got {len(args)}")
        tensors = _operands(name, args)
        data = [tensor.handle.data for tensor in tensors]
        numpy_dtype = data[0].dtype
        if name not in IN_OWN_TYPE:
            data = [values.astype(np.float64) for values in data]
        values = operation(*data)
        dtype = result or tensors[0].dtype
        handle = TensorHandle(values.astype(bool if result else numpy_dtype), dtype)
        shape = tensors[0].type
        return tl.tensor(handle, tl.block_type(dtype, list(shape.shape)) if shape.is_block() else dtype)

    function.__name__ = name
    return function


def _fma(x: object, y: object, z: object, _semantic: object = None) -> tl.tensor:
    tensors = _operands("fma", (x, y, z))
    first, second, third = (tensor.handle.data for tensor in tensors)
    handle = fused_multiply_add(first, second, third, tensors[0].dtype)
    return tl.tensor(handle, tensors[0].type)


def _refusal(name: str) -> Callable:
    def function(*args: object, **kwargs: object) -> NoReturn:
        raise NotFaithful(f"libdevice.{name} is not available in the interpreter; available are {sorted(FUNCTIONS)}")

    return function


FUNCTIONS: dict[str, Callable] = {
    **{name: _function(name, 1, operation) for name, operation in UNARY.items()},
    **{name: _function(name, 2, operation) for name, operation in BINARY.items()},
    **{name: _function(name, 1, operation, tl.int1) for name, operation in PREDICATES.items()},
    "fma": _fma,
    "fma_rn": _fma,
}


def install() -> None:
    """Replaces every function of both libdevice modules. Call before a kernel module imports names from them."""
    for module in (libdevice, cuda_libdevice):
        for name, member in list(vars(module).items()):
            if callable(member) and not name.startswith("_") and not inspect.isclass(member):
                setattr(module, name, FUNCTIONS.get(name) or _refusal(name))
