"""lstm, gru and rnn: values, gradients, lengths, directions, determinism, transforms and rejected input."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from adversary import Canary, constant, layouts
from bad_input import assert_rejects
from generated import generated
from hypothesis import strategies as st
from policy import DTYPES, LOW_PRECISION, assert_bitwise, integers, threads
from recurrent_reference import (
    GATES,
    assert_errors_are_no_larger_than_torchs,
    gradients,
    make,
    ours,
    reference,
    seeds,
)
from transforms import assert_all

import pynn
from pynn.ops.recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell

# Times torch's own error: (results, gradients). In float32 both are sums in some order, and as good: chance decides.
KERNEL = "lstm_fwd"
CELLS = ("lstm", "gru", "rnn")
VARIANTS = [  # cell, options
    *((cell, {}) for cell in CELLS),
    *((cell, {"lengths": [2, 5, 1], "reverse": reverse}) for cell in CELLS for reverse in (False, True)),
    *((cell, {"bias": False, "reverse": True}) for cell in CELLS),
    *((cell, {"projected_input": True, "lengths": [5, 0, 3]}) for cell in CELLS),
    ("lstm", {"proj": 3}),
    ("lstm", {"proj": 2, "lengths": [4, 0, 5], "reverse": True, "bias": False}),
    ("rnn", {"relu": True, "lengths": [0, 5, 2]}),
]


def assert_close(got, expected, dtype, what):
    """Within a few roundings of dtype per step, relative to the largest value."""
    eps = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    largest = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=0, atol=eps * (1 + largest), msg=lambda m: f"{what}: {m}"
    )


def assert_matches_reference(p, dtype, grads=None):
    grads = seeds(p) if grads is None else grads
    results, got = gradients(ours, p, grads)
    # Rounding may carry what a relu gets to the other side of 0: gradients are compared for the side the op took.
    sided = functools.partial(reference, positive=results[0].detach() > 0) if p.relu else reference
    wide = p.to(dtype=torch.float64)
    truth, expected = gradients(sided, wide, grads)
    truth = reference(wide) if p.relu else truth
    for i, (a, b) in enumerate(zip(results, truth, strict=True)):
        assert_close(a, b, dtype, f"result {i}")
    for name in got:
        want = torch.zeros_like(got[name]) if expected[name] is None else expected[name]
        assert_close(got[name], want, dtype, f"gradient of {name}")


@pytest.mark.parametrize(("cell", "options"), VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_formulas(backend, dtype, cell, options):
    assert_matches_reference(make(cell, dtype=dtype, **options).to(backend.device), dtype)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_error_is_no_larger_than_torchs(backend, dtype, cell):
    """P1, over several problems together: chance in one result does not decide."""
    small = backend.name in ("sim", "interpret")
    shapes = [(7, 3, 9, 17), (4, 2, 5, 12)] * 3 if small else [(40, 8, 32, 64), (64, 4, 20, 48), (17, 9, 33, 25)]
    problems = (
        make(cell, *shape, dtype=dtype, reverse=reverse).to(backend.device)
        for shape, reverse in itertools.product(shapes, (False, True))
    )
    assert_errors_are_no_larger_than_torchs(backend, problems, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_on_integers(backend, dtype):
    """P4: a relu RNN on small integers has exact values and gradients in every dtype."""
    for steps, batch, size, hidden in ((2, 3, 5, 7), (1, 2, 1, 17), (2, 5, 3, 33)):
        p = make("rnn", steps, batch, size, hidden, relu=True, lengths=True)
        tensors = {
            k: None if t is None else integers(t.shape, dtype, low=-1, high=1) * (torch.rand(t.shape) < 3 / t.shape[-1])
            for k, t in p.tensors.items()
        }
        p = dataclasses.replace(p, tensors={k: t.to(dtype) for k, t in tensors.items()}).to(backend.device)
        grads = [integers(g.shape, dtype, low=-1, high=1).to(backend.device) for g in seeds(p)]
        results, got = gradients(ours, p, grads)
        truth, expected = gradients(reference, p.to(dtype=torch.float64), grads)
        expected = {k: torch.zeros_like(got[k]) if g is None else g for k, g in expected.items()}
        assert max(t.abs().max().item() for t in (*truth, *expected.values())) <= 256, "beyond exact bfloat16"
        for a, b in zip(results, truth, strict=True):
            assert_bitwise(a, b.to(dtype), "result")
        for name in got:
            assert_bitwise(got[name], expected[name].to(dtype), f"gradient of {name}")


@st.composite
def problems(draw):
    cell = draw(st.sampled_from(CELLS))
    return {
        "cell": cell,
        "steps": draw(st.integers(1, 5)),
        "batch": draw(st.integers(1, 5)),
        "size": draw(st.integers(1, 9)),
        "hidden": draw(st.integers(1, 19)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "bias": draw(st.booleans()),
        "proj": draw(st.integers(0, 5)) if cell == "lstm" else 0,
        "lengths": draw(st.sampled_from([None, True])),
        "reverse": draw(st.booleans()),
        "relu": draw(st.booleans()),
        "states": draw(st.booleans()),
        "projected_input": draw(st.booleans()),
        "used": draw(st.integers(1, 7)),  # which results have gradients
        "seed": draw(st.integers(0, 2**31)),
    }


@generated(problems())
def test_generated_input(backend, p):
    p = dict(p)
    seed, used, dtype = p.pop("seed"), p.pop("used"), p["dtype"]
    torch.manual_seed(seed)
    problem = make(**p).to(backend.device)
    grads = [g if used >> i & 1 else None for i, g in enumerate(seeds(problem))]
    if all(g is None for g in grads):
        grads = seeds(problem)
    assert_matches_reference(problem, dtype, grads)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(backend, dtype, cell):
    p = make(cell, 3, 4, 5, 6, dtype=dtype, lengths=[3, 1, 2, 0], proj=3 if cell == "lstm" else 0).to(backend.device)
    grads = seeds(p)
    results, expected = gradients(ours, p, grads)
    for name in p.names:
        for layout, variant in layouts(p.tensors[name]):
            changed = dataclasses.replace(p, tensors={**p.tensors, name: variant})
            again, got = gradients(ours, changed, grads)
            for a, b in zip((*again, *got.values()), (*results, *expected.values()), strict=True):
                assert_bitwise(a, b, f"{name}: {layout}")
    for layout, variant in layouts(grads[0]):
        _, got = gradients(ours, p, [variant, *grads[1:]])
        for key, value in got.items():
            assert_bitwise(value, expected[key], f"grad_output: {layout}, {key}")
    flat = [constant(g.shape, 1.0, dtype).to(backend.device) for g in grads]
    _, got = gradients(ours, p, flat)
    _, want = gradients(ours, p, [f.contiguous() for f in flat])
    for key in got:
        assert_bitwise(got[key], want[key], f"expanded gradients, {key}")
    strided = torch.stack([p.lengths, p.lengths], 1)[:, 0]
    assert_bitwise(ours(dataclasses.replace(p, lengths=strided))[0], results[0], "strided lengths")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_and_writes_only_its_tensors(backend, dtype, cell):
    p = make(cell, 3, 3, 5, 7, dtype=dtype, lengths=[2, 3, 1], reverse=True).to(backend.device)
    grads = seeds(p)
    guards = {k: Canary(p.tensors[k]) for k in p.names}
    seed_guards = [Canary(g) for g in grads]
    guarded = dataclasses.replace(p, tensors={k: g.tensor for k, g in guards.items()} | {
        k: None for k in p.tensors if k not in guards
    })  # fmt: skip
    guarded.tensors = {k: guarded.tensors[k] for k in p.tensors}
    results, got = gradients(ours, guarded, [g.tensor for g in seed_guards])
    expected_results, expected = gradients(ours, p, grads)
    for a, b in zip((*results, *got.values()), (*expected_results, *expected.values()), strict=True):
        if backend.name in ("sim", "cuda"):  # the library's products depend on alignment
            assert_close(a, b, dtype, "beside other memory")
        else:
            assert_bitwise(a, b)
    for name, guard in (*guards.items(), *enumerate(seed_guards)):
        guard.assert_untouched(str(name))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_padding_has_no_influence(backend, dtype, cell, reverse):
    """P6: what stands after a row's length may be NaN; outputs there are 0 and so are their gradients."""
    p = make(cell, 4, 3, 5, 6, dtype=dtype, lengths=[2, 4, 0], reverse=reverse).to(backend.device)
    grads = seeds(p)
    poisoned, poisoned_grad = p.input.clone(), grads[0].clone()
    for b, length in enumerate(p.lengths.tolist()):
        poisoned[length:, b] = float("nan")
        poisoned_grad[length:, b] = float("nan")
    results, got = gradients(ours, p, grads)
    bad = dataclasses.replace(p, tensors={**p.tensors, "input": poisoned})
    bad_results, bad_got = gradients(ours, bad, [poisoned_grad, *grads[1:]])
    for a, b in zip(bad_results, results, strict=True):
        assert_bitwise(a, b, "result")
    for name in got:
        if name == "weight_ih" and backend.name != "cpu":
            continue  # 0 times NaN: the gradients of steps that are not alive are 0, the product is the library's
        assert_bitwise(bad_got[name], got[name], name)
    for b, length in enumerate(p.lengths.tolist()):
        assert (results[0][length:, b] == 0).all()
        assert (got["input"][length:, b] == 0).all()
    assert_bitwise(results[1][2], p.tensors["hx"][2], "a row of length 0 keeps its state")


