"""The benchmark harness: its GPU half with a stand-in for torch.cuda, its files, and its answers to wrong results."""

from __future__ import annotations

import csv
import functools
import statistics

import pytest
import torch

import bench._attention_gpu
import bench._conv2d_gpu
import bench.conv2d
import bench.diffusion
import bench.group_norm
import bench.scaled_dot_product_attention
import pynn
from bench import __main__ as command
from bench import _gpu, harness

EVENT_MS = 0.1


class FakeEvent:
    """Time passes by EVENT_MS with every call of the timed function."""

    clock = 0.0

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.clock

    def elapsed_time(self, end):
        return end.at - self.at


class FakeGraph:
    def replay(self):
        FakeEvent.clock += EVENT_MS / 2


class FakeContext:
    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def wait_stream(self, other):
        pass


@pytest.fixture
def fake_gpu(monkeypatch):
    """torch.cuda's functions that the harness uses, on CPU tensors."""
    cuda = {
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "graph": FakeContext,
        "stream": FakeContext,
        "Stream": FakeContext,
        "current_stream": FakeContext,
        "synchronize": lambda: None,
        "memory_allocated": lambda: 1_000_000,
        "max_memory_allocated": lambda: 3_000_000,
        "reset_peak_memory_stats": lambda: None,
        "get_device_name": lambda: "NVIDIA Fake 9000",
        "get_device_capability": lambda: (9, 0),
        "mem_get_info": lambda: (1 << 40, 1 << 40),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(_gpu, "flush_l2", lambda: None)
    monkeypatch.setattr(_gpu, "copy_bandwidth", lambda: 4e12)
    harness.device_name.cache_clear()
    yield
    harness.device_name.cache_clear()


def tick():
    FakeEvent.clock += EVENT_MS


def case(providers=None, check=lambda: None, device="cuda"):
    providers = providers or {"pynn cuda": tick, "torch": lambda: (tick(), tick()), "torch compile": tick}
    return harness.Case("op", "4x4", "float32", "forward", providers, check, bytes=2e8, device=device)


def test_gpu_rows(fake_gpu, capsys):
    rows = harness.run(case(), budget_s=0.01)
    assert [(row.provider, row.timing) for row in rows] == [
        (provider, timing) for timing in ("events", "graph") for provider in ("pynn cuda", "torch", "torch compile")
    ]
    events, eager = rows[0], rows[1]
    assert (events.p50_us, eager.p50_us) == (100.0, 200.0)
    assert (events.ratio_to_torch, eager.ratio_to_torch) == (1.0, 0.5)  # against the better of torch's two
    assert (events.device, events.instruction_set, events.threads) == ("nvidia-fake-9000", "sm_90", 0)
    assert (events.gb_per_s, events.copy_gb_per_s, events.copy_fraction) == (2000.0, 4000.0, 0.5)
    assert events.peak_mb == 2.0
    assert rows[3].p50_us == 50.0
    harness.report(rows)
    first = capsys.readouterr().out.splitlines()[1].split()
    assert first[-5:] == ["events", "100.0", "1.00", "2.00", "0.50"]  # x best of torch, x eager, of the copy


def test_long_ops_are_not_replayed(fake_gpu):
    def slow():
        FakeEvent.clock += 1.0

    rows = harness.run(case({"pynn cuda": slow, "torch": slow}), budget_s=0.01)
    assert [row.timing for row in rows] == ["events", "events"]


def test_a_provider_that_cannot_be_captured_costs_only_its_graph_row(fake_gpu, monkeypatch, capsys):
    def fails(fn):
        if fn is tick:
            raise RuntimeError("planted")
        return FakeGraph().replay

    monkeypatch.setattr(_gpu, "captured", fails)
    rows = harness.run(case({"pynn cuda": tick, "torch": lambda: tick()}), budget_s=0.01)
    assert [(row.provider, row.timing) for row in rows] == [
        ("pynn cuda", "events"),
        ("torch", "events"),
        ("torch", "graph"),
    ]
    assert "pynn cuda was not captured in a graph: planted" in capsys.readouterr().out


def test_rounds_rotate_the_order(fake_gpu):
    order = []
    names = "a", "b", "c"
    callables = {name: (lambda name=name: order.append(name)) for name in names}
    times = _gpu.interleaved(callables, budget_s=0.0)
    assert all(len(samples) == _gpu.MIN_ROUNDS for samples in times.values())
    rounds = order[3 * _gpu.WARM_UP_CALLS :]
    assert rounds[:9] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_copy_bandwidth_counts_reads_and_writes(fake_gpu, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(_gpu, "COPY_BYTES", 4000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    monkeypatch.setattr(_gpu, "interleaved", lambda callables, budget_s: {"copy": [callables["copy"]() is None, 2e-6]})
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **options: empty(*size, **options))
    monkeypatch.setattr(statistics, "median", lambda samples: samples[-1])
    _gpu.copy_bandwidth.cache_clear()
    assert _gpu.copy_bandwidth() == pytest.approx(4e9)
    _gpu.copy_bandwidth.cache_clear()


def test_a_wrong_result_is_not_timed(fake_gpu):
    def wrong():
        raise AssertionError("relative error 1")

    timed = []
    with pytest.raises(AssertionError, match="relative error"):
        harness.run(case({"torch": lambda: timed.append(1)}, wrong), budget_s=0.01)
    assert not timed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_cases_of_the_diffusion_ops(monkeypatch, dtype):
    """The GPU path of the cases on CPU tensors: providers, formulas and numerical checks, torch.compile included."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # Inductor takes a minute
    monkeypatch.setattr(_gpu, "BACKENDS", ("cpu",))
    problem = bench.diffusion._Problem((16, 3, 16, 16), dtype, "cpu")
    problem.device = "cuda"
    names = []
    for made in problem.cases():
        names.append(f"{made.op} {made.mode}")
        assert list(made.providers) == ["pynn cpu", "torch", "torch compile"]
        made.check()
        for provider in made.providers.values():
            assert provider().isfinite().all()
    assert names == [
        "forward_jump forward",
        "forward_step forward",
        "reverse_step forward",
        "diffusion_loss forward",
        "diffusion_loss forward+backward",
    ]
    torch.compiler.reset()


def test_gpu_cases_of_group_norm(monkeypatch):
    """As above."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(_gpu, "BACKENDS", ("cpu",))
    monkeypatch.setattr(bench.group_norm, "GPU_SHAPES", ((2, 16, 4, 4),))
    monkeypatch.setattr(bench.group_norm, "GPU", "cpu")
    modes = []
    for made in bench.group_norm.gpu_cases():
        modes.append(f"{made.dtype} {made.mode}")
        plain = ["pynn cpu", "torch", "torch compile"]
        assert list(made.providers) == [*plain, *(f"{name} channels_last" for name in plain)]
        made.check()
        for provider in made.providers.values():
            results = provider()
            assert all(result.isfinite().all() for result in (results if isinstance(results, tuple) else (results,)))
    kinds = "forward", "forward+backward"
    assert modes == [f"{dtype} {mode}" for dtype in ("float32", "bfloat16") for mode in kinds]
    torch.compiler.reset()


def test_gpu_cases_of_conv2d(monkeypatch):
    """As above."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(_gpu, "BACKENDS", ("cpu",))
    monkeypatch.setattr(bench._conv2d_gpu, "GPU", "cpu")
    small = bench._conv2d_gpu.Layer(2, 8, 16, 6, 3, activation="silu", residual=True)
    monkeypatch.setattr(bench._conv2d_gpu, "FUSED", (small, small._replace(groups=8, residual=False)))
    monkeypatch.setattr(bench._conv2d_gpu, "BARE", (small._replace(stride=2, activation=None, residual=False),))
    names = []
    for made in bench.conv2d.gpu_cases():
        names.append(f"{made.op} | {made.mode} | {', '.join(made.providers)}")
        made.check()
        for provider in made.providers.values():
            results = provider()
            assert all(result.isfinite().all() for result in (results if isinstance(results, tuple) else (results,)))
    plain = "pynn cpu, pynn library, torch"
    fused = ("conv2d fused silu + residual", "conv2d fused silu")
    assert names == [
        *(f"{op} | forward | {plain}, torch compile" for op in fused),
        f"conv2d | forward | {plain}",
        *(f"{op} | forward+backward | {plain}" for op in (*fused, "conv2d")),
    ]
    torch.compiler.reset()


def test_gpu_cases_of_attention(monkeypatch):
    """As above; the Gluon kernel is switched on for its provider alone."""
    configs = pytest.importorskip("pynn.triton_kernels.scaled_dot_product_attention_configs")
    switched = []

    def on(backend, fn, *args):
        switched.append((backend, configs.gluon_on_sm_90))
        with pynn.backend("cpu"):
            return fn(*args)

    monkeypatch.setattr(_gpu, "on", on)
    monkeypatch.setattr(_gpu, "backends_with", lambda kernel: ["cuda", "triton"])
    monkeypatch.setattr(_gpu, "architecture", lambda: "sm_90")
    monkeypatch.setattr(bench._attention_gpu, "GPU", "cpu")
    small = bench._attention_gpu.Problem(2, 4, 2, 40, 64, True)
    monkeypatch.setattr(bench._attention_gpu, "PROBLEMS", [small, small, small._replace(causal=False, key_heads=4)])
    names = []
    for made in bench.scaled_dot_product_attention.gpu_cases():
        names.append(f"{made.shape} | {made.mode}")
        assert list(made.providers) == ["pynn cuda", "pynn triton", "pynn gluon", "torch"]
        made.check()
        assert switched == [("cuda", False), ("triton", False), ("triton", True)]
        switched.clear()
    assert names == [
        *["2x4x40x64 kv2 causal | forward"] * 2,
        "2x4x40x64 | forward",
        "2x4x40x64 | forward+backward",
    ]
    assert not configs.gluon_on_sm_90


def test_the_checks_see_a_wrong_kernel(monkeypatch):
    problem = bench.diffusion._Problem((4, 3, 8, 8), torch.float32, "cpu")
    right = torch.ops.pynn.forward_jump_fwd.default
    monkeypatch.setattr(
        "pynn.backends.op", lambda name, tensor: lambda *args: tuple(part * 1.001 for part in right(*args))
    )
    with pytest.raises(AssertionError, match="forward_jump, cpu: relative error"):
        next(problem.cases()).check()
    with pytest.raises(AssertionError, match="standard deviation"):
        bench.diffusion.assert_standard_normal(torch.randn(10_000) * 1.1, "planted")


def test_old_files_gain_the_new_columns(tmp_path, fake_gpu):
    rows = harness.run(case(), budget_s=0.01)
    path = tmp_path / "nvidia-fake-9000.csv"
    path.write_text("op,shape,p50_us\nold,2x2,7.5\n")
    assert harness.save(rows, tmp_path) == [path]
    harness.save(rows, tmp_path)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 1 + 2 * len(rows)
    assert (read[0]["op"], read[0]["p50_us"], read[0]["timing"]) == ("old", "7.5", "")
    assert read[1]["timing"] == "events"
    path.write_text("op,surprise\nold,1\n")
    with pytest.raises(ValueError, match="surprise"):
        harness.save(rows, tmp_path)
    assert path.read_text() == "op,surprise\nold,1\n"


def test_command(tmp_path, monkeypatch, capsys):
    good = case({"pynn": lambda: None, "torch": lambda: None}, device="cpu")

    def wrong():
        raise AssertionError("planted error")

    bad = case({"torch": lambda: None}, wrong, device="cpu")
    monkeypatch.setattr(command, "_cases", lambda names, device, quick: iter([bad, good]))
    assert command.main(["--quick", "--save", "--out", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "planted error" in output
    assert output.splitlines()[-1] == f"1 cases measured, rows in {tmp_path}, 1 FAILED"
    monkeypatch.setattr(command, "_cases", lambda names, device, quick: iter([good, good]))
    assert command.main(["--quick", "--time-limit", "1000"]) == 0
    assert command.main(["--quick", "--time-limit", "-1"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 cases measured, 2 left out (time limit)"
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            command.main(["--device", "cuda"])
