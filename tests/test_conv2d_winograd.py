"""conv2d's Winograd path on the CPU (fp32, 3 x 3, stride 1): error, exactness, tails, layouts, threads, infinities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adversary import Canary, layouts
from policy import (
    assert_bitwise,
    assert_elementwise,
    assert_nonfinite,
    assert_relative,
    integers,
    run,
    threads,
    truth_of,
)

from pynn.ops.conv2d import conv2d

pytestmark = pytest.mark.usefixtures("cpu_kernels")


LAST = torch.channels_last

# batch, in channels, out channels, height, width, padding: odd sizes, channels that fill no vector, large sums, borders
SHAPES = [
    (4, 32, 32, 8, 8, 1),
    (2, 64, 64, 14, 14, 1),
    (3, 17, 35, 9, 11, 1),
    (2, 40, 16, 12, 7, (2, 0)),
    (2, 24, 48, 10, 10, 0),
    (1, 16, 16, 33, 65, 2),
    (2, 300, 20, 8, 9, 1),
    (2, 520, 33, 7, 7, 1),
]


def reference(x, w, b=None, *, padding):
    return F.conv2d(x, w, b, padding=padding)


def ours(x, w, b=None, *, padding):
    return conv2d(x, w, b, padding=padding)


def operands(shape, make=torch.randn):
    batch, channels, outputs, height, width, padding = shape
    x, w, b = make((batch, channels, height, width)), make((outputs, channels, 3, 3)), make((outputs,))
    return x, w, b, make(F.conv2d(x[:, :1], w[:, :1], padding=padding).shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_no_larger_than_torchs(shape):
    x, w, b, dy = operands(shape)
    padding = shape[-1]
    y0, g0 = truth_of(lambda *t: reference(*t, padding=padding), x, w, b, grad_output=dy)
    peers = [
        run(lambda *t: reference(*t, padding=padding), a, w, b, grad_output=dy) for a in (x, x.to(memory_format=LAST))
    ]
    y, g = run(lambda *t: ours(*t, padding=padding), x, w, b, grad_output=dy)
    assert_relative(y, y0, [p[0] for p in peers], what="output")
    assert_relative(g[0], g0[0], [p[1][0] for p in peers], kind="gradient", what="gradient of input")
    sizes, gradient_sizes = truth_of(
        lambda *t: reference(*t, padding=padding), x.abs(), w.abs(), b.abs(), grad_output=dy.abs()
    )
    assert_elementwise(y, y0, sizes, w[0].numel() + 1, "output")
    assert_elementwise(g[0], g0[0], gradient_sizes[0], w[:, 0].numel(), "gradient of input")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_on_integers(shape):
    x, w, b, dy = operands(shape, lambda s: integers(s, low=-2, high=2))
    y0, g0 = truth_of(lambda *t: reference(*t, padding=shape[-1]), x, w, b, grad_output=dy)
    for memory_format in (torch.contiguous_format, LAST):
        y, g = run(lambda *t: ours(*t, padding=shape[-1]), x.to(memory_format=memory_format), w, b, grad_output=dy)
        assert_bitwise(y, y0.float(), "output")
        assert_bitwise(g[0], g0[0].float(), "gradient of input")


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], (5, 32, 32, 40, 40, 1)], ids=str)
def test_same_bits(shape):
    """Runs, threads, batch slices and layouts."""
    x, w, b, dy = operands((5, *shape[1:]))
    fn = lambda *t: ours(*t, padding=1)  # noqa: E731
    y, g = run(fn, x, w, b, grad_output=dy)
    for count in (1, 2, 3):
        with threads(count):
            again, gradients = run(fn, x, w, b, grad_output=dy)
        assert_bitwise(again, y, f"{count} threads")
        assert_bitwise(gradients[0], g[0], f"{count} threads")
    for first, last in ((0, 1), (1, 4), (4, 5)):
        again, gradients = run(fn, x[first:last], w, b, grad_output=dy[first:last])
        assert_bitwise(again, y[first:last], "batch slice")
        assert_bitwise(gradients[0], g[0][first:last], "gradient of a batch slice")
    for name, tensor in layouts(x):
        assert_bitwise(ours(tensor, w, b, padding=1), y, f"input {name}")
    for name, tensor in layouts(w):
        assert_bitwise(ours(x, tensor, b, padding=1), y, f"weight {name}")
    for name, tensor in layouts(dy):
        assert_bitwise(run(fn, x, w, b, grad_output=tensor)[1][0], g[0], f"grad_output {name}")


def test_nothing_else_written():
    x, w, b, dy = operands((2, 19, 21, 9, 11, 1))
    cages = [Canary(t) for t in (x, w, b, dy)]
    fn = lambda *t: ours(*t, padding=1)  # noqa: E731
    y, g = run(fn, *(c.tensor for c in cages[:3]), grad_output=cages[3].tensor)
    y0, g0 = run(fn, x, w, b, grad_output=dy)
    for cage in cages:
        cage.assert_untouched()
    assert_bitwise(y, y0, "output")
    assert_bitwise(g[0], g0[0], "gradient")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_nonfinite_values_reach_their_own_pixels_only(bad):
    x, w, b, dy = operands((3, 20, 36, 9, 10, 1))
    clean, clean_gradients = run(lambda *t: ours(*t, padding=1), x, w, b, grad_output=dy)
    y0, g0 = truth_of(lambda *t: reference(*t, padding=1), x, w, b, grad_output=dy)
    x[0, 3, 4, 4] = x[0, 4, 0, 0] = x[1, 19, 8, 9] = bad
    dy[0, 35, 3, 4] = dy[1, 0, 8, 0] = bad
    y, _ = run(lambda *t: ours(*t, padding=1), x, w, b)
    truth, _ = truth_of(lambda *t: reference(*t, padding=1), x, w, b)
    assert_nonfinite(y, truth.float(), "output")
    _, g = run(lambda *t: ours(*t, padding=1), x, w, b, grad_output=dy)
    _, true_g = truth_of(lambda *t: reference(*t, padding=1), x, w, b, grad_output=dy)
    assert_nonfinite(g[0], true_g[0].float(), "gradient")
    for got, whole, want in ((y, clean, y0), (g[0], clean_gradients[0], g0[0])):
        assert_bitwise(got[2], whole[2], "an image without them")
        near = (got - want).abs() < 1e-4 * want.abs().max()  # their neighbours keep their values
        assert int((~near).sum()) <= 9 * 3 * got.shape[1]
    w[3, 2, 1, 1] = bad
    truth, _ = truth_of(lambda *t: reference(*t, padding=1), x[2:], w, b)
    assert_nonfinite(ours(x[2:], w, b, padding=1), truth.float(), "a filter")
