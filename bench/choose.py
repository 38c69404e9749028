"""python -m bench.choose [--device cuda] [--part PART] [--time-limit S] [--out DIR]: which backend is the fastest for
which shapes here.

Every backend that can run an op is timed on a grid of shapes, interleaved, after its results were compared; the table
goes to pynn/choices/<architecture>.csv, from where `auto` reads it. The default backend keeps a shape unless another
one is more than three per cent faster. With --part or --op only that is measured, and the rows of all other calls stay
what they are. With --time-limit a sample of the grid is measured, as much of it as there is time for.

The op `conv2d` is a training step - forward, and gradients of input, weight and bias - on CPU tensors: ours with the
table's backend for each pass, as it was read when this program started, against torch's with torch's autograd. So it is
measured after the passes: `python -m bench.choose --op conv2d`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import pynn
from bench import _gpu, harness
from pynn import backends, choices
from pynn.ops import _conv2d_cases as cases
from pynn.ops import _conv2d_torch
from pynn.ops._conv2d_functions import Conv2d, Geometry, convolve

CONTENDERS = {"cpu": ("cpu", "library"), "cuda": ("library", "cuda", "triton")}  # the default first
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
WORTH_IT = 1.03
MOST_FLOPS = {"cpu": 4e9, "cuda": 4e11}

# kernel, stride; then in and out channels, groups
WINDOWS = ((1, 1), (1, 2), (3, 1), (3, 2))
DENSE = ((32, 32), (32, 64), (64, 64), (128, 64), (64, 128), (128, 128), (256, 256), (512, 512), (64, 256), (256, 64))
WIDE = ((256, 1024), (1024, 256), (512, 2048), (2048, 512))  # for 1 x 1
FEW = ((1, 32), (3, 32), (3, 64), (32, 1), (64, 3))
NARROW = ((4, 32), (8, 32), (8, 64), (16, 16), (16, 32), (16, 64), (32, 8), (64, 4), (64, 8), (64, 16), (256, 8))
MAPS = ((2, 7), (16, 7), (4, 14), (64, 8), (8, 28), (64, 14), (16, 56))  # batch, height and width of the output


class Point(NamedTuple):
    """One call to be measured: an op of the conv2d family on an image."""

    channels: int
    outputs: int
    groups: int
    kernel: int
    stride: int
    batch: int
    size: int
    channels_last: bool

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.size**2 * self.outputs * self.channels / self.groups * self.kernel**2


# Parts of the grid: channels, outputs, groups, kernel and stride.
SHAPES: dict[str, list[tuple[int, int, int, int, int]]] = {
    "dense": [(c, o, 1, *window) for window in WINDOWS for c, o in DENSE] + [(c, o, 1, 1, 1) for c, o in WIDE],
    "few": [(c, o, 1, kernel, stride) for c, o in FEW for kernel, stride in ((3, 1), (5, 1), (7, 2))],  # stems, heads
    "narrow": [(c, o, 1, *window) for window in WINDOWS for c, o in NARROW],
    "depthwise": [(c, c, c, kernel, stride) for c in (64, 256) for kernel in (3, 5, 7) for stride in (1, 2)],
    "grouped": [(32 * width, 32 * width, 32, 3, stride) for width in (4, 8, 32) for stride in (1, 2)],
}


def points(device: str, parts: Iterable[str] = tuple(SHAPES)) -> Iterator[Point]:
    """The grid, or parts of it."""
    shapes = [shape for part in parts for shape in SHAPES[part]]
    for shape, (batch, size), last in itertools.product(shapes, MAPS, (False, True)):
        point = Point(*shape, batch, size, last)
        if point.flops <= MOST_FLOPS[device]:
            yield point


def calls(point: Point, dtype: torch.dtype, device: str) -> dict[str, tuple]:
    """Operands of the three ops for a point."""
    layout = torch.channels_last if point.channels_last else torch.contiguous_format
    pad = point.kernel // 2
    size = (point.size - 1) * point.stride + point.kernel - 2 * pad

    def made(*shape):
        return torch.randn(shape, device=device).to(dtype).to(memory_format=layout)

    input = made(point.batch, point.channels, size, size)
    weight = made(point.outputs, point.channels // point.groups, point.kernel, point.kernel)
    grad, bias = made(point.batch, point.outputs, point.size, point.size), torch.randn(point.outputs, device=device)
    geometry = ((point.stride,) * 2, (pad,) * 4, (1, 1), point.groups, 0, False)
    return {
        STEP: (input, weight, bias.to(dtype), None, *geometry, grad),
        "conv2d_fwd": (input, weight, bias.to(dtype), None, *geometry, 0, False),
        "conv2d_bwd_input": (grad, weight, input.shape, *geometry, point.channels_last),
        "conv2d_bwd_weight": (grad, input, weight.shape[2:], *geometry, True),
    }


PASSES = ("conv2d_fwd", "conv2d_bwd_input", "conv2d_bwd_weight")
STEP = "conv2d"
OPS = (*PASSES, STEP)


def _run(backend: str, name: str, operands: tuple) -> Callable[[], object]:
    entry = backends.entry(name, backend)
    return lambda: entry(*operands)


def _steps(input, weight, bias, residual, *rest) -> dict[str, Callable[[], object]]:
    """A training step of ours and one of torch's."""
    *geometry, grad = rest
    geometry = Geometry(*geometry)
    leaves = [t.detach().requires_grad_() for t in (input, weight, bias)]

    def ours():
        return torch.autograd.grad(convolve(Conv2d, *leaves, residual, geometry, None), leaves, grad)

    def theirs():
        return torch.autograd.grad(_conv2d_torch.conv2d(*leaves, geometry), leaves, grad)

    return {"cpu": ours, "library": theirs}


