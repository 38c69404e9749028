"""How conv2d's kernels are launched: layouts, geometry, which kernel and tile, splits of the weight gradient."""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl

from . import conv2d_configs as configs
from .conv2d_direct import direct_kernel, direct_weight_kernel, reduce_kernel
from .conv2d_gemm import gemm_kernel, weight_kernel
from .conv2d_sums import add_splits_kernel

_FEW = 4  # channels of a group; a matrix product would mostly multiply zeros
_COLUMNS = 3  # the dimension
_FEW_PIXELS = 256  # float32 sums over fewer are split into shorter pieces: there is little else to lose
FAST_DIVISION = 2**31  # pixels are divided by multiplications below


@dataclasses.dataclass(frozen=True)
class Layout:
    """Strides (n, c, h, w) of a tensor for a kernel: that of dimension `unit` is 1, the others are units of `pack`."""

    strides: tuple[int, ...]
    unit: int
    pack: int

    @staticmethod
    def of(t: torch.Tensor) -> Layout:
        strides = tuple(t.stride())
        if strides[1] == 1 and t.shape[1] > 1:
            unit = 1
        elif strides[3] == 1 or t.shape[3] == 1:
            unit = _COLUMNS
        else:
            unit = 1 if t.shape[1] == 1 else 0
        others = [stride for d, stride in enumerate(strides) if d != unit]
        pack = pack_of(t, *others)
        return Layout(tuple(stride // pack for stride in strides), unit, pack)


def pack_of(t: torch.Tensor, *sizes: int) -> int:
    """Elements of 16 bytes where all sizes are made of them, otherwise 1."""
    pack = 16 // t.element_size()
    return pack if all(size % pack == 0 for size in sizes) else 1


def index_type(pixels: int, *tensors: torch.Tensor | None) -> tl.dtype:
    """int32 where it holds the index of a pixel and every offset within a sample."""
    largest = pixels
    for t in tensors:
        if t is not None:
            largest = max(
                largest, sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
            )
    return tl.int32 if largest < 2**31 - 2**16 else tl.int64


def levels_of(size: int) -> int:
    """The base-2 logarithm of a power of two."""
    return size.bit_length() - 1


def compute_type(x: torch.Tensor) -> tl.dtype:
    return tl.float64 if x.dtype is torch.float64 else tl.float32


def kind_of(x: torch.Tensor, allow_tf32: bool) -> str:
    if x.dtype is torch.float32:
        return "tf32" if allow_tf32 else "fp32"
    return "fp64" if x.dtype is torch.float64 else "half"


def _product(kind: str) -> dict[str, object]:
    return {"CHUNKED": kind == "fp32", "PRECISION": "tf32" if kind == "tf32" else "ieee"}


def launch(kernel, programs: int, x: torch.Tensor, *args, options: dict[str, int], **constants) -> None:
    with torch.cuda.device_of(x):
        kernel[(programs,)](*args, **constants, **options)


@dataclasses.dataclass(frozen=True)
class Axis:
    """The geometry of one spatial dimension of a convolution; `size` is the image's, `out` the output's."""

    size: int
    out: int
    kernel: int
    stride: int
    before: int
    after: int
    dilation: int

    def padded(self) -> Axis:
        """Without padding, of an image that contains it."""
        return dataclasses.replace(self, size=self.size + self.before + self.after, before=0, after=0)

    def phases(self, transposed: bool) -> int:
        return min(self.stride, self.size) if transposed else 1

    def count(self, transposed: bool) -> int:
        """Results of a phase."""
        return triton.cdiv(self.size, self.stride) if transposed else self.out

    def arguments(self, transposed: bool, pack: int = 1) -> tuple[int, ...]:
        """Read size, results of a phase in units of pack, results, and so on, as gemm_kernel takes them."""
        common = math.gcd(self.stride, self.dilation)
        step, shift = self.stride // common, self.dilation // common
        read, results = (self.out, self.size) if transposed else (self.size, self.out)
        if not transposed:
            step, shift = 1, 0
        return (
            read, self.count(transposed) // pack, results, self.before, self.stride, self.dilation, self.kernel,
            step, pow(shift, -1, step) if step > 1 else 0, self.phases(transposed),
        )  # fmt: skip


def axes(image, kernel, stride, padding, dilation) -> tuple[Axis, Axis]:
    axes = []
    for d in (0, 1):
        before, after = padding[d], padding[2 + d]
        out = (image[d] + before + after - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        axes.append(Axis(image[d], out, kernel[d], stride[d], before, after, dilation[d]))
    return axes[0], axes[1]


def multiplies(reduced: int, outputs: int) -> bool:
    """Whether gemm_kernel computes a forward of so many channels of a group."""
    return reduced > _FEW and outputs > _FEW


def correlate(
    x, weight, y, h: Axis, w: Axis, groups, padding_mode, allow_tf32,
    *, transposed, bias=None, residual=None, pre=None, activation=0, prologue=None,
) -> None:  # fmt: skip
    """Writes y, the forward of x; or, transposed, the input gradient y of the output's gradient x.

    prologue: further arguments of gemm_kernel, for what `multiplies`.
    """
    weight = weight.unflatten(0, (groups, -1))  # (groups, out, in, KH, KW)
    weight = weight.transpose(1, 2) if transposed else weight
    outputs, reduced = weight.shape[1:3]
    x_layout, y_layout = Layout.of(x), Layout.of(y)
    r_layout = Layout((0,) * 4, 0, 1) if residual is None else Layout.of(residual)
    direct, few_outputs = reduced <= _FEW, outputs <= _FEW
    last = x_layout.unit == 1
    kind = kind_of(x, allow_tf32)
    in_pack, out_pack = pack_of(x, reduced), pack_of(x, outputs * groups if direct else outputs)
    if direct:
        many_taps = last and reduced == 1 and x.element_size() == 2 and h.kernel * w.kernel > 25
        # two pixels of a thread share the weights that it reads
        tile = configs.direct_tile(outputs * groups, last, x.element_size(), 2048 if many_taps else 1024, reduced == 1)
    elif few_outputs:
        tile = configs.reduce_tile(reduced, triton.next_power_of_2(outputs))
    else:
        tile = configs.product_tile(kind, outputs, prologue is not None)
    w_pack = y_layout.pack if y_layout.unit == _COLUMNS and w.count(transposed) % y_layout.pack == 0 else 1
    pixels = x.shape[0] * h.count(transposed) * w.count(transposed)
    blocks = triton.cdiv(pixels, tile.pixels)
    programs = blocks * h.phases(transposed) * w.phases(transposed)
    if not few_outputs or direct:
        programs *= triton.cdiv(outputs * groups if direct else outputs, tile.channels)
    if not direct:
        programs *= groups
    arguments = (
        y, pre, x, weight.permute(3, 4, 2, 0, 1).contiguous() if direct else weight.permute(0, 1, 3, 4, 2).contiguous(),
        bias, residual, 0 if bias is None else bias.stride(0),
        *x_layout.strides, *y_layout.strides, *r_layout.strides,
        x.shape[0], reduced // in_pack, (outputs * groups if direct else outputs) // out_pack, groups, blocks,
        *h.arguments(transposed), *w.arguments(transposed, w_pack),
    )  # fmt: skip
    constants = {
        "TRANSPOSED": transposed, "PADDING": padding_mode, "ACTIVATION": activation,
        "X_UNIT": x_layout.unit, "X_PACK": x_layout.pack, "Y_UNIT": y_layout.unit, "Y_PACK": y_layout.pack,
        "R_UNIT": r_layout.unit, "R_PACK": r_layout.pack,
        "IN_PACK": in_pack, "OUT_PACK": out_pack, "W_PACK": w_pack,
        "INDEX": index_type(pixels, x, y, residual), "COMPUTE": compute_type(x),
        "BLOCK_P": tile.pixels, "BLOCK_O": tile.channels,
    }  # fmt: skip
    if direct:
        grouping = 0 if groups == 1 else 1 if outputs == reduced == 1 else 2
        unrolled = w.kernel if reduced == 1 and w.kernel in (1, 3, 5, 7) and (not transposed or w.stride == 1) else 0
        launch(
            direct_kernel, programs, x, *arguments,
            **constants, GROUPING=grouping, IN=reduced, W_TAPS=unrolled, options=tile.options,
        )  # fmt: skip
    elif few_outputs:
        launch(
            reduce_kernel,
            programs,
            x,
            *arguments,
            **constants,
            BLOCK_R=tile.step,
            LEVELS=levels_of(tile.step),
            options=tile.options,
        )
    else:
        launch(
            gemm_kernel, programs, x, *arguments,
            **constants, **_product(kind), **(prologue or {}), BLOCK_R=tile.step, options=tile.options,
        )  # fmt: skip


def splits_of(pixels: int, step: int, programs: int) -> tuple[int, int]:
    """Splits of the pixels and steps of each, from the shape alone."""
    steps = triton.cdiv(pixels, step)
    most = 4 if triton.knobs.runtime.interpret else triton.cdiv(configs.PROGRAMS, programs)
    splits = max(1, min(most, steps // configs.SPLIT_STEPS))
    steps = triton.cdiv(steps, splits)
    return triton.cdiv(pixels, steps * step), steps


def magic_of(divisor: int) -> tuple[int, int]:
    """magic and shift: p // divisor = p * magic >> shift for 0 <= p < 2^31."""
    shift = 31 + (divisor - 1).bit_length()
    return triton.cdiv(1 << shift, divisor), shift


def add_splits(out: torch.Tensor, partials: torch.Tensor, channels: int, taps: int) -> None:
    splits, size, block = partials.shape[0], out.numel(), 256
    launch(
        add_splits_kernel, triton.cdiv(size, block), out, out, partials, splits, size, channels, taps,
        BLOCK=block, SPLITS=min(triton.next_power_of_2(splits), 8), options={"num_warps": 4, "enable_fp_fusion": False},
    )  # fmt: skip


def weight_gradient(dw, dy, x, h: Axis, w: Axis, groups, reduced, outputs, padding_mode, allow_tf32) -> None:
    d_layout, x_layout = Layout.of(dy), Layout.of(x)
    direct = groups > 1 and reduced <= _FEW
    kind, taps = kind_of(x, allow_tf32), h.kernel * w.kernel
    pixels = x.shape[0] * h.out * w.out
    constants = {}
    if direct:
        channels = outputs * groups
        block_w = min(triton.next_power_of_2(w.kernel), 8)
        tile = configs.sum_tile(channels, x.element_size(), 2048 // block_w, reduced == 1)
        step = tile.pixels
        w_blocks = triton.cdiv(w.kernel, block_w)
        programs = triton.cdiv(channels, tile.channels) * reduced * h.kernel * w_blocks
        sizes, in_pack, out_pack = (w_blocks,), 1, pack_of(x, channels)
        constants = {"DEPTHWISE": outputs == reduced == 1, "BLOCK_W": block_w, "LEVELS": levels_of(tile.pixels)}
    else:
        channels = outputs
        tile, columns, by_tap = configs.weight_tile(kind, outputs, reduced)
        step = tile.pixels
        in_blocks = taps * triton.cdiv(reduced, columns) if by_tap else triton.cdiv(taps * reduced, columns)
        programs = groups * triton.cdiv(outputs, tile.channels) * in_blocks
        sizes, in_pack, out_pack = (), pack_of(x, reduced), pack_of(x, outputs)
        if kind == "fp32" and pixels < _FEW_PIXELS:
            step //= 2
        constants = {"BY_TAP": by_tap, "BLOCK_C": columns, "STEP": step, "IN_PACK": in_pack, **_product(kind)}
    splits, steps = splits_of(pixels, step, programs)
    reach = splits * steps * step + tile.pixels
    partials = x.new_empty(
        (splits, outputs * groups * taps * reduced),
        dtype=torch.float64 if x.dtype is torch.float64 else torch.float32,
    )
    launch(
        direct_weight_kernel if direct else weight_kernel, splits * programs, x,
        partials, dy, x, *d_layout.strides, *x_layout.strides,
        x.shape[0], channels // out_pack, reduced // in_pack, groups, steps, *sizes,
        h.size, h.out, h.before, h.stride, h.dilation, h.kernel,
        w.size, w.out, w.before, w.stride, w.dilation, w.kernel,
        *magic_of(w.out), *magic_of(h.out * w.out),
        **constants, PADDING=padding_mode, FAST=reach < FAST_DIVISION,
        D_UNIT=d_layout.unit, D_PACK=d_layout.pack, X_UNIT=x_layout.unit, X_PACK=x_layout.pack, OUT_PACK=out_pack,
        INDEX=index_type(reach, x, dy), COMPUTE=compute_type(x), BLOCK_P=tile.pixels, BLOCK_O=tile.channels,
        options=tile.options,
    )  # fmt: skip
    add_splits(dw, partials, reduced, taps)