@pytest.mark.parametrize("cell", CELLS)
def test_nan_spreads_like_the_reference(backend, cell):
    p = make(cell, 3, 3, 4, 5, dtype=torch.float32).to(backend.device)
    for value in (float("nan"), float("inf"), -float("inf")):
        changed = p.input.clone()
        changed[1, 1, 2] = value
        problem = dataclasses.replace(p, tensors={**p.tensors, "input": changed})
        for got, truth in zip(ours(problem), reference(problem), strict=True):
            assert torch.equal(got.isnan(), truth.isnan())
            assert torch.equal(got[..., 0, :], ours(p)[0][..., 0, :]) or got.dim() == 2, "another row changed"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_saturation_is_finite(backend, dtype, cell):
    p = make(cell, 4, 3, 5, 9, dtype=dtype).to(backend.device)
    for scale in (1e4, -1e4):
        tensors = {**p.tensors, "input": p.input.sign() * abs(scale) * (1 if scale > 0 else -1)}
        results, got = gradients(ours, dataclasses.replace(p, tensors=tensors), seeds(p))
        for tensor in (*results, *(g for name, g in got.items() if dtype is not torch.float16)):
            assert tensor.isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_equal_the_whole(backend, dtype, cell):
    """A sequence in chunks, passing the states on, is the whole bit for bit; so are slices of the batch."""
    # The CUDA kernels leave weight_ih x to the library's product, whose rows depend on how many there are.
    p = make(cell, 7, 5, 6, 11, dtype=dtype, projected_input=backend.name in ("sim", "cuda")).to(backend.device)
    assert_parts_equal_the_whole(p, dtype)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", [33, 34], ids=["floats", "pairs"])
