"""What the hardened interpreter raises. Every error is a triton InterpreterError."""

from __future__ import annotations

from triton.runtime.errors import InterpreterError


class KernelError(InterpreterError):
    """A kernel did something that is wrong, or undefined, on a GPU. The message names kernel, program and argument."""


class OutOfBounds(KernelError):
    """An active lane lies outside the bytes that the tensor argument can reach."""


class Misaligned(KernelError):
    """An address, or a tensor descriptor's base or stride, breaks an alignment rule of the hardware."""


class DuplicateStore(KernelError):
    """Two lanes of one store write the same bytes: which one wins is undefined."""


class Race(KernelError):
    """Two programs touch the same bytes, at least one writes, and nothing orders them."""


class Deadlock(KernelError):
    """Programs wait for each other, or for one that need not be running."""


class PoisonStored(KernelError):
    """A lane that tl.load masked off without `other` reached memory."""


class NotFaithful(KernelError):
    """The interpreter cannot compute this as a GPU does, so it refuses instead of guessing."""


class Undefined(KernelError):
    """Integer division by zero, a shift by too much, an index outside a gather, ...: a GPU may return anything."""


class ConfigMismatch(KernelError):
    """Two configurations of one autotuned kernel give different results."""


class KernelFailed(KernelError):
    """Any other exception inside a kernel, with the kernel and program that raised it."""
