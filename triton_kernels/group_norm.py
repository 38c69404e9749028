"""group_norm in Triton: y = act((x - mean) * rstd * weight + bias). See csrc/include/group_norm.h.

Where a group fits a program's registers, a program owns a few groups: one read, one write, forward and backward.
Otherwise a program owns a tile of channels and pixels and leaves sums per channel and split of its pixels, a program
per group adds those, and a third kernel works elementwise. Everything is added in an order that only the shape of a
sample decides. group_norm_kernels.py has those kernels, group_norm_statistics.py the arithmetic on statistics.
"""

from __future__ import annotations

import dataclasses
import functools
import struct

import torch
import triton
import triton.language as tl
from torch._prims_common import suggest_memory_format

from .group_norm_kernels import (
    apply_kernel,
    gradient_kernel,
    gradient_sums_kernel,
    groups_bwd_kernel,
    groups_fwd_kernel,
    moments_kernel,
)
from .group_norm_statistics import add_samples_kernel, combine_gradient_kernel, combine_kernel

_MANY_PROGRAMS = 132 * 16  # a sample cut into so many tiles keeps a large GPU busy
_MOST_STEPS = 16  # tiles of a program


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Elements: of a tile of small groups, of the largest group kept in registers, and of a tile of a large one."""

    several: int
    largest: int
    tile: int


def _sizes(itemsize: int, backward: bool) -> _Sizes:
    if triton.knobs.runtime.interpret:  # pays per program, not per element
        return _Sizes(8192, 16384, 16384)
    if itemsize == 8:
        return _Sizes(512, 2048, 1024) if backward else _Sizes(1024, 8192, 2048)
    return _Sizes(1024, 8192, 2048) if backward else _Sizes(2048, 16384, 4096)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A group norm of x, (batch, channels, ...) and dense in its layout."""

    x: torch.Tensor
    groups: int
    silu: bool
    last: bool

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def width(self) -> int:
        return self.channels // self.groups

    @functools.cached_property
    def pixels(self) -> int:
        return self.x[0, 0].numel()

    @property
    def items(self) -> int:
        return self.batch * self.groups

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.x.dtype is torch.float64 else torch.float32

    def pack(self, size: int) -> int:
        """Elements of a 16-byte pack where `size` is made of them, otherwise 1."""
        pack = 16 // self.x.element_size()
        return pack if size % pack == 0 else 1

    def _launch(self, kernel, programs: int, tile: int, *args, **constants) -> None:
        per_warp = 256 if self.x.element_size() == 8 else 512  # elements: more would not fit the registers
        warps = 1 if triton.knobs.runtime.interpret else min(max(tile // per_warp, 4), 16)
        compute = tl.float64 if self.compute is torch.float64 else tl.float32
        with torch.cuda.device_of(self.x):
            kernel[(programs,)](*args, **constants, COMPUTE=compute, num_warps=warps, enable_fp_fusion=False)

    def _group_shape(self) -> tuple[int, int]:
        return triton.next_power_of_2(self.width), triton.next_power_of_2(self.pixels)

    def fits(self, *, backward: bool) -> bool:
        channels, pixels = self._group_shape()
        return channels * pixels <= _sizes(self.x.element_size(), backward).largest

    def launch_groups(self, kernel, *args, backward: bool) -> None:
        """Runs kernel(*args, items, ...) on tiles of whole groups."""
        channels, pixels = self._group_shape()
        several = _sizes(self.x.element_size(), backward).several
        groups = max(several // (channels * pixels), 1)  # not fewer for a small batch: that would change the bits
        inner, others = (self.width, self.pixels) if self.last else (self.pixels, self.width)
        pack = self.pack(inner)
        self._launch(
            kernel, triton.cdiv(self.items, groups), groups * channels * pixels,
            *args, self.items, self.groups, inner // pack, others,
            SILU=self.silu, PACK=pack, LAST=self.last, GROUPS=groups, CHANNELS=channels, PIXELS=pixels,
        )  # fmt: skip

    @functools.cached_property
    def _tile(self) -> tuple[int, int, int]:
        """Channels and pixels of a tile, and tiles of a program; decided by the shape of one sample."""
        tile = _sizes(self.x.element_size(), True).tile
        pack = 16 // self.x.element_size()
        if self.last:
            channels = min(triton.next_power_of_2(self.channels), 8 * pack)
            pixels = min(triton.next_power_of_2(self.pixels), tile // channels)
        else:
            pixels = min(triton.next_power_of_2(self.pixels), tile)
            channels = tile // pixels
        steps = self.channels * self.pixels // (tile * _MANY_PROGRAMS)
        most = triton.cdiv(self.pixels, pixels)
        return channels, pixels, max(1, min(triton.next_power_of_2(max(steps, 1)), most, _MOST_STEPS))

    @property
    def span(self) -> int:
        """Pixels of a split."""
        return self._tile[1] * self._tile[2]

    @property
    def splits(self) -> int:
        return triton.cdiv(self.pixels, self.span)

    def launch_tiles(self, kernel, *args, **constants) -> None:
        """Runs kernel(*args, rows, ...) on tiles of channels and pixels."""
        channels, pixels, steps = self._tile
        samples, rows = (self.batch, self.channels) if self.last else (1, self.batch * self.channels)
        inner, others = (self.channels, self.pixels) if self.last else (self.pixels, 1)
        pack, blocks = self.pack(inner), triton.cdiv(rows, channels)
        self._launch(
            kernel, samples * self.splits * blocks, channels * pixels,
            *args, rows, inner // pack, others, self.splits, blocks,
            **constants, PACK=pack, LAST=self.last, CHANNELS=channels, PIXELS=pixels, STEPS=steps,
        )  # fmt: skip

    def doubles(self, *shape: int) -> torch.Tensor:
        return self.x.new_empty(shape, dtype=torch.float64)

    def combine(self, partials, weight, bias, eps, *, mean_out=None, rstd_out=None, mean=None, rstd=None):
        """Channel coefficients (3, batch * channels) and, in the backward, statistics (3, batch * groups)."""
        coefficients = self.x.new_empty((3, self.batch * self.channels), dtype=self.compute)
        stats = None if mean is None else self.doubles(3, self.items)
        self._launch(
            combine_kernel, self.items, 1024,
            coefficients, stats, mean_out, rstd_out, mean, rstd, partials, weight, bias, _bits(eps),
            self.groups, self.width, self.pixels, self.splits, self.span, BLOCK=1024,
        )  # fmt: skip
        return coefficients, stats

    def moments(self, mean=None, rstd=None) -> torch.Tensor:
        partials = self.doubles(3, self.batch * self.channels, self.splits)
        self.launch_tiles(moments_kernel, partials, self.x, mean, rstd, self.batch * self.channels, self.width)
        return partials

    def input_gradient(self, dx, sums, dy, weight, bias, mean, rstd) -> None:
        """Writes dx and sums (batch, 2 * channels) of large groups."""
        channels = self.batch * self.channels
        coefficients, stats = self.combine(self.moments(mean, rstd), weight, bias, 0.0, mean=mean, rstd=rstd)
        partials = self.doubles(2, channels, self.splits)
        self.launch_tiles(gradient_sums_kernel, partials, dy, self.x, coefficients, channels, SILU=self.silu)
        gradients = self.x.new_empty((2, self.items), dtype=self.compute)
        splits = min(triton.next_power_of_2(self.splits), 256)
        block = min(triton.next_power_of_2(self.width), 1024 // splits)
        self._launch(
            combine_gradient_kernel, self.items, block * splits,
            gradients, sums, partials, stats, weight, self.groups, self.width, self.pixels, self.splits,
            CHANNELS=block, SPLITS=splits,
        )  # fmt: skip
        self.launch_tiles(
            gradient_kernel, dx, dy, self.x, coefficients, gradients, channels, self.width, SILU=self.silu
        )

    def add_samples(self, sums) -> tuple[torch.Tensor, torch.Tensor]:
        """dweight and dbias from sums (batch, 2 * channels)."""
        dweight, dbias = (self.x.new_empty(self.channels, dtype=self.compute) for _ in range(2))
        rows, steps, cols = 32, 8, 32
        while sums is not None:
            blocks = triton.cdiv(sums.shape[0], rows * steps)
            out = None if blocks == 1 else self.doubles(blocks, 2 * self.channels)
            with torch.cuda.device_of(self.x):
                add_samples_kernel[(triton.cdiv(2 * self.channels, cols) * blocks,)](
                    out, dbias, dweight, sums, sums.shape[0], self.channels, blocks,
                    ROWS=rows, STEPS=steps, COLS=cols, num_warps=4, enable_fp_fusion=False,
                )  # fmt: skip
            sums = out
        return dweight, dbias


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _problem(input, num_groups, silu, *others):
    """The problem and the other tensors, all in the layout of input."""
    layout = suggest_memory_format(input)
    x, *others = (tensor.contiguous(memory_format=layout) for tensor in (input, *others))
    last = layout is not torch.contiguous_format or input[0:1, 0:1].numel() == 1
    return _Problem(x, num_groups, silu, last), *others


def _parameters(input, weight, bias):
    """Contiguous, in the type of the arithmetic."""
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    return (None if p is None else p.to(dtype).contiguous() for p in (weight, bias))


def group_norm_fwd(input, weight, bias, num_groups, eps, silu):
    """group_norm_fwd(Tensor input, Tensor? weight, Tensor? bias, SymInt num_groups, float eps, bool silu)
    -> (Tensor output, Tensor mean, Tensor rstd)"""
    (p,) = _problem(input, num_groups, silu)
    weight, bias = _parameters(input, weight, bias)
    y = torch.empty_like(p.x)
    mean, rstd = (p.x.new_empty((input.shape[0], num_groups), dtype=p.compute) for _ in range(2))
    if y.numel() == 0:
        return y, mean.zero_(), rstd.fill_(float("nan"))
    if p.fits(backward=False):
        p.launch_groups(groups_fwd_kernel, y, mean, rstd, p.x, weight, bias, _bits(eps), backward=False)
        return y, mean, rstd
    coefficients, _ = p.combine(p.moments(), weight, bias, eps, mean_out=mean, rstd_out=rstd)
    p.launch_tiles(apply_kernel, y, p.x, coefficients, p.batch * p.channels, SILU=silu)
    return y, mean, rstd


def group_norm_statistics(input, num_groups, eps):
    """group_norm_statistics(Tensor input, SymInt num_groups, float eps) -> (Tensor mean, Tensor rstd)"""
    (p,) = _problem(input, num_groups, False)
    mean, rstd = (p.x.new_empty((input.shape[0], num_groups), dtype=p.compute) for _ in range(2))
    if p.x.numel() == 0:
        return mean.zero_(), rstd.fill_(float("nan"))
    p.combine(p.moments(), None, None, eps, mean_out=mean, rstd_out=rstd)
    return mean, rstd


def group_norm_bwd(grad_output, input, weight, bias, mean, rstd, num_groups, silu):
    """group_norm_bwd(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,
    SymInt num_groups, bool silu) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"""
    p, dy = _problem(input, num_groups, silu, grad_output)
    w, b = _parameters(input, weight, bias)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    dx = torch.empty_like(p.x)
    if dx.numel() == 0:
        dweight, dbias = (p.x.new_zeros(p.channels, dtype=p.compute) for _ in range(2))
    else:
        sums = p.doubles(p.batch, 2 * p.channels)
        if p.fits(backward=True):
            p.launch_groups(groups_bwd_kernel, dx, sums, dy, p.x, w, b, mean, rstd, backward=True)
        else:
            p.input_gradient(dx, sums, dy, w, b, mean, rstd)
        dweight, dbias = p.add_samples(sums)
    grads = (
        grad if parameter is None else grad.to(parameter.dtype)
        for grad, parameter in ((dweight, weight), (dbias, bias))
    )
    return dx, *grads