def test_parts_of_a_wide_layer_equal_the_whole(cpu_kernels, size, cell):
    """In bfloat16, with weights of more than a block: packed for many rows, and where they lie for one or two."""
    assert_parts_equal_the_whole(make(cell, 7, 5, size, 560, dtype=torch.bfloat16), torch.bfloat16)


def assert_parts_equal_the_whole(p, dtype):
    if "cx" in p.tensors:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        p.tensors["cx"] = p.tensors["cx"].to(wide)
    whole = ours(p)
    for cuts in ((0, 1, 7), (0, 3, 4, 7)):
        states, outputs = {k: p.tensors[k] for k in ("hx", "cx") if k in p.tensors}, []
        for first, last in itertools.pairwise(cuts):
            part = dataclasses.replace(p, tensors={**p.tensors, **states, "input": p.input[first:last]})
            output, *state = ours(part)
            outputs.append(output)
            states = dict(zip(states, state, strict=True))
        assert_bitwise(torch.cat(outputs), whole[0], f"output in chunks {cuts}")
        for got, want in zip(states.values(), whole[1:], strict=True):
            assert_bitwise(got, want, f"last state in chunks {cuts}")
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
        tensors = {k: t[rows] if k in ("hx", "cx") else t for k, t in p.tensors.items()}
        tensors["input"] = p.input[:, rows]
        part = ours(dataclasses.replace(p, tensors=tensors))
        assert_bitwise(part[0], whole[0][:, rows], f"batch slice {rows}")


