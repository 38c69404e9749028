"""The targets of Triton, and a stand-in for the driver that compiles for one of them and launches nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class CompileOnlyDriver:
    """What triton.runtime asks of a driver before a launch."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        def benchmark(run, quantiles=None):
            run()  # compiles this config; no time is taken
            return [1.0, 1.0, 1.0]

        return benchmark


@contextlib.contextmanager
def compiling(name: str) -> Iterator[list]:
    """Inside the block a launch compiles its kernel for this target instead.

    Yields:
        The list of (kernel name, triton.compiler.CompiledKernel), filled as kernels are launched: with an autotuner
        one for each config.
    """
    compiled: list = []
    run, launcher = JITFunction.run, CompiledKernel.__getitem__
    active = triton.runtime.driver._active  # the default driver would be created, and there is none

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(kernel is not before for _, before in compiled):  # an autotuner launches its choice once more
            compiled.append((self.__name__, kernel))
        return kernel

    triton.runtime.driver.set_active(CompileOnlyDriver(TARGETS[name]))
    JITFunction.run = compile_only
    CompiledKernel.__getitem__ = lambda self, grid: lambda *args: None  # a kernel that is launched once more
    try:
        yield compiled
    finally:
        JITFunction.run, CompiledKernel.__getitem__ = run, launcher
        triton.runtime.driver._active = active
