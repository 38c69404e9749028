"""The library backend of conv2d, and how `auto` chooses: tables, nearest rows, eager and traced calls."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from conv2d_reference import FUNCTIONS, LAYERS, SAMPLES, on, operands, ours, output_like, reference
from policy import relative_error, run, truth_of

import bench.choose
import pynn
from pynn import choices
from pynn.ops import _conv2d_layout, _conv2d_library
from pynn.ops.conv2d import ACTIVATIONS

MODES = ("constant", "reflect", "replicate", "circular")
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 5e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 0.2},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sample", range(len(LAYERS) + len(SAMPLES)))
def test_library(sample, dtype):
    shape, weight_shape, geometry = (LAYERS + SAMPLES)[sample]
    x, w, b = operands(shape, weight_shape, dtype)
    dy = torch.randn(output_like(x, w, **geometry).shape).to(dtype)
    r = torch.randn(dy.shape[1], 1, 1).to(dtype)
    activation = ACTIVATIONS[sample % len(ACTIVATIONS)]
    y0, g0 = truth_of(lambda *t: reference(*t, activation, **geometry), x, w, b, r, grad_output=dy)
    with pynn.backend("library"), pynn.explain() as seen:
        y, g = run(lambda *t: ours(*t, activation, **geometry), x, w, b, r, grad_output=dy)
    assert {call.backend for call in seen if call.op.startswith("conv2d_")} == {"library"}
    # The numerics are torch's own; this finds wrong operands.
    for got, truth in zip((y, *g), (y0, *g0), strict=True):
        assert relative_error(got, truth) < {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 0.05}[dtype]


@pytest.mark.parametrize("mode", range(len(MODES)))
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 1, 1, 2), (2, 0, 3, 1)])
def test_library_padding(mode, padding):
    x, w, b = operands((2, 8, 9, 7), (6, 8, 3, 3), torch.float64)
    top, left, bottom, right = padding
    ops, geometry = torch.ops.pynn_library, ((1, 1), padding, (1, 1), 1, mode, False)

    def padded(x, w):
        return F.conv2d(F.pad(x, (left, right, top, bottom), mode=MODES[mode]), w)

    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=memory_format)
        last = memory_format is torch.channels_last
        z = padded(x, w) + b.view(-1, 1, 1)
        y, pre = ops.conv2d_fwd(x, w, b, None, *geometry, ACTIVATIONS.index("silu"), True)
        torch.testing.assert_close((y, pre), (FUNCTIONS["silu"](z), z))
        assert y.is_contiguous(memory_format=memory_format)
        dy = torch.randn_like(z)
        dx0, dw0 = torch.autograd.grad(padded(*(leaves := [x.requires_grad_(), w.requires_grad_()])), leaves, dy)
        x, w = x.detach(), w.detach()
        dx = ops.conv2d_bwd_input(dy, w, x.shape, *geometry, last)
        assert dx.is_contiguous(memory_format=memory_format)
        dw, db = ops.conv2d_bwd_weight(dy, x, (3, 3), *geometry, True)
        torch.testing.assert_close((dx, dw, db), (dx0, dw0, dy.sum((0, 2, 3))))


def test_library_validates():
    x, w, _ = operands((2, 4, 5, 5), (6, 3, 3, 3))
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4 channels instead"), pynn.backend("library"):
        ours(x, w)


KERNEL = "conv2d_epilogue"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(backend, activation, dtype):
    for memory_format, in_place in itertools.product((torch.contiguous_format, torch.channels_last), (False, True)):
        for shape, r_shape in (((2, 40, 3, 5), (2, 40, 3, 5)), ((3, 5, 4, 37), (3, 1, 4, 1)), ((1, 3, 2, 60), None)):
            sum = torch.randn(shape).to(dtype).to(memory_format=memory_format)
            b = torch.randn(shape[1]).to(dtype)
            r = None if r_shape is None else torch.randn(r_shape).to(dtype)
            z = sum.double() + b.double().view(-1, 1, 1) + (0 if r is None else r.double())
            output = None if in_place else torch.empty_like(sum)
            sum, b, r, output = on(backend, sum, b, r, output)
            backend.ops.conv2d_epilogue(sum, b, r, ACTIVATIONS.index(activation), output)
            torch.testing.assert_close(
                (sum if in_place else output).cpu().double(), FUNCTIONS[activation](z), **TOLERANCE[dtype]
            )
            if not in_place:
                torch.testing.assert_close(sum.cpu().double(), z, **TOLERANCE[dtype])


def test_epilogue_errors():
    def call(sum, b=None, r=None, activation=0, output=None):
        torch.ops.pynn.conv2d_epilogue(sum, b, r, activation, output)

    sum = torch.randn(2, 4, 3, 3)
    for arguments, message in (
        ({"sum": sum[0]}, "sum"),
        ({"sum": sum[:, ::2]}, "contiguous or channels last"),
        ({"sum": sum[:, :1].expand(2, 4, 3, 3)}, "contiguous or channels last"),
        ({"sum": sum.int()}, "float64, float32"),
        ({"sum": sum, "b": torch.randn(3)}, "bias"),
        ({"sum": sum, "b": torch.randn(4).double()}, "bias"),
        ({"sum": sum, "r": torch.randn(2, 4, 3, 2)}, "residual"),
        ({"sum": sum, "r": torch.randn(4, 3, 3)}, "residual"),
        ({"sum": sum, "activation": 8}, "activation"),
        ({"sum": sum, "activation": -1}, "activation"),
        ({"sum": sum, "output": torch.empty(2, 4, 3, 4)}, "output"),
        ({"sum": sum, "output": torch.empty(2, 4, 3, 3).to(memory_format=torch.channels_last)}, "output"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)


def row(op, category, sizes, backend):
    return choices.Row(op, "float32", category, sizes, backend, 1.5)


def test_nearest_row(tmp_path):
    rows = [
        row("f", "k3x3", "64 64 1000", "library"),
        row("f", "k3x3", "128 64 1000", "cpu"),
        row("f", "k1x1", "64 64 1000", "cpu"),
    ]
    choices.write(rows, "isa", tmp_path)
    table = choices.read("isa", tmp_path)

    def nearest(category, *sizes, op="f", dtype="float32"):
        return choices.nearest(table, op, dtype, choices.Case(category, sizes))

    assert nearest("k3x3", 64, 64, 1000) == "library"
    assert nearest("k3x3", 80, 64, 1200) == "library"
    assert nearest("k3x3", 100, 64, 1000) == "cpu"
    assert nearest("k3x3", 64, 64, 2100) is None  # further than a factor of two
    assert nearest("k3x3", 16, 64, 1000) is None
    assert nearest("k1x1", 64, 64, 1000) == "cpu"
    assert nearest("k5x5", 64, 64, 1000) is None
    assert nearest("k3x3", 64, 64, 1000, op="g") is None
    assert nearest("k3x3", 64, 64, 1000, dtype="bfloat16") is None
    assert nearest("k3x3", 64, 64, 0) is None
    assert choices.read("another", tmp_path) == {}


@pytest.mark.parametrize("path", sorted(choices.DIRECTORY.glob("*.csv")), ids=lambda path: path.stem)
def test_committed_tables(path):
    table = choices.read(path.stem)
    assert table
    for (op, dtype, _), rows in table.items():
        assert op in bench.choose.OPS
        assert hasattr(torch, dtype)
        assert {backend for _, backend in rows} <= set(pynn.backends.BACKENDS) - {"auto", "sim", "interpret"}


@pytest.fixture
def library_is_fastest(monkeypatch):
    monkeypatch.setattr(choices, "fastest", lambda architecture, op, dtype, case: "library")


def test_auto_follows_the_table(library_is_fastest):
    x, w, b = operands((2, 4, 6, 6), (6, 4, 3, 3))
    with pynn.explain() as seen:
        y, _ = run(lambda *t: ours(*t, None, "silu", padding=1), x, w, b, grad_output=torch.ones(2, 6, 6, 6))
    torch.testing.assert_close(y, reference(x, w, b, None, "silu", padding=1))
    chosen = {call.op: (call.backend, call.reason) for call in seen}
    for op in ("conv2d_fwd", "conv2d_bwd_input", "conv2d_bwd_weight"):
        assert chosen[op] == ("library", "measured fastest")
    assert chosen["conv2d_bwd_activation"][0] == "cpu"
    with pynn.explain() as seen, pynn.backend("cpu"):
        ours(x, w, b)
    assert [(call.backend, call.reason) for call in seen] == [("cpu", "forced")]
    with pynn.explain() as seen:
        ours(x, w, b, padding="same", dilation=2)  # symmetric
        ours(x, torch.randn(6, 4, 2, 2), b, padding="same")  # the library would copy the image
    assert [call.backend for call in seen] == ["library", "cpu"]


def test_a_measured_library_says_what_is_wrong(library_is_fastest):
    """Chosen from the table it runs without our validation."""
    x, w, b = operands((2, 4, 6, 6), (6, 4, 3, 3))
    assert ours(x, w, b, torch.randn(6, 1, 1), "silu", padding=1).shape == (2, 6, 6, 6)
    for call, message in (
        (lambda: ours(x, w[:, :3], b), "to have 3 channels, but got 4 channels instead"),
        (lambda: ours(x, w, b[:5]), "bias"),
        (lambda: ours(x, w, b.double()), "type"),
        (lambda: ours(x, w.double(), b), "type|dtype"),
        (lambda: ours(x, w, b, padding=-1), "negative padding"),
        (lambda: ours(x, w, b, dilation=9), "Kernel size can't be greater than actual input size"),
        (lambda: ours(x, w, b, torch.randn(6, 3, 4)), "residual"),
        (lambda: ours(x, w, b, torch.randn(1, 1, 1, 1, 1)), "residual"),
        (lambda: ours(x, w, b, torch.randn(6, 1, 1).double()), "residual"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_traced_calls_choose_when_they_run(library_is_fastest):
    x, w, b = operands((2, 4, 6, 6), (6, 4, 3, 3))
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: ours(*t, padding=1), fullgraph=True, backend=keep, dynamic=True)
    with pynn.explain() as seen:
        y = compiled(x, w, b)
    torch.testing.assert_close(y, reference(x, w, b, padding=1))
    assert "pynn_auto" in graphs[0].print_readable(print_output=False)
    assert [call.backend for call in seen] == ["library"]
    torch._dynamo.reset()


def test_a_training_step_that_is_fastest_in_torch(library_is_fastest):
    """It is torch's whole: one node of torch's autograd, whose derivatives of every order are torch's."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x, w, b = (t.requires_grad_() for t in operands((2, 4, 6, 6), (6, 4, 3, 3), torch.float64))
        x = x.detach().to(memory_format=layout).requires_grad_()
        with pynn.explain() as seen:
            y = ours(x, w, b, padding="same")
        assert [(call.op, call.backend, call.reason) for call in seen] == [("conv2d", "library", "measured fastest")]
        assert y.is_contiguous(memory_format=layout)
        torch.testing.assert_close(y, F.conv2d(x, w, b, padding=1))
        for others in ({}, {"bias": None}):
            leaves = [t for t in (x, w, others.get("bias", b)) if t is not None]
            assert torch.autograd.gradcheck(lambda *t: ours(*t, padding=1), leaves, fast_mode=True)
            assert torch.autograd.gradgradcheck(lambda *t: ours(*t, padding=1), leaves, fast_mode=True)
    torch.testing.assert_close(
        torch.func.grad(lambda x: ours(x, w, b).sum())(x), torch.autograd.grad(F.conv2d(x, w, b).sum(), x)[0]
    )

    def recorded(*tensors, **options):
        with pynn.explain() as seen:
            ours(*tensors, **options)
        return [call.op for call in seen]

    for tensors, options in (
        ((x.detach(), w, b), {}),  # no gradient of the input
        ((x, w, b, None, "relu"), {}),
        ((x, w, b, torch.ones(6, 1, 1).double()), {}),
        ((x[0], w, b), {}),
        ((x, w, b), {"padding": 1, "padding_mode": "reflect"}),
    ):
        assert recorded(*tensors, **options) == ["conv2d_fwd"]
    with torch.no_grad():
        assert recorded(x, w, b) == ["conv2d_fwd"]
    with pynn.backend("cpu"):
        assert recorded(x, w, b) == ["conv2d_fwd"]