@pytest.mark.parametrize(("cell", "options"), [("lstm", {"proj": 9, "lengths": True}), ("gru", {}), ("rnn", {})])
@pytest.mark.parametrize("steps", [3, 8])  # weights packed by no thread count or some, and by all
def test_any_thread_count_and_run(backend, cell, options, steps):
    p = make(cell, steps, 17, 10, 33, dtype=torch.float32, **options).to(backend.device)
    grads = seeds(p)
    results, got = gradients(ours, p, grads)
    for count in (1, 2, 3) if backend.name == "cpu" else (1,):
        with threads(count):
            again, other = gradients(ours, p, grads)
        for a, b in zip((*again, *other.values()), (*results, *got.values()), strict=True):
            assert_bitwise(a, b, f"{count} threads")


@pytest.mark.parametrize("frozen", [("weight_ih",), ("weight_hh", "bias_ih", "bias_hh"), ("input", "hx"), ("hx",)])
@pytest.mark.parametrize("cell", CELLS)
def test_frozen_operands(backend, cell, frozen):
    p = make(cell, dtype=torch.float32).to(backend.device)
    grads = seeds(p)
    _, everything = gradients(ours, p, grads)
    _, got = gradients(ours, p, grads, frozen)
    assert set(got) == set(p.names) - set(frozen)
    for name, grad in got.items():
        assert_bitwise(grad, everything[name], name)


def test_one_bias_alone(backend):
    for cell in CELLS:
        for absent in ("bias_ih", "bias_hh"):
            p = make(cell, dtype=torch.float32).to(backend.device)
            p = dataclasses.replace(p, tensors={**p.tensors, absent: None})
            assert_matches_reference(p, torch.float32)


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(backend, cell):
    p = make(cell, 4, 0, 5, 6, dtype=torch.float32, lengths=[]).to(backend.device)
    p.lengths = p.lengths.long()
    results, got = gradients(ours, p, seeds(p))
    assert [tuple(r.shape) for r in results] == [(4, 0, 6), *[(0, 6)] * (len(results) - 1)]
    assert all((g == 0).all() and g.shape == p.tensors[k].shape for k, g in got.items())


def test_lengths_outside_count_as_the_nearer_end(backend):
    for cell, reverse in itertools.product(CELLS, (False, True)):
        p = make(cell, 4, 3, 3, 5, dtype=torch.float32, lengths=[9, -3, 2**40], reverse=reverse).to(backend.device)
        clamped = dataclasses.replace(p, lengths=p.lengths.clamp(0, 4))
        grads = seeds(p)
        results, got = gradients(ours, p, grads)
        expected_results, expected = gradients(ours, clamped, grads)
        for a, b in zip((*results, *got.values()), (*expected_results, *expected.values()), strict=True):
            assert_bitwise(a, b)


def test_wide_cell_state(backend):
    """For 16-bit input, c may be float32: it goes in and comes out without a rounding, and so does its gradient."""
    p = make("lstm", dtype=torch.bfloat16).to(backend.device)
    p.tensors["cx"] = torch.randn_like(p.tensors["cx"], dtype=torch.float32)
    results, got = gradients(ours, p, seeds(p))
    assert [r.dtype for r in results] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert got["cx"].dtype is torch.float32
    assert_matches_reference(p, torch.bfloat16)


def test_states_in_torchs_shape(backend):
    """hx may be (1, B, width), as torch.nn's; last states and gradients come likewise."""
    for cell in CELLS:
        p = make(cell, dtype=torch.float32, lengths=[5, 2, 0]).to(backend.device)
        grads = seeds(p)
        results, got = gradients(ours, p, grads)
        raised = {k: t[None] if k in ("hx", "cx") else t for k, t in p.tensors.items()}
        grads = [grads[0], *(g[None] for g in grads[1:])]
        again, other = gradients(ours, dataclasses.replace(p, tensors=raised), grads)
        for a, b in zip((*again, *other.values()), (*results, *got.values()), strict=True):
            assert_bitwise(a.reshape(b.shape), b)
            assert a.dim() in (b.dim(), 3)
        assert again[1].dim() == other["hx"].dim() == 3