def _providers(name: str, operands: tuple, device: str) -> dict[str, Callable[[], object]]:
    if name == STEP:
        return _steps(*operands) if device == "cpu" else {}
    return {b: _run(b, name, operands) for b in CONTENDERS[device] if not backends.why_not(name, b)}


def _assert_same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    """Not a test of accuracy: the libraries' long float32 sums differ in more than roundings."""
    error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
    if not error <= (1e-4 if a.dtype is torch.float32 else 2e-2):
        raise AssertionError(f"{what}: the backends' results differ by {error:.1e}")


def measure(name: str, operands: tuple, dtype: torch.dtype, device: str, budget_s: float) -> choices.Row | None:
    """The row of one call, or None where only one backend can run it."""
    providers = _providers(name, operands, device)
    if len(providers) < 2:
        return None
    results = {backend: fn() for backend, fn in providers.items()}
    first, *others = results.values()
    for other in others:
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (first, other)), strict=True):
            _assert_same(a, b, f"{name} {dtype}")
    timer = harness.interleaved if device == "cpu" else _gpu.interleaved
    medians = {backend: statistics.median(times) for backend, times in timer(providers, budget_s).items()}
    default, best = next(iter(providers)), min(medians, key=medians.__getitem__)
    if medians[default] / medians[best] < WORTH_IT:
        best = default
    case = getattr(cases, "conv2d_fwd" if name == STEP else name)(*operands)
    ratio = round(medians[default] / medians[best], 2)
    sizes = " ".join(map(str, case.sizes))
    return choices.Row(name, str(dtype).removeprefix("torch."), case.category, sizes, best, ratio)


def _grid(options: argparse.Namespace) -> list[tuple[torch.dtype, Point]]:
    """What is to be measured, in the order in which it is: with a time limit one that is fair to all parts."""
    shapes = list(itertools.islice(points(options.device, options.part or SHAPES), None, None, options.every))
    grid = list(itertools.product(DTYPES[options.device], shapes))
    return sorted(grid, key=lambda at: zlib.crc32(str(at).encode())) if options.time_limit else grid


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.choose", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=choices.DIRECTORY)
    parser.add_argument("--budget", type=float, default=0.06, metavar="S", help="seconds of timing per call")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="measure every N-th point only")
    parser.add_argument("--part", choices=tuple(SHAPES), action="append", help="repeatable; the whole grid without")
    parser.add_argument("--op", choices=OPS, action="append", help="repeatable; the passes without")
    parser.add_argument("--time-limit", type=float, metavar="S", help="start no point in the last sixth of this time")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: dict[tuple, choices.Row] = {}
    stop = time.monotonic() + 5 / 6 * options.time_limit if options.time_limit else float("inf")
    left_out = failed = 0
    for dtype, point in _grid(options):
        if time.monotonic() > stop:
            left_out += 1
            continue
        operands = calls(point, dtype, options.device)
        for name in options.op or PASSES:
            try:
                row = measure(name, operands[name], dtype, options.device, options.budget)
            except Exception:  # a wrong result of one call does not hide those of the others
                print(f"FAILED: {name} {point} {dtype}\n{traceback.format_exc()}", flush=True)
                failed += 1
                continue
            if row is not None:
                rows.setdefault(row[:4], row)
    architecture = pynn.backends.cpu_isa if options.device == "cpu" else _gpu.architecture()
    measured = len(rows)
    if not measured:  # the table that is there is worth more
        print(f"nothing measured, {left_out} points left out (time limit), {failed} calls FAILED")
        return 1
    for row in choices.rows(architecture, options.out):
        if options.part or options.op or row.op == STEP:
            rows.setdefault(row[:4], row)
    # Rows of the default too: a call must not take another backend because of a row farther away.
    others = [row for row in rows.values() if row.backend != CONTENDERS[options.device][0]]
    options.out.mkdir(parents=True, exist_ok=True)
    path = choices.write(list(rows.values()), architecture, options.out)
    summary = f"{measured} calls measured; {len(others)} rows with a backend faster than the default: {path}"
    summary += f", {left_out} points left out (time limit)" if left_out else ""
    print(summary + (f", {failed} calls FAILED" if failed else ""))
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
