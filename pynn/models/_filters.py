"""What a convolution sees and can be: output sizes, receptive fields, fixed filter banks, causal convolution."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..ops._conv2d_activation import check_activation
from ..ops.conv2d import conv2d


def conv_output_size(size: int, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Positions of a convolution or pooling window along one axis.

        floor((size + 2 padding - dilation (kernel_size - 1) - 1) / stride) + 1

    The floor matters: 15 pixels, a window of 2 and stride 2 give 7, not 7.5.

    Raises:
        ValueError: size, kernel_size, stride or dilation below 1, negative padding, or a window larger than the input.
    """
    for name, value, least in (
        ("size", size, 1),
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if value < least:
            raise ValueError(f"conv_output_size: expected {name} >= {least}, got {value}")
    room = size + 2 * padding - dilation * (kernel_size - 1) - 1
    if room < 0:
        window = dilation * (kernel_size - 1) + 1
        raise ValueError(f"conv_output_size: a window of {window} does not fit into {size} with padding {padding}")
    return room // stride + 1


class ReceptiveField(NamedTuple):
    """The window of input pixels that one output pixel depends on, and how far the windows of neighbours are apart."""

    size: tuple[int, ...]
    stride: tuple[Fraction, ...]


class _Window(NamedTuple):
    """Along one axis: output position i depends on inputs first + i step .. last + i step."""

    first: Fraction
    last: Fraction
    step: Fraction


_SOURCE = _Window(Fraction(0), Fraction(0), Fraction(1))
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_WHOLE = (nn.Linear, nn.Flatten, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.GroupNorm)
_WHOLE_FUNCTIONS = (torch.flatten, torch.mean, nn.functional.adaptive_avg_pool2d, nn.functional.linear)
_WHOLE_METHODS = ("flatten", "mean", "view", "reshape")


class _Tracer(fx.Tracer):
    """Layers of pynn are leaves too, like the layers of torch.nn that they derive from."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_CONVOLUTIONS, *_TRANSPOSED)) or super().is_leaf_module(m, module_qualified_name)


def receptive_field(model: nn.Module) -> ReceptiveField:
    """The receptive field of a convolutional network's last feature map.

    Every layer with a window of k, stride s and dilation d widens the field by d (k - 1) steps and makes steps s times
    longer; where branches meet, the union counts. Layers that see the whole image (linear layers, flatten, global
    pooling, group normalisation) end the feature maps: the field before the first of them is returned. Batch
    normalisation counts as in evaluation mode.

    Args:
        model: a module that torch.fx can trace, with convolutions, pools, torch.nn.Upsample and pointwise
            layers on one input. Interpolation counts with both neighbours, also where it needs only one.
    Returns:
        (size, stride), one number per spatial axis each; the stride is a Fraction since upsampling makes it < 1.
    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: the model has no convolution or pool before it sees the whole image, or torch.fx cannot trace it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"receptive_field: expected model to be a torch.nn.Module, got {type(model).__name__}")
    root = nn.Sequential(model)  # so that a single layer is a call of a leaf as well
    try:
        graph = _Tracer().trace(root)
    except Exception as error:  # whatever the model's own code raises for a symbolic input
        raise ValueError(f"receptive_field: torch.fx cannot trace {type(model).__name__} ({error})") from error
    windows: dict[fx.Node, tuple[_Window, ...] | None] = {}  # () before the first layer with axes, None: all of it
    best: tuple[_Window, ...] = ()
    for node in graph.nodes:
        inputs = [windows[argument] for argument in node.all_input_nodes if argument in windows]
        if node.op == "placeholder":
            windows[node] = ()
        elif node.op in ("get_attr", "output") or not inputs:
            continue
        elif any(window is None for window in inputs) or _sees_everything(node, root):
            windows[node] = None
        else:
            window = _union([window for window in inputs if window])
            if node.op == "call_module":
                window = _through(root.get_submodule(str(node.target)), window)
            windows[node] = window
            if _sizes(window) >= _sizes(best):
                best = window
    if not best:
        raise ValueError(f"receptive_field: {type(model).__name__} has no convolution or pool on its input")
    return ReceptiveField(_sizes(best), tuple(window.step for window in best))


