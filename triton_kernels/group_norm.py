"""group_norm in Triton: y = act((x - mean) * rstd * weight + bias). See csrc/include/group_norm.h.

Where a group fits a program's registers, a program owns a few groups: one read, one write, forward and backward.
Otherwise a program owns a tile of channels and pixels and leaves sums per channel and split of its pixels, a program
per group adds those, and a third kernel works elementwise. Everything is added in an order that only the shape of a
sample decides. group_norm_statistics.py has the arithmetic on statistics.

LAST: memory is (batch, pixels, channels), otherwise (batch, channels, pixels).
"""

from __future__ import annotations

import dataclasses
import functools
import struct

import torch
import triton
import triton.language as tl
from torch._prims_common import suggest_memory_format

from .group_norm_statistics import (
    activate,
    activate_grad,
    add_samples_kernel,
    backward_affine,
    channel_affine,
    channel_sums,
    combine_gradient_kernel,
    combine_kernel,
    finish,
    is_far,
    recenter,
)

_kernel = triton.jit(
    do_not_specialize=["eps", "items", "groups", "units", "others", "channels", "width", "rows", "splits", "blocks"]
)


# ---------------------------------------------------------------- groups in registers


@triton.jit
def _groups_tile(
    items, groups, units, others,
    PACK: tl.constexpr, LAST: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Of whole groups: item (GROUPS, 1, 1), channel in the sample and its mask (GROUPS, CHANNELS, 1), offsets and mask
    of the elements, elements of a group.

    The inner one of a group's width and pixels is units * PACK, so that the compiler sees by what it is divisible; the
    other one is `others`.
    """
    item = (tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS))[:, None, None]
    c = tl.arange(0, CHANNELS)[None, :, None]
    p = tl.arange(0, PIXELS)[None, None, :]
    if LAST:
        width, pixels = units * PACK, others
        base = (item // groups * pixels * groups + item % groups) * width
        inner = p.to(tl.int64) * groups * width + c
    else:
        width, pixels = others, units * PACK
        base = item * width * pixels
        inner = c * pixels + p
    in_group = (item < items) & (c < width)
    return item, item % groups * width + c, in_group, base + inner, in_group & (p < pixels), width * pixels


@triton.jit
def _group_sum(values):
    """Over a group, (GROUPS, 1, 1) float64: over pixels in the type of the values, then over channels."""
    return tl.sum(tl.sum(values, axis=2).to(tl.float64), axis=1)[:, None, None]


@_kernel
def groups_fwd_kernel(
    y, mean_out, rstd_out, x, weight, bias, eps, items, groups, units, others,
    SILU: tl.constexpr, PACK: tl.constexpr, LAST: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    item, channel, in_group, offsets, mask, size = _groups_tile(
        items, groups, units, others, PACK, LAST, GROUPS, CHANNELS, PIXELS
    )
    size = size.to(tl.float64)
    b_x = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE)
    near = (_group_sum(b_x) / size).to(COMPUTE)
    d = tl.where(mask, b_x - near, 0.0)
    mean, rstd = finish(near.to(tl.float64), _group_sum(d), _group_sum(d * d), size, eps)
    tl.store(mean_out + item, mean.to(COMPUTE), mask=item < items)
    tl.store(rstd_out + item, rstd.to(COMPUTE), mask=item < items)
    center, delta = recenter(mean, rstd, COMPUTE)
    scale, shift, _ = channel_affine(weight, bias, channel, in_group, delta, rstd)
    z = tl.fma(b_x - center.to(COMPUTE), scale.to(COMPUTE), shift.to(COMPUTE))
    tl.store(y + offsets, activate(z, SILU, y.dtype.element_ty).to(y.dtype.element_ty), mask=mask)


@_kernel
def groups_bwd_kernel(
    dx, sums, dy, x, weight, bias, mean, rstd, items, groups, units, others,
    SILU: tl.constexpr, PACK: tl.constexpr, LAST: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx, and rows (2 * channels) of sums: of dz and of dz times the normalised value, per channel."""
    item, channel, in_group, offsets, mask, size = _groups_tile(
        items, groups, units, others, PACK, LAST, GROUPS, CHANNELS, PIXELS
    )
    size = size.to(tl.float64)
    b_x = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE)
    b_dy = tl.load(dy + offsets, mask=mask, other=0.0).to(COMPUTE)
    b_mean = tl.load(mean + item, mask=item < items, other=0.0).to(tl.float64)
    b_rstd = tl.load(rstd + item, mask=item < items, other=0.0).to(tl.float64)
    far = is_far(b_mean, b_rstd)
    center = tl.where(far, b_mean, 0.0)
    d = b_x - center.to(COMPUTE)
    delta = tl.where(far, _group_sum(tl.where(mask, d, 0.0)) / size, b_mean)  # what the stored mean has lost
    scale, shift, w = channel_affine(weight, bias, channel, in_group, delta, b_rstd)
    dz = activate_grad(b_dy, tl.fma(d, scale.to(COMPUTE), shift.to(COMPUTE)), SILU, x.dtype.element_ty)
    dz = tl.where(mask, dz, 0.0)
    first = tl.sum(dz, axis=2).to(tl.float64)[:, :, None]
    second = tl.sum(dz * d, axis=2).to(tl.float64)[:, :, None]
    width = units * PACK if LAST else others
    second = channel_sums(sums, item // groups, channel, groups * width, in_group, first, second, delta, b_rstd)
    group_first, group_second = tl.sum(w * first, axis=1)[:, :, None], tl.sum(w * second, axis=1)[:, :, None]
    slope, constant = backward_affine(group_first, group_second, delta, b_rstd, size)
    b_dx = tl.fma(d, slope.to(COMPUTE), constant.to(COMPUTE))
    b_dx = tl.fma(dz, scale.to(COMPUTE), b_dx)
    tl.store(dx + offsets, b_dx.to(dx.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- tiles of channels and pixels


@triton.jit
def _channels(rows, splits, blocks, CHANNELS: tl.constexpr):
    """Sample, split, row of the channels in it, and channel counted over all samples with its mask, (CHANNELS, 1).

    `blocks` programs side by side own the `rows` channels of a sample, or of the whole batch where it lies channel by
    channel.
    """
    pid = tl.program_id(0).to(tl.int64)
    sample, split = pid // blocks // splits, pid // blocks % splits
    row = (pid % blocks * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    return sample, split, row, sample * rows + row, row < rows


@triton.jit
def _elements(
    sample, split, row, rows, step, units, others,
    PACK: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Offsets and mask (CHANNELS, PIXELS) of the elements of a split's tile.

    The size of the innermost dimension is units * PACK, as in _groups_tile, also where it bounds a mask.
    """
    p = (split * STEPS + step) * PIXELS + tl.arange(0, PIXELS)[None, :]
    if LAST:
        pixels, limit = others.to(tl.int64), units.to(tl.int64) * PACK
        offsets = (sample * pixels + p) * limit + row
    else:
        pixels, limit = units.to(tl.int64) * PACK, rows
        offsets = row * pixels + p
    return offsets, (row < limit) & (p < pixels)


@_kernel
def moments_kernel(
    partials, x, mean, rstd, channels, width, rows, units, others, splits, blocks,
    PACK: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """partials (3, channels, splits): a center for each channel and split, sums of x - center and of its square.

    The center is the element of the first tile that is nearest to the mean of it: a large mean costs no digits.
    mean, rstd: None, or known statistics of which only means far from 0 are looked at again.
    """
    sample, split, row, channel, in_rows = _channels(rows, splits, blocks, CHANNELS)
    if mean is None:
        wanted = 1
    else:
        group = channel // width
        b_mean = tl.load(mean + group, mask=in_rows, other=0.0).to(tl.float64)
        b_rstd = tl.load(rstd + group, mask=in_rows, other=0.0).to(tl.float64)
        wanted = tl.max(tl.max(is_far(b_mean, b_rstd).to(tl.int32), axis=1), axis=0)
    if wanted != 0:
        offsets, mask = _elements(sample, split, row, rows, 0, units, others, PACK, LAST, PIXELS, STEPS)
        b_x = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE)
        count = tl.sum(mask.to(tl.int32), axis=1)[:, None]
        near = tl.sum(b_x, axis=1)[:, None] / tl.maximum(count, 1).to(COMPUTE)
        distance = tl.where(mask, tl.abs(b_x - near), float("inf"))
        nearest = tl.min(distance, axis=1)[:, None]
        center = tl.min(tl.where(distance == nearest, b_x, float("inf")), axis=1)[:, None]
        center = tl.where(in_rows, center, 0.0)
        d = tl.where(mask, b_x - center, 0.0)
        first, second = tl.sum(d, axis=1).to(tl.float64), tl.sum(d * d, axis=1).to(tl.float64)
        for step in range(1, STEPS):
            offsets, mask = _elements(sample, split, row, rows, step, units, others, PACK, LAST, PIXELS, STEPS)
            b_x = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE)
            d = tl.where(mask, b_x - center, 0.0)
            first += tl.sum(d, axis=1).to(tl.float64)
            second += tl.sum(d * d, axis=1).to(tl.float64)
        at, plane = partials + channel * splits + split, channels.to(tl.int64) * splits
        tl.store(at, center.to(tl.float64), mask=in_rows)
        tl.store(at + plane, first[:, None], mask=in_rows)
        tl.store(at + 2 * plane, second[:, None], mask=in_rows)


@triton.jit
def _coefficients(coefficients, channel, channels, mask):
    """Center, scale and shift of channels, (CHANNELS, 1)."""
    at = coefficients + channel
    channels = channels.to(tl.int64)
    center = tl.load(at, mask=mask, other=0.0)
    return center, tl.load(at + channels, mask=mask, other=0.0), tl.load(at + 2 * channels, mask=mask, other=0.0)


@_kernel
def apply_kernel(
    y, x, coefficients, channels, rows, units, others, splits, blocks,
    SILU: tl.constexpr, PACK: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    STEPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    sample, split, row, channel, in_rows = _channels(rows, splits, blocks, CHANNELS)
    center, scale, shift = _coefficients(coefficients, channel, channels, in_rows)
    for step in range(0, STEPS):
        offsets, mask = _elements(sample, split, row, rows, step, units, others, PACK, LAST, PIXELS, STEPS)
        b_x = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE)
        b_y = activate(tl.fma(b_x - center, scale, shift), SILU, y.dtype.element_ty)
        tl.store(y + offsets, b_y.to(y.dtype.element_ty), mask=mask)


@_kernel
def gradient_sums_kernel(
    partials, dy, x, coefficients, channels, rows, units, others, splits, blocks,
    SILU: tl.constexpr, PACK: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    STEPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """partials (2, channels, splits): sums of dz and of dz * (x - center)."""
    sample, split, row, channel, in_rows = _channels(rows, splits, blocks, CHANNELS)
    center, scale, shift = _coefficients(coefficients, channel, channels, in_rows)
    first = tl.zeros([CHANNELS], tl.float64)
    second = tl.zeros([CHANNELS], tl.float64)
    for step in range(0, STEPS):
        offsets, mask = _elements(sample, split, row, rows, step, units, others, PACK, LAST, PIXELS, STEPS)
        d = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE) - center
        b_dy = tl.load(dy + offsets, mask=mask, other=0.0).to(COMPUTE)
        dz = activate_grad(b_dy, tl.fma(d, scale, shift), SILU, x.dtype.element_ty)
        dz = tl.where(mask, dz, 0.0)
        first += tl.sum(dz, axis=1).to(tl.float64)
        second += tl.sum(dz * d, axis=1).to(tl.float64)
    at, plane = partials + channel * splits + split, channels.to(tl.int64) * splits
    tl.store(at, first[:, None], mask=in_rows)
    tl.store(at + plane, second[:, None], mask=in_rows)


@_kernel
def gradient_kernel(
    dx, dy, x, coefficients, gradients, channels, width, rows, units, others, splits, blocks,
    SILU: tl.constexpr, PACK: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    STEPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx = scale * dz + (x - center) * slope + constant."""
    sample, split, row, channel, in_rows = _channels(rows, splits, blocks, CHANNELS)
    center, scale, shift = _coefficients(coefficients, channel, channels, in_rows)
    group = channel // width
    slope = tl.load(gradients + group, mask=in_rows, other=0.0)
    constant = tl.load(gradients + channels // width + group, mask=in_rows, other=0.0)
    for step in range(0, STEPS):
        offsets, mask = _elements(sample, split, row, rows, step, units, others, PACK, LAST, PIXELS, STEPS)
        d = tl.load(x + offsets, mask=mask, other=0.0).to(COMPUTE) - center
        b_dy = tl.load(dy + offsets, mask=mask, other=0.0).to(COMPUTE)
        dz = activate_grad(b_dy, tl.fma(d, scale, shift), SILU, x.dtype.element_ty)
        b_dx = tl.fma(dz, scale, tl.fma(d, slope, constant))
        tl.store(dx + offsets, b_dx.to(dx.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launches

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