def test_without_a_measurement_the_default_runs(monkeypatch):
    monkeypatch.setattr(choices, "fastest", lambda *_: None)
    x, w, _ = operands((2, 4, 6, 6), (6, 4, 3, 3))
    with pynn.explain() as seen:
        ours(x, w)
    assert [call.backend for call in seen] == ["cpu"]


def test_choose_measures_and_writes(tmp_path, monkeypatch, capsys):
    small = [bench.choose.Point(8, 8, 1, 3, 1, 2, 5, False), bench.choose.Point(8, 8, 8, 3, 2, 2, 4, True)]
    monkeypatch.setattr(bench.choose, "points", lambda device, parts: iter(small))
    monkeypatch.setattr(bench.choose, "WORTH_IT", 0.0)  # whatever is faster, rows are written
    assert bench.choose.main(["--out", str(tmp_path), "--budget", "0.001"]) == 0
    assert "12 calls measured" in capsys.readouterr().out
    for (op, dtype, category), rows in choices.read(pynn.backends.cpu_isa, tmp_path).items():
        assert op in bench.choose.OPS
        assert dtype in ("float32", "bfloat16")
        assert category in ("dense k3x3 s1x1 d1x1 NCHW", "depthwise k3x3 s2x2 d1x1 NHWC")
        assert {backend for _, backend in rows} <= {"cpu", "library"}
    whole = choices.rows(pynn.backends.cpu_isa, tmp_path)
    small[:] = [bench.choose.Point(8, 8, 1, 3, 1, 2, 9, False)]  # beside the rows of other calls
    assert bench.choose.main(["--part", "dense", "--out", str(tmp_path), "--budget", "0.001"]) == 0
    assert "6 calls measured" in capsys.readouterr().out
    assert bench.choose.main(["--op", "conv2d", "--out", str(tmp_path), "--budget", "0.001"]) == 0
    assert "2 calls measured" in capsys.readouterr().out
    assert len(choices.rows(pynn.backends.cpu_isa, tmp_path)) == len(whole) + 8
    assert set(whole) <= set(choices.rows(pynn.backends.cpu_isa, tmp_path))
    monkeypatch.setattr(bench.choose, "_run", lambda backend, name, operands: lambda: torch.randn(3, 3))
    capsys.readouterr()
    assert bench.choose.main(["--out", str(tmp_path)]) == 1
    assert "the backends' results differ" in capsys.readouterr().out