def test_cells_are_single_steps(backend):
    for cell, one in (("lstm", lstm_cell), ("gru", gru_cell), ("rnn", rnn_cell)):
        p = make(cell, 1, dtype=torch.float32).to(backend.device)
        t = p.tensors
        weights = [t[k] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        got = one(p.input[0], (t["hx"], t["cx"]) if cell == "lstm" else t["hx"], *weights)
        for a, b in zip(got if cell == "lstm" else (got,), ours(p)[1:], strict=True):
            assert_bitwise(a, b)
    assert_bitwise(rnn_cell(p.input[0], None, *weights, nonlinearity="relu"),
                   rnn(p.input, None, *weights, nonlinearity="relu")[1])  # fmt: skip


def flat(p, **changed):
    """A function of the problem's tensors that returns one flat tensor, and those tensors."""
    names = p.names

    def fn(*tensors):
        values = {**p.tensors, **dict(zip(names, tensors, strict=True))}
        return torch.cat([r.reshape(-1) for r in ours(dataclasses.replace(p, tensors=values, **changed))])

    return fn, tuple(p.tensors[n] for n in names)


@pytest.mark.parametrize(("cell", "options"), VARIANTS)
def test_gradcheck(cpu_kernels, cell, options):
    fn, tensors = flat(make(cell, 5 if "lengths" in options else 2, 3, 2, 4, **options))
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(fn, leaves, nondet_tol=0)
    assert torch.autograd.gradgradcheck(fn, leaves, nondet_tol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_gradgradcheck_of_parts(cpu_kernels, cell):
    """Second derivatives where only some results are used and some operands are frozen."""
    p = make(cell, 3, 2, 3, 4)
    p.tensors["input"].requires_grad_()
    p.tensors["weight_hh"].requires_grad_()

    def fn(x, w):
        return ours(dataclasses.replace(p, tensors={**p.tensors, "input": x, "weight_hh": w}))[1]

    assert torch.autograd.gradgradcheck(fn, (p.input, p.tensors["weight_hh"]))


@pytest.mark.parametrize("cell", CELLS)
def test_transforms(cpu_kernels, cell):
    fn, tensors = flat(make(cell, 3, 2, 3, 4, dtype=torch.float32, lengths=[3, 1]))
    assert_all(fn, *tensors)


def test_vmap_over_lengths_and_states(cpu_kernels):
    p = make("lstm", 4, 3, 2, 5, dtype=torch.float32)
    stack = torch.tensor([[1, 4, 2], [3, 3, 0]])
    fn, tensors = flat(p)
    got = torch.vmap(lambda lengths: ours(dataclasses.replace(p, lengths=lengths))[0])(stack)
    for row, lengths in zip(got, stack, strict=True):
        assert_bitwise(row, ours(dataclasses.replace(p, lengths=lengths))[0])
    x = torch.stack([p.input, 2 * p.input])

    def loss(x):
        return fn(x, *tensors[1:]).square().sum()

    got = torch.vmap(torch.func.grad(loss))(x)
    for row, one in zip(got, x, strict=True):
        torch.testing.assert_close(row, torch.func.grad(loss)(one))


@pytest.mark.parametrize("name", ["lstm_fwd", "gru_fwd", "rnn_fwd", "lstm_bwd", "gru_bwd", "rnn_bwd"])
def test_opcheck(backend, name):
    """The shape rules give what the kernels give."""
    for cell_options in ({}, {"bias": False}, {"projected_input": True}):
        args, mask = call_of(name, cell_options)
        args = [a.to(backend.device) if isinstance(a, torch.Tensor) else a for a in args]
        utils = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(backend.ops, name), (*args, *mask), test_utils=utils)


def call_of(name, options, dtype=torch.float32, **more):
    """(arguments, output_mask as a list of one or none) of a dispatcher op."""
    cell, direction = name.split("_")
    proj = 3 if cell == "lstm" else 0
    p = make(cell, 3, 2, 4, 5, dtype=dtype, proj=proj, lengths=[3, 1], **options)
    operands = [*p.tensors.values(), p.lengths]
    save = [] if cell == "rnn" else [True]
    relu = [False] if cell == "rnn" else []
    if direction == "fwd":
        return [*operands, *relu, False, *save], []
    output, *rest = getattr(torch.ops.pynn, f"{cell}_fwd")(*operands, *relu, False, *save)
    states = 2 if cell == "lstm" else 1
    grads = [torch.randn_like(output), *(torch.randn_like(r) for r in rest[:states])]
    mask = more.get("mask", [True] * (6 if cell == "lstm" else 4))
    return [*grads, *operands, output, *rest[states:], *relu, False], [mask]


def test_gradients_that_nobody_wants_have_no_elements(backend):
    """The last flag of lstm is that of the states; gru and rnn always give theirs."""
    for cell in CELLS:
        lstm = cell == "lstm"
        args, _ = call_of(f"{cell}_bwd", {})
        args = [a.to(backend.device) if isinstance(a, torch.Tensor) else a for a in args]
        states = 2 if lstm else 1
        op = getattr(backend.ops, f"{cell}_bwd")
        everything = op(*args, [True] * (6 if lstm else 4))
        only_states = op(*args, [False] * 5 + [True] if lstm else [False] * 4)
        weights = (0, *range(1 + states, len(everything)))
        assert all(only_states[i].numel() == 0 for i in weights)
        for i in range(1, 1 + states):
            assert_bitwise(only_states[i], everything[i], f"state {i}")
        if lstm:
            others = op(*args, [True] * 5 + [False])
            assert [g.numel() for g in others[1:3]] == [0, 0]
            for i in weights:
                assert_bitwise(others[i], everything[i], f"gradient {i} without states")
            assert all(g.numel() == 0 for g in op(*args, [False] * 6))


def test_saves_nothing_without_gradients(cpu_kernels):
    p = make("lstm", dtype=torch.float32)
    operands = [*p.tensors.values(), p.lengths]
    *_, gates, cells = torch.ops.pynn.lstm_fwd(*operands, False, False)
    assert gates.numel() == cells.numel() == 0
    with torch.no_grad():
        assert not any(r.requires_grad for r in ours(p.with_leaves()))


def test_autocast(cpu_kernels):
    p = make("lstm", 3, 2, 4, 8, dtype=torch.float32).with_leaves()
    with torch.autocast("cpu", torch.bfloat16):
        output, h, c = ours(p)
    assert (output.dtype, h.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    (output.float().sum() + c.sum()).backward()
    assert p.tensors["weight_hh"].grad.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        double = ours(make("gru"))
    assert double[0].dtype is torch.float64


def test_explain_names_the_kernel(cpu_kernels):
    with pynn.explain() as calls:
        ours(make("gru", dtype=torch.float32))
    assert [c.op for c in calls] == ["gru_fwd"]


ERRORS = [
    (lambda t: lstm(t["x"][0], None, t["w"], t["u"]), "expected input to have 3 dimensions, got 2"),
    (lambda t: lstm(t["x"][:0], None, t["w"], t["u"]), "Expected sequence length to be larger than 0 in RNN"),
    (lambda t: lstm(t["x"][..., :2], None, t["w"], t["u"]), r"input.size\(-1\) must be equal to input_size"),
    (lambda t: lstm(t["x"], t["h"], t["w"], t["u"]), r"expected hx to be a pair of tensors \(h, c\), got Tensor"),
    (lambda t: lstm(t["x"], (t["h"], t["h"][:1]), t["w"], t["u"]), r"expected cx of shape \[2, 4\], got \[1, 4\]"),
    (lambda t: lstm(t["x"], (t["h"][None], t["h"]), t["w"], t["u"]), r"expected cx of shape \[1, 2, 4\], got \[2, 4\]"),
    (lambda t: lstm(t["x"], None, t["w"], t["u"][:-1]), r"expected weight_hh of shape \[4 \* hidden_size"),
    (lambda t: lstm(t["x"], None, t["w"][:-4], t["u"]), r"expected weight_ih of shape \[16, 3\], got \[12, 3\]"),
    (lambda t: lstm(t["x"], None, t["w"], t["u"], t["b"][:-1]), r"expected bias_ih of shape \[16\], got \[15\]"),
    (lambda t: lstm(t["x"], None, t["w"], t["u"], lengths=torch.tensor([1.0, 2.0])), "expected lengths to be int64"),
    (lambda t: lstm(t["x"], None, t["w"], t["u"], lengths=torch.tensor([1])), r"expected lengths of shape \[2\]"),
    (lambda t: lstm(t["x"].double(), None, t["w"], t["u"]), "expected weight_hh to be float64 like input, got float32"),
    (lambda t: lstm(t["x"].long(), None, t["w"], t["u"]), "expected input to be float64, float32, float16 or bfloat16"),
    (lambda t: lstm(t["x"], None, None, t["u"]), r"expected input of shape \[steps, batch, 16\] without weight_ih"),
    (lambda t: gru(t["x"], t["h"].half(), t["w"][:12], t["u"][:12]), "expected hx to be float32 like input"),
    (lambda t: gru(t["x"], None, t["w"], t["u"]), r"gru: expected weight_hh of shape \[3 \* hidden_size"),
    (lambda t: rnn(t["x"], None, t["w"][:4], t["u"][:4], nonlinearity="gelu"), "expected nonlinearity to be 'tanh' or"),
    (lambda t: rnn(t["x"], None, t["w"][:4], t["u"][:4, :3]), r"expected weight_hh of shape \[4, 4\], got"),
    (lambda t: lstm_cell(t["x"], None, t["w"], t["u"]), "lstm_cell: expected input to have 2 dimensions, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(cpu_kernels, call, message):
    tensors = {"x": torch.randn(5, 2, 3), "h": torch.randn(2, 4), "w": torch.randn(16, 3)}
    tensors |= {"u": torch.randn(16, 4), "b": torch.randn(16)}
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        call(tensors)


def bad_call(rng):
    """A random dispatcher call that must raise: one operand of a good call is damaged."""
    cell = rng.choice(CELLS)
    name = f"{cell}_{rng.choice(['fwd', 'bwd'])}"
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float64])
    args, mask = call_of(name, {}, dtype)
    args += mask
    places = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    at = rng.choice(places)
    tensor = args[at]
    damage = rng.choice(["rank", "less", "more", "dtype", "empty", "scalar", "type", "mask", "steps"])
    if damage == "rank":
        tensor = tensor.unsqueeze(0).unsqueeze(0)
    elif damage == "less":
        tensor = tensor.narrow(rng.randrange(tensor.dim()), 0, 1)
        if tensor.shape == args[at].shape:
            tensor = tensor[..., :0]
    elif damage == "more":
        tensor = torch.cat([tensor, tensor, tensor], rng.randrange(tensor.dim()))
    elif damage == "dtype":
        tensor = tensor.to(rng.choice([torch.int32, torch.complex64, torch.bool, torch.float16]))
    elif damage == "empty":
        tensor = tensor[..., :0]
    elif damage == "scalar":
        tensor = tensor.reshape(-1)[0]
    elif damage == "type":
        tensor = rng.choice(["x", 1.5, [1, 2], object()])
    elif damage == "steps":
        x = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dim() == 3)
        at, tensor = x, args[x][:0]
    args[at] = tensor
    if damage == "mask":
        if not mask:
            args[places[0]] = None
        else:
            args[-1] = rng.choice([[True], [True] * 9, [], None, "mask", 3])
    description = f"{name} {dtype} {damage} of operand {at}"
    return description, lambda: getattr(torch.ops.pynn, name)(*args)


def test_bad_input_raises():
    assert_rejects("test_recurrent", 500)


def test_huge_sizes_are_rejected(cpu_kernels):
    """Sizes whose product overflows, made of one element: an error, not an allocation of a wrapped size."""
    x = torch.zeros(()).expand(2**40, 2**22, 1)
    w, u = torch.zeros(4, 1), torch.zeros(4, 1)
    h = torch.zeros(()).expand(2**22, 1)
    with pytest.raises(RuntimeError, match="overflows 64 bits"):
        torch.ops.pynn.lstm_fwd(x, h, h, w, u, None, None, None, None, False, True)


def test_gates_of_every_cell():
    assert {c: make(c).tensors["weight_hh"].shape[0] // 6 for c in CELLS} == GATES
