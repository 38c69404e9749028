"""conv2d in Triton: y = activation(conv(x, w) + bias + residual), and its gradients. See csrc/include/conv2d.h.

Forward and input gradient are one computation, a correlation that the gradient runs for each stride phase. A matrix
product (conv2d_gemm.py) does it where the channels of a group fill one, otherwise plain sums (conv2d_direct.py). Every
sum is made in an order that only the shape of a sample and the kernel decide (the weight gradient: the whole shape).
Tensors are read with the strides they have; weights, which are small, are brought into the order of the sums first.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl

from ..ops._conv2d_layout import is_channels_last
from . import conv2d_configs as configs
from .conv2d_direct import direct_kernel, direct_weight_kernel, reduce_kernel
from .conv2d_gemm import gemm_kernel, weight_kernel
from .conv2d_sums import activation_kernel, add_splits_kernel, channel_sums_kernel, fold_kernel

_FEW = 4  # channels of a group; a matrix product would mostly multiply zeros
_COLUMNS = 3  # the dimension


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Strides (n, c, h, w) of a tensor for a kernel: that of dimension `unit` is 1, the others are units of `pack`."""

    strides: tuple[int, ...]
    unit: int
    pack: int

    @staticmethod
    def of(t: torch.Tensor) -> _Layout:
        strides = tuple(t.stride())
        if strides[1] == 1 and t.shape[1] > 1:
            unit = 1
        elif strides[3] == 1 or t.shape[3] == 1:
            unit = _COLUMNS
        else:
            unit = 1 if t.shape[1] == 1 else 0
        others = [stride for d, stride in enumerate(strides) if d != unit]
        pack = _pack(t, *others)
        return _Layout(tuple(stride // pack for stride in strides), unit, pack)


def _pack(t: torch.Tensor, *sizes: int) -> int:
    """Elements of 16 bytes where all sizes are made of them, otherwise 1."""
    pack = 16 // t.element_size()
    return pack if all(size % pack == 0 for size in sizes) else 1


def _index(pixels: int, *tensors: torch.Tensor | None) -> tl.dtype:
    """int32 where it holds the index of a pixel and every offset within a sample."""
    largest = pixels
    for t in tensors:
        if t is not None:
            largest = max(
                largest, sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
            )
    return tl.int32 if largest < 2**31 - 2**16 else tl.int64


def _compute(x: torch.Tensor) -> tl.dtype:
    return tl.float64 if x.dtype is torch.float64 else tl.float32


def _kind(x: torch.Tensor, allow_tf32: bool) -> str:
    if x.dtype is torch.float32:
        return "tf32" if allow_tf32 else "fp32"
    return "fp64" if x.dtype is torch.float64 else "half"


def _product(kind: str) -> dict[str, object]:
    return {"CHUNKED": kind == "fp32", "PRECISION": "tf32" if kind == "tf32" else "ieee"}


def _launch(kernel, programs: int, x: torch.Tensor, *args, options: dict[str, int], **constants) -> None:
    with torch.cuda.device_of(x):
        kernel[(programs,)](*args, **constants, **options)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """The geometry of one spatial dimension of a convolution; `size` is the image's, `out` the output's."""

    size: int
    out: int
    kernel: int
    stride: int
    before: int
    after: int
    dilation: int

    def padded(self) -> _Axis:
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


def _axes(image, kernel, stride, padding, dilation) -> tuple[_Axis, _Axis]:
    axes = []
    for d in (0, 1):
        before, after = padding[d], padding[2 + d]
        out = (image[d] + before + after - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        axes.append(_Axis(image[d], out, kernel[d], stride[d], before, after, dilation[d]))
    return axes[0], axes[1]


def _correlate(
    x, weight, y, h: _Axis, w: _Axis, groups, padding_mode, allow_tf32,
    *, transposed, bias=None, residual=None, pre=None, activation=0,
) -> None:  # fmt: skip
    """Writes y, the forward of x; or, transposed, the input gradient y of the output's gradient x."""
    weight = weight.unflatten(0, (groups, -1))  # (groups, out, in, KH, KW)
    weight = weight.transpose(1, 2) if transposed else weight
    outputs, reduced = weight.shape[1:3]
    x_layout, y_layout = _Layout.of(x), _Layout.of(y)
    r_layout = _Layout((0,) * 4, 0, 1) if residual is None else _Layout.of(residual)
    direct, few_outputs = reduced <= _FEW, outputs <= _FEW
    last = x_layout.unit == 1
    kind = _kind(x, allow_tf32)
    in_pack, out_pack = _pack(x, reduced), _pack(x, outputs * groups if direct else outputs)
    if direct:
        tile = configs.direct_tile(outputs * groups, last)
    elif few_outputs:
        tile = configs.reduce_tile(reduced, triton.next_power_of_2(outputs), last)
    else:
        tile = configs.product_tile(kind, outputs)
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
        "INDEX": _index(pixels, x, y, residual), "COMPUTE": _compute(x),
        "BLOCK_P": tile.pixels, "BLOCK_O": tile.channels,
    }  # fmt: skip
    if direct:
        grouping = 0 if groups == 1 else 1 if outputs == reduced == 1 else 2
        unrolled = w.kernel if reduced == 1 and w.kernel in (1, 3, 5, 7) and (not transposed or w.stride == 1) else 0
        _launch(
            direct_kernel, programs, x, *arguments,
            **constants, GROUPING=grouping, IN=reduced, W_TAPS=unrolled, options=tile.options,
        )  # fmt: skip
    elif few_outputs:
        _launch(reduce_kernel, programs, x, *arguments, **constants, BLOCK_R=tile.step, options=tile.options)
    else:
        _launch(
            gemm_kernel, programs, x, *arguments,
            **constants, **_product(kind), BLOCK_R=tile.step, options=tile.options,
        )  # fmt: skip


def _empty(like: torch.Tensor, shape, channels_last: bool) -> torch.Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def conv2d_fwd(
    input, weight, bias, residual, stride, padding, dilation, groups, padding_mode, allow_tf32, activation, save_pre
):
    """conv2d_fwd(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] stride, SymInt[] padding,
    SymInt[] dilation, SymInt groups, int padding_mode, bool allow_tf32, int activation, bool save_pre)
    -> (Tensor, Tensor)"""
    h, w = _axes(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    last = is_channels_last(input) or is_channels_last(weight)
    y = _empty(input, (input.shape[0], weight.shape[0], h.out, w.out), last)
    pre = torch.empty_like(y) if save_pre else None
    if y.numel():
        residual = None if residual is None else residual.expand(y.shape)
        _correlate(
            input, weight, y, h, w, groups, padding_mode, allow_tf32,
            transposed=False, bias=bias, residual=residual, pre=pre, activation=activation,
        )  # fmt: skip
    return y, input.new_empty(0) if pre is None else pre


def conv2d_bwd_input(
    grad_output, weight, input_shape, stride, padding, dilation, groups, padding_mode, allow_tf32, channels_last
):
    """conv2d_bwd_input(Tensor grad_output, Tensor weight, SymInt[] input_shape, SymInt[] stride, SymInt[] padding,
    SymInt[] dilation, SymInt groups, int padding_mode, bool allow_tf32, bool channels_last) -> Tensor"""
    dx = _empty(grad_output, input_shape, channels_last)
    if not dx.numel():
        return dx
    h, w = _axes(input_shape[2:], weight.shape[2:], stride, padding, dilation)
    arguments = groups, 0, allow_tf32
    if padding_mode == 0 or not any(padding):
        _correlate(grad_output, weight, dx, h, w, *arguments, transposed=True)
        return dx
    shape = (*input_shape[:2], h.size + h.before + h.after, w.size + w.before + w.after)
    dtype = torch.float64 if dx.dtype is torch.float64 else torch.float32
    padded = _empty(grad_output.new_empty(0, dtype=dtype), shape, channels_last)
    _correlate(grad_output, weight, padded, h.padded(), w.padded(), *arguments, transposed=True)
    _elementwise(
        fold_kernel, dx, padded,
        pads=(h.before, h.after, w.before, w.after), PADDING=padding_mode,
    )  # fmt: skip
    return dx


def _elementwise(kernel, x, *others, pads=(), **constants) -> None:
    """Runs kernel(x, *others, strides of others and of x, sizes, pads, ...) on blocks of pixels and channels of x."""
    layout = _Layout.of(x)
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    tile = configs.direct_tile(channels, layout.unit == 1, 2048)
    blocks, pack = triton.cdiv(pixels, tile.pixels), _pack(x, channels)
    layouts = [_Layout.of(t) for t in others]
    for name, other in zip("YS", layouts, strict=False):
        constants |= {f"{name}_UNIT": other.unit, f"{name}_PACK": other.pack}
    _launch(
        kernel, blocks * triton.cdiv(channels, tile.channels), x,
        x, *others, *(stride for each in layouts for stride in each.strides), *layout.strides,
        batch, height, width, channels // pack, *pads,
        **constants, X_UNIT=layout.unit, X_PACK=layout.pack, PACK=pack, INDEX=_index(pixels, x, *others),
        COMPUTE=_compute(x), BLOCK_P=tile.pixels, BLOCK_C=tile.channels, options=tile.options,
    )  # fmt: skip


def conv2d_bwd_activation(grad_output, saved, activation):
    """conv2d_bwd_activation(Tensor grad_output, Tensor saved, int activation) -> Tensor"""
    dz = _empty(saved, saved.shape, is_channels_last(saved))
    if not dz.numel():
        return dz
    x, dy, s = dz, grad_output, saved
    if dz.stride() == grad_output.stride() == saved.stride():  # one row
        x, dy, s = (t.as_strided((1, t.numel(), 1, 1), (t.numel(), 1, 1, 1)) for t in (dz, grad_output, saved))
    _elementwise(activation_kernel, x, dy, s, KIND=activation)
    return dz


def _splits(pixels: int, step: int, programs: int) -> tuple[int, int]:
    """Splits of the pixels and steps of each, from the shape alone."""
    steps = triton.cdiv(pixels, step)
    most = 4 if triton.knobs.runtime.interpret else triton.cdiv(configs.PROGRAMS, programs)
    splits = max(1, min(most, steps // configs.SPLIT_STEPS))
    steps = triton.cdiv(steps, splits)
    return triton.cdiv(pixels, steps * step), steps


def _magic(divisor: int) -> tuple[int, int]:
    """magic and shift: p // divisor = p * magic >> shift for 0 <= p < 2^31."""
    shift = 31 + (divisor - 1).bit_length()
    return triton.cdiv(1 << shift, divisor), shift


def _add_splits(out: torch.Tensor, partials: torch.Tensor, channels: int, taps: int) -> None:
    splits, size, block = partials.shape[0], out.numel(), 256
    _launch(
        add_splits_kernel, triton.cdiv(size, block), out, out, partials, splits, size, channels, taps,
        BLOCK=block, SPLITS=min(triton.next_power_of_2(splits), 8), options={"num_warps": 4},
    )  # fmt: skip


def _bias_gradient(dy: torch.Tensor) -> torch.Tensor:
    layout = _Layout.of(dy)
    batch, channels, height, width = dy.shape
    pixels, pack = batch * height * width, _pack(dy, channels)
    tile = configs.direct_tile(channels, layout.unit == 1, 2048)
    c_blocks = triton.cdiv(channels, tile.channels)
    splits, steps = _splits(pixels, tile.pixels, c_blocks)
    compute = torch.float64 if dy.dtype is torch.float64 else torch.float32
    partials, dbias = dy.new_empty((splits, channels), dtype=compute), dy.new_empty(channels)
    _launch(
        channel_sums_kernel, splits * c_blocks, dy,
        partials, dy, *layout.strides, batch, height, width, channels // pack, steps,
        X_UNIT=layout.unit, X_PACK=layout.pack, PACK=pack, INDEX=_index(pixels + steps * tile.pixels, dy),
        COMPUTE=_compute(dy), BLOCK_P=tile.pixels, BLOCK_C=tile.channels, options=tile.options,
    )  # fmt: skip
    _add_splits(dbias, partials, 1, 1)
    return dbias


def conv2d_bwd_weight(
    grad_output, input, kernel_size, stride, padding, dilation, groups, padding_mode, allow_tf32, with_bias
):
    """conv2d_bwd_weight(Tensor grad_output, Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding,
    SymInt[] dilation, SymInt groups, int padding_mode, bool allow_tf32, bool with_bias) -> (Tensor, Tensor)"""
    dy, x = grad_output, input
    reduced, outputs = x.shape[1] // groups, dy.shape[1] // groups
    dw = x.new_empty((dy.shape[1], reduced, *kernel_size))
    if not dy.numel():
        return dw.zero_(), x.new_zeros(dy.shape[1] if with_bias else 0)
    if dw.numel():
        h, w = _axes(x.shape[2:], kernel_size, stride, padding, dilation)
        _weight_gradient(dw, dy, x, h, w, groups, reduced, outputs, padding_mode, allow_tf32)
    return dw, _bias_gradient(dy) if with_bias else x.new_empty(0)


def _weight_gradient(dw, dy, x, h: _Axis, w: _Axis, groups, reduced, outputs, padding_mode, allow_tf32) -> None:
    d_layout, x_layout = _Layout.of(dy), _Layout.of(x)
    direct = groups > 1 and reduced <= _FEW
    kind, taps = _kind(x, allow_tf32), h.kernel * w.kernel
    pixels = x.shape[0] * h.out * w.out
    constants = {}
    if direct:
        channels = outputs * groups
        block_w = min(triton.next_power_of_2(w.kernel), 8)
        tile = configs.direct_tile(channels, x_layout.unit == 1, 2048 // block_w)
        w_blocks = triton.cdiv(w.kernel, block_w)
        programs = triton.cdiv(channels, tile.channels) * reduced * h.kernel * w_blocks
        sizes, in_pack, out_pack = (w_blocks,), 1, _pack(x, channels)
        constants = {"DEPTHWISE": outputs == reduced == 1, "BLOCK_W": block_w}
    else:
        channels = outputs
        tile, columns = configs.weight_tile(kind, outputs)
        by_tap = reduced >= columns // 2
        in_blocks = taps * triton.cdiv(reduced, columns) if by_tap else triton.cdiv(taps * reduced, columns)
        programs = groups * triton.cdiv(outputs, tile.channels) * in_blocks
        sizes, in_pack, out_pack = (), _pack(x, reduced), _pack(x, outputs)
        constants = {"BY_TAP": by_tap, "BLOCK_C": columns, "IN_PACK": in_pack, **_product(kind)}
    splits, steps = _splits(pixels, tile.pixels, programs)
    reach = splits * steps * tile.pixels
    partials = x.new_empty(
        (splits, outputs * groups * taps * reduced),
        dtype=torch.float64 if x.dtype is torch.float64 else torch.float32,
    )
    _launch(
        direct_weight_kernel if direct else weight_kernel, splits * programs, x,
        partials, dy, x, *d_layout.strides, *x_layout.strides,
        x.shape[0], channels // out_pack, reduced // in_pack, groups, steps, *sizes,
        h.size, h.out, h.before, h.stride, h.dilation, h.kernel,
        w.size, w.out, w.before, w.stride, w.dilation, w.kernel,
        *_magic(w.out), *_magic(h.out * w.out),
        **constants, PADDING=padding_mode, FAST=reach < 2**31,
        D_UNIT=d_layout.unit, D_PACK=d_layout.pack, X_UNIT=x_layout.unit, X_PACK=x_layout.pack, OUT_PACK=out_pack,
        INDEX=_index(reach, x, dy), COMPUTE=_compute(x), BLOCK_P=tile.pixels, BLOCK_O=tile.channels,
        options=tile.options,
    )  # fmt: skip
    _add_splits(dw, partials, reduced, taps)