def test_choose_goes_on_after_a_failure_and_ends_in_time(tmp_path, monkeypatch, capsys):
    small = [bench.choose.Point(8, 8, 1, 3, 1, 2, 5, False), bench.choose.Point(8, 8, 8, 3, 2, 2, 4, True)]
    monkeypatch.setattr(bench.choose, "points", lambda device, parts: iter(small))
    row = choices.Row("conv2d_fwd", "float32", "kernel", "8 8", "cpu", 1.0)

    def measure(name, operands, dtype, device, budget_s):
        if name == "conv2d_bwd_input":
            raise RuntimeError("an illegal memory access")
        return row._replace(op=name)

    monkeypatch.setattr(bench.choose, "measure", measure)
    assert bench.choose.main(["--out", str(tmp_path), "--time-limit", "60"]) == 1
    said = capsys.readouterr().out
    assert "an illegal memory access" in said
    assert "2 calls measured" in said
    assert "4 calls FAILED" in said
    written = (tmp_path / f"{pynn.backends.cpu_isa}.csv").read_text()
    assert bench.choose.main(["--out", str(tmp_path), "--time-limit", "1e-9"]) == 1
    assert "nothing measured, 4 points left out" in capsys.readouterr().out
    assert (tmp_path / f"{pynn.backends.cpu_isa}.csv").read_text() == written


