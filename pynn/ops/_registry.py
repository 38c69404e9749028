"""Dispatcher ops: one schema and one shape rule per op, in a namespace per family of kernels.

    pynn          C++ on CPU tensors, CUDA C++ on CUDA tensors: csrc/ops/<op>.cpp
    pynn_sim      the CUDA C++ sources compiled for the CPU, a test tool: the same csrc/ops/<op>.cpp
    pynn_library  PyTorch's own kernels, on CPU and CUDA tensors
    pynn_auto     chooses one of the others when it runs: what a traced graph holds, for ops with a choice to make
    pynn_triton   Triton kernels on GPU tensors, and through Triton's interpreter on CPU tensors: triton_kernels/<op>.py

`pynn.backends.op` chooses the namespace of a call. Every implementation validates its operands first: the C++ ones in
csrc/ops, the others by calling the op `pynn::<name>_check`, which is that same validation alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from .. import backends

# The objects keep the registrations alive.
_libraries = {namespace: torch.library.Library(namespace, "FRAGMENT") for namespace in backends.NAMESPACES}


def define(
    schema: str,
    *,
    triton: str | None = None,
    library: Callable | None = None,
    case: Callable | None = None,
    measured_as: str | None = None,
) -> Callable[[Callable], Callable]:
    """Registers an op in every namespace; decorates its shape rule.

    The shape rule takes the op's arguments and returns empty tensors like the results.

    Args:
        schema: "name(Tensor x, ...) -> Tensor", without aliases and default values.
        triton: name of the module of triton_kernels that has a function `name` with the same arguments; operands
            come to it validated but not made contiguous. None when there is no Triton kernel.
        library: the op made of torch's ops, or None. case: what the choice depends on, see `backends.add_op`.
        measured_as: the op whose measurements decide the choice; None for this one.
    """
    name, _, rest = schema.partition("(")
    if triton is not None or library is not None:
        arguments = rest.rpartition(" -> ")[0]
        _libraries["pynn"].define(f"{name}_check({arguments} -> ()")

    def register(fake: Callable) -> Callable:
        wanted = {"pynn_triton": triton, "pynn_library": library, "pynn_auto": case}
        for namespace, registrations in _libraries.items():
            if wanted.get(namespace, True) is not None:
                registrations.define(schema)
                torch.library.register_fake(f"{namespace}::{name}", fake, lib=registrations)
        if triton is not None and "pynn_triton" in _libraries:
            for key in ("CPU", "CUDA"):
                _libraries["pynn_triton"].impl(name, _triton_kernel(triton, name, key), key)
        for key in ("CPU", "CUDA"):
            if library is not None:
                _libraries["pynn_library"].impl(name, _library_kernel(name, library), key)
            if case is not None:
                _libraries["pynn_auto"].impl(name, lambda *operands: backends.call(name, *operands), key)
        backends.add_op(name, case, library, measured_as)
        return fake

    return register


def _library_kernel(name: str, library: Callable) -> Callable:
    def run(*arguments):
        getattr(torch.ops.pynn, f"{name}_check").default(*arguments)
        return library(*arguments)

    return run


def _triton_kernel(module: str, name: str, key: str) -> Callable:
    backend = "triton" if key == "CUDA" else "interpret"

    def run(*arguments):
        backends.require(name, backend)
        getattr(torch.ops.pynn, f"{name}_check").default(*arguments)
        return getattr(importlib.import_module(f"pynn.triton_kernels.{module}"), name)(*arguments)  # imports triton

    return run
