"""Installing, settings, autotuning, program order, and what the error messages say."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import triton_interpreter
from triton_interpreter.selftest import planted_bugs, planted_kernels
from triton_interpreter.settings import Settings

triton_interpreter.install()


def test_install_twice_is_harmless():
    builder = triton.runtime.interpreter.interpreter_builder
    triton_interpreter.install()
    assert triton.runtime.interpreter.interpreter_builder is builder


def test_install_refuses_an_unknown_version(monkeypatch):
    monkeypatch.setattr(triton_interpreter, "_installed", False)
    monkeypatch.setattr(triton, "__version__", "9.9.9")
    with pytest.raises(RuntimeError, match=r"triton 9.9.9: .* verified on .*3.7.1.*TRITON_INTERPRETER_ANY_VERSION"):
        triton_interpreter.install()


def test_settings_are_validated_and_restored():
    with pytest.raises(TypeError, match="unknown settings \\['order'\\]"), triton_interpreter.override(order="forward"):
        pass
    with pytest.raises(ValueError, match="'backward'"), triton_interpreter.override(program_order="backward"):
        pass
    assert triton_interpreter.settings == Settings()


@triton.jit
def record_order(out, counter):
    tl.store(out + tl.program_id(0) + 2 * tl.program_id(1), tl.atomic_add(counter, 1))


def test_program_order():
    orders = {}
    for order in ("forward", "reverse", "shuffled"):
        out = torch.empty(8, dtype=torch.int32)
        with triton_interpreter.override(program_order=order, seed=1):
            record_order[(2, 4)](out, torch.zeros(1, dtype=torch.int32))
        orders[order] = out.tolist()
    assert orders["forward"] == list(range(8))
    assert orders["reverse"] == list(range(8))[::-1]
    assert sorted(orders["shuffled"]) == list(range(8))
    assert orders["shuffled"] not in (orders["forward"], orders["reverse"])


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_races_are_found_in_every_order(order):
    races = [bug for bug in planted_bugs.BUGS if bug.error == "Race"]
    assert len(races) >= 8
    for bug in races:
        with triton_interpreter.override(program_order=order), pytest.raises(triton_interpreter.Race):
            bug.launch()


def test_races_of_an_argument_can_be_allowed():
    def launch():
        planted_kernels.add_without_atomic[(4,)](torch.ones(4), total)

    total = torch.zeros(1)
    with triton_interpreter.override(allowed_races={"add_without_atomic": {"total"}}):
        launch()
    assert total.item() == 4
    others = {"add_without_atomic": {"x"}, "other": {"total"}}
    with triton_interpreter.override(allowed_races=others), pytest.raises(triton_interpreter.Race):
        launch()
    with triton_interpreter.override(races=False):
        launch()


def test_extent_of_the_storage_can_be_allowed():
    x = torch.arange(128.0).view(2, 64)
    with triton_interpreter.override(extent="storage"):
        planted_kernels.copy_shifted[(1,)](x[0], out := torch.empty(64), 64, BLOCK=64)
        assert torch.equal(out, x[1])
        with pytest.raises(triton_interpreter.OutOfBounds, match="the storage behind"):
            planted_kernels.copy_shifted[(1,)](x[0], out, 65, BLOCK=64)


def test_poison_can_be_switched_off():
    with triton_interpreter.override(poison=False):
        planted_kernels.sum_without_other[(1,)](torch.ones(50), out := torch.empty(1), 50, BLOCK=64)
    assert out.item() == 50


# launches


def test_launch_arguments_are_checked():
    x = torch.ones(64)
    kernel = planted_kernels.copy_shifted
    with pytest.raises(TypeError, match=r"copy_shifted: unknown keyword arguments \['BLOK'\]"):
        kernel[(1,)](x, x.clone(), 0, BLOCK=64, BLOK=32)
    kernel[(1,)](x, x.clone(), 0, BLOCK=64, num_warps=8, enable_fp_fusion=False)
    with pytest.raises(ValueError, match=r"grid dimension 1 must be 0 to 65535, got 65536"):
        kernel[(1, 65536)](x, x.clone(), 0, BLOCK=64)
    pattern = r"copy_shifted, converting its arguments: .*argument 'x' is on meta"
    with pytest.raises(triton_interpreter.KernelFailed, match=pattern):
        kernel[(1,)](x.to("meta"), x.clone(), 0, BLOCK=64)
    kernel[(0,)](x, x.clone(), 1000, BLOCK=64)


@triton.jit
def fails_inside(x, n):
    tl.static_assert(n < 4, "too large")


@triton.jit
def calls_failing(x, BLOCK: tl.constexpr):
    fails_inside(x, BLOCK)


def test_errors_name_the_line_of_the_kernel():
    line = fails_inside.fn.__code__.co_firstlineno + 2
    pattern = rf"calls_failing, program \(0, 0, 0\), line {line} of check_machinery.py: .*too large"
    with pytest.raises(triton_interpreter.KernelFailed, match=pattern):
        calls_failing[(2,)](torch.ones(1), BLOCK=8)
    planted_kernels.copy_shifted[(1,)](torch.ones(64), torch.empty(64), 0, BLOCK=64)  # the next launch is unaffected


def test_the_language_is_left_unpatched():
    before = dict(vars(tl))
    planted_kernels.copy_shifted[(1,)](torch.ones(64), torch.empty(64), 0, BLOCK=64)
    assert dict(vars(tl)) == before
    with pytest.raises(triton_interpreter.OutOfBounds):
        planted_kernels.copy_shifted[(1,)](torch.ones(64), torch.empty(64), 1, BLOCK=64)
    assert dict(vars(tl)) == before


# autotune

HOOKS: list[int] = []


def only_small_blocks(configs, named_args, **kwargs):
    return [config for config in configs if config.kwargs["BLOCK"] <= named_args["n"]]


@triton.autotune(
    [triton.Config({"BLOCK": size}, pre_hook=lambda args: HOOKS.append(args["BLOCK"])) for size in (16, 32, 64, 256)],
    key=["n"],
    prune_configs_by={"early_config_prune": only_small_blocks},
)
@triton.jit
def increment(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n, other=0.0) + 1.0, mask=i < n)


def grid(meta):
    return (triton.cdiv(meta["n"], meta["BLOCK"]),)


def test_every_configuration_runs_once_on_the_same_memory():
    HOOKS.clear()
    x = torch.arange(100.0)
    increment[grid](x, 100)
    assert HOOKS == [16, 32, 64]  # 256 is pruned
    assert torch.equal(x, torch.arange(100.0) + 1)  # not + 3
    HOOKS.clear()
    with triton_interpreter.override(autotune="first"):
        increment[grid](x, 100)
    assert HOOKS == [16]
    assert torch.equal(x, torch.arange(100.0) + 2)


@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 256})], key=[])
@triton.jit
def sum_in_blocks(x, out, n, BLOCK: tl.constexpr):
    total = 0.0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x + i, mask=i < n, other=0.0), axis=0)
    tl.store(out, total)


def test_configurations_may_differ_by_rounding_unless_bitwise_equality_is_asked_for():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    sum_in_blocks[(1,)](x, out := torch.empty(1), 1000)
    torch.testing.assert_close(out[0], x.sum(), atol=1e-4, rtol=1e-4)
    differs = pytest.raises(triton_interpreter.ConfigMismatch, match="1 of 1 elements differ")
    with triton_interpreter.override(autotune_compare="bitwise"), differs:
        sum_in_blocks[(1,)](x, out, 1000)


def test_an_error_names_the_configuration():
    with pytest.raises(triton_interpreter.OutOfBounds, match=r"\[autotune configuration BLOCK: 16,"):
        increment[(8,)](torch.zeros(100)[:90], 100)