@pytest.fixture
def settings():
    """torch's settings of float32 precision, put back afterwards."""
    of = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [setting.fp32_precision for setting in of]
    yield of
    for setting, value in zip(of, before, strict=True):
        setting.fp32_precision = value


def test_what_allows_tf32(settings):
    """torch.get_float32_matmul_precision raises once the newer setting has been used."""
    matmul, _ = settings
    for precision, allowed in (("ieee", False), ("tf32", True), ("ieee", False)):
        matmul.fp32_precision = precision
        assert _conv2d_layout.allows_tf32() is allowed
    for precision, allowed in (("high", True), ("medium", True), ("highest", False)):
        torch.set_float32_matmul_precision(precision)
        assert _conv2d_layout.allows_tf32() is allowed


def test_a_traced_call_follows_the_setting(settings):
    matmul, _ = settings
    ours = torch.compile(lambda x: x + int(_conv2d_layout.allows_tf32()), fullgraph=True, backend="eager")
    for precision, expected in (("ieee", 0), ("tf32", 1), ("ieee", 0)):
        matmul.fp32_precision = precision
        assert ours(torch.zeros(())) == expected


@pytest.mark.parametrize("before", ["ieee", "tf32", "none"])
@pytest.mark.parametrize("allowed", [False, True])
def test_precision_of_the_library(settings, before, allowed):
    """Of convolutions alone, whatever is set for recurrent layers."""
    _, conv = settings
    conv.fp32_precision = before
    on_a_gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.float32)
    with _conv2d_library._precision(on_a_gpu, allowed):
        assert conv.fp32_precision == ("tf32" if allowed else "ieee")
        F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))  # torch looks at it on a CPU too
    assert conv.fp32_precision == before
