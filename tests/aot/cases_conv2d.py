"""The calls of conv2d whose Triton kernels are compiled: every kernel, every tile, every kind of product and layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .ratchet import Case, Promise

_BF16, _FP16, _FP32, _FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
_SILU, _GELU = 3, 4  # csrc/include/conv2d.h
_PLAIN, _LOADS, _STORES = Promise(), Promise(wide_loads=True), Promise(wide_stores=True)
_BOTH = Promise(wide_loads=True, wide_stores=True)


def _empty(dtype: torch.dtype, last: bool, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


class _Layer:
    """A convolution with "same" padding of 8 images of 32 x 32."""

    def __init__(self, dtype, last, inputs, outputs, kernel, *, stride=1, groups=1, padding_mode=0, tf32=False):
        size = 32 // stride
        self.x = _empty(dtype, last, 8, inputs, 32, 32)
        self.w = _empty(dtype, last, outputs, inputs // groups, kernel, kernel)
        self.y = _empty(dtype, last, 8, outputs, size, size)
        self.bias = torch.empty(outputs, dtype=dtype)
        self.geometry = (stride,) * 2, (kernel // 2,) * 4, (1, 1), groups, padding_mode, tf32

    def forward(self, activation: int = 0, fused: bool = False) -> Callable:
        from pynn.triton_kernels.conv2d import conv2d_fwd

        residual = self.y if fused else None
        return lambda: conv2d_fwd(self.x, self.w, self.bias, residual, *self.geometry, activation, fused)

    def of_input(self) -> Callable:
        from pynn.triton_kernels.conv2d import conv2d_bwd_input

        from pynn.ops._conv2d_layout import is_channels_last

        last = is_channels_last(self.x)
        return lambda: conv2d_bwd_input(self.y, self.w, self.x.shape, *self.geometry, last)

    def of_weight(self, bias: bool = False) -> Callable:
        from pynn.triton_kernels.conv2d import conv2d_bwd_weight

        return lambda: conv2d_bwd_weight(self.y, self.x, self.w.shape[2:], *self.geometry, bias)


def conv2d() -> Iterator[Case]:
    from pynn.triton_kernels.conv2d import conv2d_bwd_activation, conv_transpose2d_fwd

    def dense(dtype, outputs, last=True, tf32=False):
        return _Layer(dtype, last, 64, outputs, 3, tf32=tf32)

    for outputs in (32, 64, 128):
        yield Case(f"bf16 nhwc {outputs}, fused silu", dense(_BF16, outputs).forward(_SILU, fused=True), _LOADS)
    yield Case("bf16 nchw 128", dense(_BF16, 128, last=False).forward(), _PLAIN)
    for outputs in (32, 64):
        yield Case(f"tf32 nhwc {outputs}", dense(_FP32, outputs, tf32=True).forward(), _STORES)
        yield Case(f"fp32 nhwc {outputs}, fused silu", dense(_FP32, outputs).forward(_SILU, fused=True), _LOADS)
    yield Case("fp32 nchw 64", dense(_FP32, 64, last=False).forward(), _PLAIN)
    yield Case("fp64 nhwc 64", dense(_FP64, 64).forward(), _PLAIN)
    yield Case("bf16 nhwc stride 2, input gradient", _Layer(_BF16, True, 64, 64, 3, stride=2).of_input(), _PLAIN)
    up = _Layer(_FP16, False, 64, 64, 4, stride=2)
    yield Case(
        "fp16 nchw transposed stride 2, gelu",
        lambda: conv_transpose2d_fwd(
            up.y, up.w, up.bias, None, (2, 2), (1, 1), (0, 0), (1, 1), 1, False, _GELU, False
        ),
        _PLAIN,
    )  # fmt: skip

    for dtype, name in ((_BF16, "bf16"), (_FP32, "fp32"), (_FP64, "fp64")):
        yield Case(f"{name} nhwc 64, weight gradient", dense(dtype, 64).of_weight(bias=dtype is _BF16), _PLAIN)
    yield Case("bf16 nhwc 32, weight gradient", dense(_BF16, 32).of_weight(), _PLAIN)
    yield Case("bf16 nchw 64, weight gradient", dense(_BF16, 64, last=False).of_weight(bias=True), _PLAIN)
    yield Case("tf32 nhwc 64, weight gradient", dense(_FP32, 64, tf32=True).of_weight(), _PLAIN)

    stem = _Layer(_BF16, True, 3, 64, 7, stride=2)
    yield Case("bf16 nhwc stem", stem.forward(_SILU), _PLAIN)
    yield Case("bf16 nhwc stem, input gradient", stem.of_input(), _PLAIN)
    yield Case("bf16 nhwc stem, weight gradient", stem.of_weight(), _PLAIN)
    yield Case("fp32 nchw head", _Layer(_FP32, False, 64, 3, 3).forward(), _PLAIN)
    yield Case("fp16 nhwc groups of 4", _Layer(_FP16, True, 64, 64, 3, groups=16).forward(), _PLAIN)
    yield Case("fp16 nhwc groups of 4, weight gradient", _Layer(_FP16, True, 64, 64, 3, groups=16).of_weight(), _PLAIN)
    for dtype, last, kernel in ((_BF16, True, 7), (_FP32, False, 3), (_FP64, True, 5)):
        name = {_BF16: "bf16", _FP32: "fp32", _FP64: "fp64"}[dtype] + (" nhwc" if last else " nchw")
        layer = _Layer(dtype, last, 64, 64, kernel, groups=64)
        yield Case(f"{name} depthwise {kernel}, gelu", layer.forward(_GELU), _BOTH if last else _PLAIN)
        yield Case(f"{name} depthwise {kernel}, weight gradient", layer.of_weight(), _LOADS if last else _PLAIN)
    circular = _Layer(_BF16, True, 64, 64, 3, groups=64, padding_mode=3)
    yield Case("bf16 nhwc depthwise circular, input gradient", circular.of_input(), _PLAIN)

    y = dense(_BF16, 64).y
    yield Case("bf16 gelu", lambda: conv2d_bwd_activation(y, y, _GELU), _BOTH)
    yield Case("bf16 silu, two layouts", lambda: conv2d_bwd_activation(y.contiguous(), y, _SILU), _PLAIN)

    for dtype, outputs, kernel in ((_BF16, 32, 1), (_BF16, 128, 1), (_BF16, 64, 3), (_FP32, 64, 1)):
        layer = _Layer(dtype, True, 64, outputs, kernel)
        name = {_BF16: "bf16", _FP32: "fp32"}[dtype]
        yield Case(
            f"{name} nhwc {outputs} k{kernel}, silu on the input", _prologue(layer, 1 if kernel > 1 else 8), _PLAIN
        )
    yield Case("bf16 nchw 64 k1, silu on the input", _prologue(_Layer(_BF16, False, 64, 64, 1), 8), _PLAIN)
    for dtype, last in ((_BF16, True), (_FP32, False), (_FP64, True)):
        x = dense(dtype, 64, last).x
        name = {_BF16: "bf16", _FP32: "fp32", _FP64: "fp64"}[dtype] + (" nhwc" if last else " nchw")
        yield Case(f"{name} prologue, silu", _prologue_pass(x), _PLAIN)
        yield Case(f"{name} prologue, gradient, silu", _prologue_gradient(x), _PLAIN)


def _coefficients(x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.empty(x.shape[:2], dtype=torch.float64 if x.dtype is _FP64 else _FP32) for _ in range(2)]


def _prologue(layer: _Layer, batch: int) -> Callable:
    """A forward whose matrix product applies the prologue: with one tap, or of few images."""
    from pynn.triton_kernels.conv2d_prologue import prologue_conv2d_fwd

    x = layer.x[:batch]
    arguments = _SILU, layer.w, layer.bias, None, *layer.geometry, 0, False
    return lambda: prologue_conv2d_fwd(x, *_coefficients(x), *arguments)


def _prologue_pass(x: torch.Tensor) -> Callable:
    from pynn.triton_kernels.conv2d_prologue import conv2d_prologue_fwd

    return lambda: conv2d_prologue_fwd(x, *_coefficients(x), _SILU)


def _prologue_gradient(x: torch.Tensor) -> Callable:
    from pynn.triton_kernels.conv2d_prologue import conv2d_prologue_bwd

    return lambda: conv2d_prologue_bwd(x, x, *_coefficients(x), _SILU, True)
