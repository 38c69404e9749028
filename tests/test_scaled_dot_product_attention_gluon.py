"""The Gluon kernel of attention for sm_90: emulated on the CPU (gluon_emulation.py), and the same on such a GPU."""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from policy import LOW_PRECISION, assert_bitwise, assert_elementwise, assert_relative, integers
from test_scaled_dot_product_attention import magnitude

import pynn

pytest.importorskip("triton")
import gluon_emulation as emulation
from pynn.triton_kernels.scaled_dot_product_attention_launch import Problem, new_heads

from pynn.triton_kernels import scaled_dot_product_attention as triton_attention
from pynn.triton_kernels import scaled_dot_product_attention_configs as configs
from pynn.triton_kernels import scaled_dot_product_attention_gluon as gluon

KERNEL = "scaled_dot_product_attention_fwd"
PROGRAMS = 3  # fewer than the tiles of most tests: each stays for several of them


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the kernel runs; forward(query, key, value, right, lower_right, scale) -> out, lse, both on the CPU."""

    device: str
    forward: Callable


def problem(query, key, value, right=-1, lower_right=False, scale=None) -> Problem:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Problem(query, key, value, *[None] * 6, 0.0, -1, right, lower_right, scale, 0.0)


def arguments_of(p: Problem) -> list:
    """Of scaled_dot_product_attention_fwd."""
    return [getattr(p, field.name) for field in dataclasses.fields(p)]


def emulated(*arguments, module=gluon):
    """out and lse, and which tiles of 64 queries are spoiled; results start as NaN."""
    p = problem(*arguments)
    assert gluon.covers(p)
    out = new_heads(p.query, p.value.shape[-1]).fill_(math.nan)
    lse = p.query.new_full(p.query.shape[:-1], math.nan, dtype=torch.float32)
    with emulation.emulating(module, "gluon_forward_kernel"):
        return out, lse, module.forward(p, out, lse)


@pytest.fixture(params=["emulated", "triton"])
def place(request, monkeypatch):
    if request.param == "emulated":
        monkeypatch.setattr(configs, "processors", lambda device: PROGRAMS)
        return Place("cpu", lambda *arguments: emulated(*arguments)[:2])
    if reason := pynn.backends.why_not(KERNEL, "triton"):
        pytest.skip(f"triton: {reason}")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernel is for sm_90")

    def forward(*arguments):
        p = problem(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in arguments))
        assert gluon.covers(p)
        with configs.with_gluon():
            return tuple(t.cpu() for t in triton_attention.scaled_dot_product_attention_fwd(*arguments_of(p)))

    return Place("cuda", forward)


def reference(query, key, value, right=-1, lower_right=False, scale=None):
    """out, lse and the float64 weights of the formula; 0 and -inf for queries that see no key."""
    query, key, value = (t.double() for t in (query, key, value))
    if query.dim() > 2:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    queries, keys = scores.shape[-2:]
    if right >= 0:
        diagonal = keys - queries if lower_right else 0
        hidden = torch.arange(keys) > torch.arange(queries)[:, None] + diagonal + right
        scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.nan_to_num(neginf=0)[..., None]).exp()
    return weights @ value, lse


def operands(batch, heads, key_heads, queries, keys, dim, dtype):
    """Stored as (B, L, H, D)."""
    shapes = ((queries, heads), (keys, key_heads), (keys, key_heads))
    return [torch.randn(batch, length, count, dim).to(dtype).transpose(1, 2) for length, count in shapes]


GRID = [  # batch, heads, key heads, queries, keys, dim
    (2, 2, 2, 128, 128, 64),  # whole tiles
    (1, 4, 2, 200, 333, 64),  # tails of both
    (2, 3, 1, 70, 1100, 64),  # more tiles of keys than there is room for
    (1, 4, 4, 300, 40, 128),
    (2, 4, 2, 130, 520, 128),
    (1, 2, 1, 1, 129, 128),
]


@pytest.mark.parametrize("mask", ["full", "causal", "lower right", "right 70"])
@pytest.mark.parametrize("shape", GRID, ids=str)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_accuracy(place, dtype, shape, mask):
    """P1 and P3, without the grace of a torch kernel: the floor of rounding."""
    tensors = operands(*shape, dtype)
    options = {"full": (-1, False), "causal": (0, False), "lower right": (0, True), "right 70": (70, False)}[mask]
    out, lse = place.forward(*tensors, *options)
    truth, true_lse = reference(*tensors, *options)
    assert_relative(out, truth, what=mask)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=1e-6)
    if options[0] < 0:
        size = magnitude(*(t.double() for t in tensors))
        assert_elementwise(out, truth, size, shape[4] + shape[5], what=mask)
    blind = true_lse == -math.inf
    assert (out[blind] == 0).all()
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_exact(place, dtype):
    """P4: with zero queries every key weighs the same, so integer values give correctly rounded means."""
    query = torch.zeros(2, 2, 130, 64, dtype=dtype)
    key, value = (integers((2, 2, 300, 64), dtype) for _ in range(2))
    out, _ = place.forward(query, key, value)
    assert_bitwise(out, (value.double().sum(-2, keepdim=True) / 300).expand(2, 2, 130, 64).to(dtype))
    causal, _ = place.forward(query, key, value, 0)
    means = value.double().cumsum(-2)[..., :130, :] / torch.arange(1, 131)[:, None]
    assert_bitwise(causal, means.to(dtype))


def test_bitwise(place):
    """P5: the same bits in every layout, and for every slice of the batch."""
    tensors = operands(2, 2, 1, 140, 270, 64, torch.bfloat16)
    expected = place.forward(*tensors, 0)
    new = functools.partial(torch.zeros, dtype=torch.bfloat16, device=place.device)
    apart = [new(2, 300, 2, 3 * 64)[:, 3 : 3 + t.shape[2], : t.shape[1], 64:128] for t in tensors]
    odd = [new(t.numel() + 1)[1:].view(t.shape) for t in tensors]  # not at multiples of 16 bytes
    columns = [new(t.mT.shape).mT for t in tensors]
    views = [t.transpose(1, 2) for t in apart]
    for layout in (views, odd, columns):
        for view, t in zip(layout, tensors, strict=True):
            view.copy_(t)
        for got, wanted in zip(place.forward(*layout, 0), expected, strict=True):
            assert_bitwise(got, wanted)
    for got, wanted in zip(place.forward(*(t[1:] for t in tensors), 0), expected, strict=True):
        assert_bitwise(got, wanted[1:])


@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3)], ids=str)
def test_leading_dimensions(place, leading):
    query, key, value = (torch.randn(*leading, n, 64).half() for n in (33, 70, 70))
    out, lse = place.forward(query, key, value)
    truth, true_lse = reference(query, key, value)
    assert_relative(out, truth)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [40.0, 1e-9])
def test_scales(place, scale):
    """Weights that are nearly those of a maximum, and nearly equal ones."""
    tensors = operands(1, 2, 2, 66, 300, 64, torch.bfloat16)
    out, lse = place.forward(*tensors, 0, False, scale)
    truth, true_lse = reference(*tensors, 0, False, scale)
    assert_relative(out, truth)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=1e-6)


def test_nonfinite_values_that_are_not_seen(place):
    """P6: on a GPU the results of tiles that they spoil come from the other kernel; emulated, those tiles are told."""
    tensors = operands(1, 2, 2, 300, 300, 64, torch.bfloat16)
    clean = place.forward(*tensors, 0)[0]
    tensors[2][0, 1, 150] = math.nan
    out = place.forward(*tensors, 0)[0]
    assert_bitwise(out[:, 0], clean[:, 0])
    assert_bitwise(out[:, 1, :128], clean[:, 1, :128])
    assert out[0, 1, 150:].isnan().all()
    if place.device == "cpu":
        spoiled = emulated(*tensors, 0)[2]
        assert spoiled.tolist() == [[0] * 6, [0, 0, 1, 1, 1, 1]]  # the last: rows behind the end
    else:
        assert_relative(out[:, 1, :150], reference(*tensors, 0)[0][:, 1, :150])


def test_wanted_tiles(backend, monkeypatch):
    """The Triton kernel computes the tiles that are wanted, and no others."""
    if backend.name not in ("interpret", "triton"):
        pytest.skip("a kernel of Triton")
    query, key, value = (t.to(backend.device) for t in operands(1, 2, 2, 300, 300, 64, torch.bfloat16))
    wanted = torch.tensor([[0] * 6, [0, 0, 0, 1, 1, 0]], dtype=torch.int32, device=backend.device)

    def forward(p, out, lse):
        out.fill_(7), lse.fill_(7)
        return wanted

    p = problem(query, key, value, 0)
    expected = triton_attention.scaled_dot_product_attention_fwd(*arguments_of(p))
    monkeypatch.setattr(configs, "runs_gluon", lambda: True)
    monkeypatch.setattr(gluon, "forward", forward)
    got = triton_attention.scaled_dot_product_attention_fwd(*arguments_of(p))
    for a, b in zip(got, expected, strict=True):
        assert (a[:, 0] == 7).all()
        assert (a[:, 1, :128] == 7).all()
        assert_bitwise(a[:, 1, 128:300], b[:, 1, 128:300])


def test_what_it_covers():
    query, key, value = (torch.empty(1, 2, 8, 64, dtype=torch.half) for _ in range(3))
    assert gluon.covers(problem(query, key, value))
    assert not gluon.covers(problem(query.float(), key.float(), value.float()))
    assert not gluon.covers(problem(query, key, value[..., :32]))
    assert not gluon.covers(problem(query[..., :32], key[..., :32], value[..., :32]))
    for scale in (-1.0, 0.0, 1e-40, math.inf, math.nan):
        assert not gluon.covers(problem(query, key, value, scale=scale))
    for name in ("attn_mask", "dropout_key", "alibi_slopes", "sinks", "key_ranges"):
        assert not gluon.covers(dataclasses.replace(problem(query, key, value), **{name: query}))
    assert not gluon.covers(dataclasses.replace(problem(query, key, value), left=3))
    assert not gluon.covers(dataclasses.replace(problem(query, key, value), softcap=1.0))
    assert not configs.runs_gluon(), "it is switched on, so somebody has measured it: say so in bench/results/README.md"


# What the emulation must see: a change of the kernel's source, and the words of the error.
PLANTED = {
    "values released too early": (
        "acc, new_large, new_small = warpgroup_mma_wait(0, deps=(acc, new_large, new_small))\n"
        "    mbarrier.arrive(v_free.index(last), count=1)",
        "mbarrier.arrive(v_free.index(last), count=1)\n"
        "    acc, new_large, new_small = warpgroup_mma_wait(0, deps=(acc, new_large, new_small))",
        "may still be in use",
    ),
    "keys released too early": (
        "s = warpgroup_mma_wait(0, deps=(s,))\n            mbarrier.arrive(k_free.index(stage), count=1)",
        "mbarrier.arrive(k_free.index(stage), count=1)\n            s = warpgroup_mma_wait(0, deps=(s,))",
        "may still be in use",
    ),
    "values not waited for": (
        "mbarrier.wait(v_full.index(last), ((used - 1) // STAGES) & 1)",
        "pass",
        "before it has waited",
    ),
    "product not waited for": ("warpgroup_mma_wait(0 if CHECKED else 2,", "warpgroup_mma_wait(3,", "not waited for"),
    "no fence": ("fence_async_shared()\n        store_tile", "store_tile", "without a fence"),
    "no wait for the last copy": ("tma.store_wait(0)\n        o_tile", "o_tile", "may still be in use"),
    "wrong phase": ("free = ((used // STAGES) & 1) ^ 1", "free = (used // STAGES) & 1", "deadlock"),
    "never released": ("mbarrier.arrive(v_free.index(last), count=1)", "pass", "deadlock"),
    "released twice": (
        "mbarrier.arrive(v_free.index(last), count=1)",
        "mbarrier.arrive(v_free.index(last), count=3)",
        "once too often",
    ),
    "fewer bytes": (
        "mbarrier.expect(k_full.index(stage), COLS * DIM * 2)",
        "mbarrier.expect(k_full.index(stage), COLS * DIM)",
        "a copy of 16384 bytes",
    ),
    "more bytes": (
        "mbarrier.expect(k_full.index(stage), COLS * DIM * 2)",
        "mbarrier.expect(k_full.index(stage), COLS * DIM * 4)",
        "deadlock",
    ),
    "room not waited for": ("mbarrier.wait(k_free.index(stage), free)", "pass", "may still be in use"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_emulation_sees(bug, monkeypatch, tmp_path):
    before, after, message = PLANTED[bug]
    source = Path(gluon.__file__).read_text()
    assert before in source
    path = tmp_path / "broken.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location(f"{gluon.__package__}.broken", path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(configs, "processors", lambda device: 1)
    with pytest.raises(emulation.EmulationError, match=message):
        emulated(*operands(1, 4, 1, 200, 1200, 64, torch.half), module=broken)