def _sizes(windows: tuple[_Window, ...]) -> tuple[int, ...]:
    return tuple(math.floor(window.last) - math.ceil(window.first) + 1 for window in windows)


def _union(inputs: list[tuple[_Window, ...] | None]) -> tuple[_Window, ...]:
    axes = zip(*(window for window in inputs if window), strict=True)
    return tuple(_Window(min(w.first for w in a), max(w.last for w in a), max(w.step for w in a)) for a in axes)


def _sees_everything(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), _WHOLE)
    return node.target in (_WHOLE_FUNCTIONS if node.op == "call_function" else _WHOLE_METHODS)


def _through(layer: nn.Module, before: tuple[_Window, ...]) -> tuple[_Window, ...]:
    """The windows after a layer, from those of its input."""
    if isinstance(layer, nn.Upsample):
        return tuple(_upsampled(layer, window) for window in before)
    if not isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED, *_POOLS)):
        return before
    kind = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn"))
    rank = int(kind.__name__[-2])  # Conv2d: 2
    kernel, stride = _numbers(layer.kernel_size, rank), _numbers(layer.stride, rank)
    dilation = _numbers(getattr(layer, "dilation", 1), rank)
    padding: tuple[int, ...]
    if isinstance(layer, CausalConv1d):
        padding = (layer.left,)
    elif isinstance(layer, _CONVOLUTIONS):  # "same" as numbers; the last axis comes first
        padding = tuple(layer._reversed_padding_repeated_twice[::2][::-1])
    else:
        padding = _numbers(layer.padding, rank)
    after = []
    for window, k, s, d, p in zip(before or (_SOURCE,) * rank, kernel, stride, dilation, padding, strict=True):
        first, last, step = window
        if isinstance(layer, _TRANSPOSED):
            # output i adds up inputs j with i = s j - p + d a, a < k: j from (i + p - d (k - 1)) / s to (i + p) / s
            lowest, highest = Fraction(p - d * (k - 1), s), Fraction(p, s)
            after.append(_Window(first + lowest * step, last + highest * step, step / s))
        else:
            after.append(_Window(first - p * step, last + (d * (k - 1) - p) * step, step * s))
    return tuple(after)


def _upsampled(layer: nn.Upsample, window: _Window) -> _Window:
    if not isinstance(layer.scale_factor, (int, float)):
        raise ValueError("receptive_field: expected torch.nn.Upsample with one scale_factor for all axes")
    scale = Fraction(layer.scale_factor)
    first, last, step = window
    reach = step * (1 - 1 / scale)  # output i reads input floor(i / scale), and its neighbours to interpolate
    if layer.mode == "nearest":
        return _Window(first - reach, last, step / scale)
    return _Window(first - step, last + step, step / scale)


def _numbers(value, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def gabor_bank(
    kernel_size: int,
    orientations: int = 4,
    wavelengths: tuple[float, ...] = (4.0,),
    phases: tuple[float, ...] = (0.0, math.pi / 2),
    sigma: float = 0.56,
    aspect: float = 0.5,
) -> Tensor:
    """Gabor filters, the model of simple cells that first layers of trained networks come to resemble.

        exp(-(u^2 + aspect^2 v^2) / (2 (sigma wavelength)^2)) cos(2 pi u / wavelength + phase)

    with (u, v) the pixel's coordinates from the centre, turned by the orientation. Each filter has mean 0 and norm 1.
    Daugman, "Uncertainty relation for resolution in space, spatial frequency, and orientation", 1985.

    Args:
        kernel_size: height and width of every filter, at least 2.
        orientations: angles 0, pi / orientations, ...
        wavelengths: pixels per period. phases: 0 for even filters (lines), pi / 2 for odd ones (edges).
        sigma: width of the envelope in wavelengths; 0.56 is a bandwidth of one octave.
        aspect: width over length of the envelope.
    Returns:
        (orientations * len(wavelengths) * len(phases), 1, kernel_size, kernel_size) float32: weights for a convolution.
    Raises:
        ValueError: a size, number, wavelength, sigma or aspect that is not positive.
    """
    if kernel_size < 2 or orientations < 1:
        raise ValueError(f"gabor_bank: expected kernel_size >= 2, orientations >= 1, got {kernel_size}, {orientations}")
    if not wavelengths or not phases or min(*wavelengths, sigma, aspect) <= 0:
        raise ValueError("gabor_bank: expected phases and positive wavelengths, sigma and aspect")
    position = torch.arange(kernel_size, dtype=torch.float64) - (kernel_size - 1) / 2
    y, x = torch.meshgrid(position, position, indexing="ij")
    filters = []
    for i in range(orientations):
        angle = math.pi * i / orientations
        u = x * math.cos(angle) + y * math.sin(angle)
        v = y * math.cos(angle) - x * math.sin(angle)
        for wavelength in wavelengths:
            envelope = torch.exp(-(u.square() + (aspect * v).square()) / (2 * (sigma * wavelength) ** 2))
            filters += [envelope * torch.cos(2 * math.pi * u / wavelength + phase) for phase in phases]
    bank = torch.stack(filters)
    bank = bank - bank.mean((1, 2), keepdim=True)
    return (bank / bank.flatten(1).norm(dim=1).view(-1, 1, 1)).float().unsqueeze(1)


def haar_bank(levels: int = 1) -> Tensor:
    """The two-dimensional Haar wavelets of one level: average, and differences across columns, rows and both.

    As weights of a convolution with stride 2^levels they are an orthonormal set; for levels = 1 a basis, whose
    transposed convolution gives the image back. Haar, "Zur Theorie der orthogonalen Funktionensysteme", 1910.

    Args:
        levels: the filters are 2^levels pixels wide.
    Returns:
        (4, 1, 2^levels, 2^levels) float32.
    Raises:
        ValueError: levels below 1.
    """
    if levels < 1:
        raise ValueError(f"haar_bank: expected levels >= 1, got {levels}")
    low = torch.full((2**levels,), 2 ** (-levels / 2))
    high = low * torch.tensor([1.0, -1.0]).repeat_interleave(2 ** (levels - 1))
    return torch.stack([torch.outer(rows, columns) for rows in (low, high) for columns in (low, high)]).unsqueeze(1)


class CausalConv1d(nn.Conv1d):
    """A convolution over time that sees no future: output t depends on inputs up to t only.

    torch.nn.Conv1d's parameters and state_dict; the input is continued with dilation (kernel_size - 1) zeros on the
    left and none on the right. Computed by pynn.ops.conv2d. van den Oord et al., "WaveNet",
    https://arxiv.org/abs/1609.03499.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as in torch.nn.Conv1d.
        activation: applied to the output in the same pass, one of pynn.ops.conv2d's.
    Shape:
        input (N, C, L) to output (N, O, ceil(L / stride)).
    Raises:
        ValueError: an unknown activation, or an input that is not (N, C, L) with C in_channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        check_activation("CausalConv1d", activation)
        super().__init__(in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias)
        self.activation = activation
        self.left = dilation * (kernel_size - 1)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 3 or input.shape[1] != self.in_channels:
            shape = tuple(input.shape)
            raise ValueError(f"CausalConv1d: expected input of shape (N, {self.in_channels}, L), got {shape}")
        padded = nn.functional.pad(input, (self.left, 0)).unsqueeze(2)  # (N, C, 1, left + L)
        output = conv2d(
            padded,
            self.weight.unsqueeze(2),
            self.bias,
            (1, *self.stride),
            0,
            (1, *self.dilation),
            self.groups,
            activation=self.activation,
        )
        return output.squeeze(2)
