"""group_norm: values, gradients, layouts, determinism, transforms and rejected input."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from adversary import Canary, constant, layouts
from bad_input import assert_rejects
from generated import generated
from hypothesis import strategies as st
from policy import (
    DTYPES,
    LOW_PRECISION,
    assert_bitwise,
    assert_elementwise,
    assert_nonfinite,
    assert_relative,
    integers,
    run,
    threads,
    truth_of,
)
from transforms import assert_all

from pynn.nn.normalization import GroupNorm
from pynn.ops.group_norm import group_norm

ACTIVATIONS = (None, "silu")
SHAPES = [  # shape, groups
    ((8, 32, 8, 8), 8),
    ((16, 64, 4, 4), 8),
    ((3, 32, 28, 28), 8),
    ((4, 130, 7, 7), 1),
    ((6, 42, 5, 5), 7),
    ((64, 80), 4),
    ((5, 24, 33), 24),
    ((2, 16, 3, 8, 5), 2),
]


def composite(x, weight, bias, groups, eps=1e-5, activation=None):
    """Group normalisation written out; a float64 input makes it the truth."""
    grouped = x.reshape(x.shape[0], groups, -1)
    centered = grouped - grouped.mean(-1, keepdim=True)
    y = (centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    channel = (1, -1, *(1,) * (x.dim() - 2))
    y = y if weight is None else y * weight.view(channel)
    y = y if bias is None else y + bias.view(channel)
    return y if activation is None else y * y.sigmoid()


def torch_op(x, weight, bias, groups, eps=1e-5, activation=None):
    y = F.group_norm(x, groups, weight, bias, eps)
    return y if activation is None else F.silu(y)


def ours(x, weight, bias, groups, eps=1e-5, activation=None):
    return group_norm(x, groups, weight, bias, eps, activation=activation)


def problem(shape, dtype, mean=0.0, parameter_dtype=None):
    x = (torch.randn(shape, dtype=torch.float64) + mean).to(dtype)
    weight, bias = (torch.randn(shape[1], dtype=torch.float64).to(parameter_dtype or dtype) for _ in range(2))
    return x, weight, bias, torch.randn(shape, dtype=torch.float64).to(dtype)


def last(x):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x


def assert_error_is_no_larger_than_torchs(problems, activation, cap=None):
    """P1 and P2 over all (x, weight, bias, grad_output, groups) together: chance in one result does not decide.

    Returns our (output, gradients) of each problem.
    """
    columns = {"truth": [], "torch": [], "ours": []}
    for *tensors, grad, groups in problems:
        for name, collect, fn in (("truth", truth_of, composite), ("torch", run, torch_op), ("ours", run, ours)):
            fn = functools.partial(fn, groups=groups, activation=activation)
            y, grads = collect(fn, *tensors, grad_output=grad)
            columns[name].append((y, *grads))
    for i, what in enumerate(("output", "grad_input", "grad_weight", "grad_bias")):
        truth, theirs, got = (torch.cat([row[i].reshape(-1) for row in columns[name]]) for name in columns)
        assert_relative(got, truth, [theirs], kind="gradient" if i else "forward", cap=cap, what=what)
    return columns["ours"]


def _on(backend, tensors, channels_last):
    """The tensors on the backend's device, the first in the layout."""
    x, *rest = (t.to(backend.device) for t in tensors)
    return last(x) if channels_last else x, *rest


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mean", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_no_larger_than_torchs(backend, dtype, channels_last, mean, activation):
    problems = [(*_on(backend, problem(shape, dtype, mean), channels_last), groups) for shape, groups in SHAPES]
    if dtype is torch.float64 and mean == 1000.0:  # the truth itself loses digits here
        for *tensors, grad, groups in problems:
            fns = (functools.partial(fn, groups=groups, activation=activation) for fn in (ours, composite))
            (y, grads), (truth, true_grads) = (run(fn, *tensors, grad_output=grad) for fn in fns)
            torch.testing.assert_close((y, *grads), (truth, *true_grads), rtol=1e-8, atol=1e-8)
    else:
        assert_error_is_no_larger_than_torchs(problems, activation)


SMALL = [  # shape, groups: maps of up to four whole and partial vectors of every instruction set, and one more
    ((5, channels, pixels), groups)
    for pixels in (2, 9, 16, 21, 32, 40, 48, 50, 64, 65)
    for channels, groups in ((6, 3), (20, 1))
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_accuracy_of_small_maps(cpu_kernels, dtype, activation, mean):
    problems = [(*problem(shape, dtype, mean), groups) for shape, groups in SMALL]
    assert_error_is_no_larger_than_torchs(problems, activation)


@pytest.mark.parametrize(("dtype", "activation"), [(torch.float32, "silu"), (torch.bfloat16, None)])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_slices_of_small_maps(cpu_kernels, dtype, activation, mean):
    """Which groups share a task shows in no result."""
    for shape, groups in SMALL:
        *tensors, grad = problem(shape, dtype, mean)
        fn = functools.partial(ours, groups=groups, activation=activation)
        y, (grad_input, *_) = run(fn, *tensors, grad_output=grad)
        part, part_grads = run(fn, tensors[0][2:], *tensors[1:], grad_output=grad[2:])
        assert_bitwise(part, y[2:], "batch slice")
        assert_bitwise(part_grads[0], grad_input[2:], "gradient of a batch slice")


LARGE = [  # shape, groups
    ((1, 2, 210, 190), 1),  # one group, many splits of a channel
    ((2, 24, 30, 31), 2),
    ((3, 10, 32, 32), 1),  # the most that the CUDA kernel keeps in registers
    ((2, 1100, 5, 2), 1),  # many channels of few pixels
    ((2, 6001, 1, 2), 1),
    ((270, 6), 2),  # many samples
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize(("dtype", "activation"), [(torch.float32, "silu"), (torch.bfloat16, None)])
def test_large_groups(backend, dtype, activation, mean, channels_last):
    """Shapes for which kernels split a group, a channel or the batch, and put the parts together."""
    problems = []
    for shape, groups in LARGE:
        x, *rest = problem(shape, dtype, mean)
        x[..., : x.shape[-1] // 2] += 10  # parts of a group have their own means
        problems.append((*_on(backend, (x, *rest), channels_last), groups))
    cap = {torch.float32: 2e-7, torch.bfloat16: 2e-3}[dtype]  # a large mean costs no digits, though torch loses many
    results = assert_error_is_no_larger_than_torchs(problems, activation, cap)
    for (x, weight, bias, grad, groups), (y, grad_input, *_) in zip(problems, results, strict=True):
        fn = functools.partial(ours, groups=groups, activation=activation)
        part, part_grads = run(fn, x[1:], weight, bias, grad_output=grad[1:])
        assert_bitwise(part, y[1:], "batch slice")
        assert_bitwise(part_grads[0], grad_input[1:], "gradient of a batch slice")


@st.composite
def problems(draw):
    groups, width = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    pixels = draw(st.lists(st.integers(1, 6), max_size=3))
    shape = (draw(st.integers(1, 3)), groups * width, *pixels)
    return {
        "shape": shape,
        "groups": groups,
        "dtype": draw(st.sampled_from(DTYPES)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "affine": draw(st.sampled_from(["both", "weight", "bias", "none"])),
        "wide": draw(st.booleans()),
        "channels_last": draw(st.booleans()),
        "mean": draw(st.sampled_from([0.0, -5.0, 100.0])),
        "seed": draw(st.integers(0, 2**31)),
    }


@generated(problems())
def test_generated_input(backend, p):
    if p["shape"][0] * p["shape"][1] // p["groups"] * torch.Size(p["shape"][2:]).numel() == 1:
        return  # rejected, as in torch
    torch.manual_seed(p["seed"])
    dtype, groups = p["dtype"], p["groups"]
    wide = torch.float32 if p["wide"] and dtype in LOW_PRECISION else dtype
    x, weight, bias, grad = problem(p["shape"], dtype, p["mean"], wide)
    x, weight, bias, grad = (t.to(backend.device) for t in (x, weight, bias, grad))
    x = last(x) if p["channels_last"] else x
    weight = weight if p["affine"] in ("both", "weight") else None
    bias = bias if p["affine"] in ("both", "bias") else None
    eps = 1e-2  # keeps groups of a few values well conditioned
    fn = functools.partial(ours, groups=groups, eps=eps, activation=p["activation"])
    reference = functools.partial(composite, groups=groups, eps=eps, activation=p["activation"])
    y, grads = run(fn, x, weight, bias, grad_output=grad)
    truth, truth_grads = truth_of(reference, x, weight, bias, grad_output=grad)
    assert y.stride() == F.group_norm(x, groups).stride()
    terms = x.numel() // (x.shape[0] * groups)
    condition = 1 + 10 * abs(p["mean"]) if dtype is torch.float64 else 1.0  # of the truth's own mean
    largest = truth.abs() + (1 if bias is None else bias.double().abs().max()) + 4
    assert_elementwise(y, truth, largest * condition, terms, "output")
    for got, expected, what in zip(grads, truth_grads, ("grad_input", "grad_weight", "grad_bias"), strict=True):
        if expected is not None:
            scale = 12 * grad.double().abs().max() / eps**0.5 * (x.numel() / x.shape[1]) ** 0.5
            scale = scale * (1 if weight is None else 1 + weight.double().abs().max())
            assert_elementwise(got, expected, scale.expand(expected.shape) * condition, terms, what)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_on_integers(backend, dtype, channels_last):
    """P4: groups made of mean +- 2 have variance 4; with eps = 0 every value on the way is exact."""
    for shape, groups in (
        ((4, 32, 8, 8), 8),
        ((3, 24, 7, 2), 4),
        ((2, 130, 5, 4), 1),
        ((4, 64), 2),
        ((2, 12, 3, 2), 6),
    ):
        half = shape[0], groups, torch.Size(shape[1:]).numel() // groups // 2
        sign = torch.cat([torch.full(half, 2.0), torch.full(half, -2.0)], -1)
        sign = sign.gather(-1, torch.rand(sign.shape).argsort(-1))
        x = (sign + integers((shape[0], groups, 1))).reshape(shape).to(dtype)
        x = (last(x) if channels_last else x).to(backend.device)
        weight, bias = integers(shape[1:2], dtype).to(backend.device), integers(shape[1:2], dtype).to(backend.device)
        got = group_norm(x, groups, weight, bias, eps=0.0)
        truth = composite(x.double(), weight.double(), bias.double(), groups, eps=0.0)
        assert_bitwise(got, truth.to(dtype), f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 12, 5, 6), (3, 8, 7), (2, 4, 2, 3, 4)])
def test_any_strides(backend, shape, dtype):
    x, weight, bias, grad = (t.to(backend.device) for t in problem(shape, dtype))
    fn = functools.partial(ours, groups=4, activation="silu")
    expected, expected_grads = run(fn, x, weight, bias, grad_output=grad)
    for name, variant in layouts(x):
        for grad_name, grad_variant in layouts(grad):
            y, grads = run(fn, variant, weight, bias, grad_output=grad_variant)
            for got, want in zip((y, *grads), (expected, *expected_grads), strict=True):
                if name == grad_name == "contiguous" or name.startswith(("offset", "slice of a batch")):
                    assert_bitwise(got, want, f"{name}, {grad_name}")
                torch.testing.assert_close(got, want, msg=f"{name}, {grad_name}")
    for value in (1.0, 0.0):
        flat = constant(shape, value, dtype).to(backend.device)
        _, got = run(fn, x, weight, bias, grad_output=flat)
        _, want = run(fn, x, weight, bias, grad_output=flat.contiguous())
        for a, b in zip(got, want, strict=True):
            assert_bitwise(a, b, "expanded grad_output")
    strided = torch.stack([weight, bias], 1)
    assert_bitwise(group_norm(x, 4, strided[:, 0], strided[:, 1]), group_norm(x, 4, weight, bias), "strided parameters")


@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (3, 21, 2, 3), (1, 8, 9), (5, 6)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_and_writes_only_its_tensors(backend, dtype, shape):
    x, weight, bias, grad = (t.to(backend.device) for t in problem(shape, dtype))
    groups = 3 if shape[1] % 3 == 0 else 2
    guards = [Canary(t) for t in (x, weight, bias, grad)]
    fn = functools.partial(ours, groups=groups, activation="silu")
    y, grads = run(fn, *(g.tensor for g in guards[:3]), grad_output=guards[3].tensor)
    expected, expected_grads = run(fn, x, weight, bias, grad_output=grad)
    for got, want in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert_bitwise(got, want, "guarded operands")
    for guard in guards:
        guard.assert_untouched()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_threads_and_batch(dtype, channels_last):
    for shape, groups in (((16, 64, 16, 16), 8), ((2, 256, 20, 20), 2), ((7, 130, 9, 9), 1)):
        x, weight, bias, grad = problem(shape, dtype, 1.0)
        x = last(x) if channels_last else x
        fn = functools.partial(ours, groups=groups, activation="silu")
        y, grads = run(fn, x, weight, bias, grad_output=grad)
        for count in (1, 2, 3):
            with threads(count):
                again, again_grads = run(fn, x, weight, bias, grad_output=grad)
            for a, b in zip((again, *again_grads), (y, *grads), strict=True):
                assert_bitwise(a, b, f"{count} threads")
        part, part_grads = run(fn, x[1:], weight, bias, grad_output=grad[1:])
        assert_bitwise(part, y[1:], "batch slice")
        assert_bitwise(part_grads[0], grads[0][1:], "gradient of a batch slice")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_stay_in_their_group(backend, bad):
    for make in (lambda x: x, last):
        x, weight, bias, _ = (t.to(backend.device) for t in problem((3, 12, 5, 5), torch.float32))
        x = make(x)
        x[1, 4, 2, 3] = bad
        for activation in ACTIVATIONS:
            got = ours(x, weight, bias, 3, activation=activation)
            assert_nonfinite(got, composite(x.double(), weight.double(), bias.double(), 3, activation=activation))
    extreme = torch.tensor([[3e4, -3e4]]).half().expand(2, 2).contiguous()
    assert group_norm(extreme, 1, activation="silu").isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(activation, affine):
    for shape, groups, make in (((2, 6, 3, 2), 3, lambda x: x), ((2, 4, 2, 3), 2, last), ((3, 6), 2, lambda x: x)):
        x, weight, bias, _ = problem(shape, torch.float64)
        tensors = [make(x), weight, bias] if affine else [make(x)]
        tensors = [t.detach().requires_grad_() for t in tensors]
        fn = lambda *t: ours(*(*t, None, None)[:3], groups, 0.1, activation)  # noqa: B023, E731
        assert torch.autograd.gradcheck(fn, tensors)
        assert torch.autograd.gradgradcheck(fn, tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_transforms(activation):
    x, weight, bias, _ = problem((2, 6, 4, 3), torch.float64)
    assert_all(functools.partial(ours, groups=3, activation=activation), x, weight, bias)
    assert_all(lambda x: group_norm(x, 3, activation=activation), x)


def test_compiles_with_inductor_and_channels_last():
    x, weight, bias, grad = problem((2, 16, 4, 4), torch.float32)
    fn = functools.partial(ours, groups=4, activation="silu")
    y, grads = run(fn, last(x), weight, bias, grad_output=grad)
    compiled = torch.compile(fn, fullgraph=True)
    got, got_grads = run(compiled, last(x), weight, bias, grad_output=grad)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip((got, *got_grads), (y, *grads), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(dtype, channels_last):
    x, weight, bias, grad = problem((2, 6, 4, 3), dtype)
    x = last(x) if channels_last else x.transpose(2, 3)
    grad = grad.view(x.shape)
    for w, b in ((weight, bias), (None, None)):
        y, mean, rstd = torch.ops.pynn.group_norm_fwd(x, w, b, 3, 1e-5, True)
        assert y.dtype is dtype
        torch.library.opcheck(torch.ops.pynn.group_norm_fwd.default, (x, w, b, 3, 1e-5, True))
        torch.library.opcheck(torch.ops.pynn.group_norm_bwd.default, (grad, x, w, b, mean, rstd, 3, True))


def test_autocast_keeps_the_dtypes_of_torch():
    x, weight, bias, _ = problem((2, 6, 4, 3), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert group_norm(x, 3, weight, bias).dtype is F.group_norm(x, 3, weight, bias).dtype
        got = group_norm(x.bfloat16(), 3, weight, bias, activation="silu")
    assert got.dtype is torch.bfloat16
    assert_relative(got, composite(x.bfloat16().double(), weight.double(), bias.double(), 3, activation="silu"))


@pytest.mark.parametrize("shape", [(0, 6, 4, 3), (2, 6, 0, 3), (2, 0, 4), (0, 6)])
def test_empty(backend, shape):
    x = torch.randn(shape, device=backend.device, requires_grad=True)
    weight, bias = (torch.randn(shape[1], device=backend.device, requires_grad=True) for _ in range(2))
    y = group_norm(x, 2, weight, bias, activation="silu")
    assert y.shape == F.group_norm(x, 2, weight, bias).shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.abs().sum() == 0
    assert bias.grad.abs().sum() == 0


def test_statistics_are_not_differentiable():
    x = torch.randn(2, 4, 3, requires_grad=True)
    y = group_norm(x, 2)
    assert y.requires_grad
    (y * 0).sum().backward()
    assert x.grad.abs().sum() == 0


ERRORS = [
    (lambda f: f(torch.randn(4), 2), "Expected at least 2 dimensions for input tensor but received 1"),
    (
        lambda f: f(torch.randn(2, 4, 3), 3),
        "Expected number of channels in input to be divisible by num_groups, but got",
    ),
    (lambda f: f(torch.randn(2, 4, 3), -2), "Expected num groups to be greater than 0, got -2"),
    (
        lambda f: f(torch.randn(2, 4, 3), 2, torch.randn(3)),
        "Expected weight to be a vector of size equal to the number",
    ),
    (
        lambda f: f(torch.randn(2, 4, 3), 2, None, torch.randn(4, 1)),
        "Expected bias to be a vector of size equal to the",
    ),
    (lambda f: f(torch.randn(1, 4, 1, 1), 4), r"Expected more than 1 value per channel when training, got input size"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors_are_torchs(call, message):
    for fn in (group_norm, F.group_norm):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call(fn)


def test_module_matches_torchs():
    theirs, mine = torch.nn.GroupNorm(2, 6), GroupNorm(2, 6)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in mine.state_dict().items()}
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 5)
    torch.testing.assert_close(mine(x), theirs(x))
    torch.testing.assert_close(GroupNorm(2, 6, activation="silu")(x), F.silu(theirs(x)))
    assert repr(mine) == repr(theirs)
    assert "silu" in repr(GroupNorm(2, 6, activation="silu"))
    assert list(GroupNorm(2, 6, affine=False).parameters()) == []
    assert [n for n, _ in GroupNorm(2, 6, bias=False).named_parameters()] == ["weight"]
    assert GroupNorm(2, 6, dtype=torch.float64).weight.dtype is torch.float64
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        GroupNorm(4, 6)
    with pytest.raises(ValueError, match="activation"):
        GroupNorm(2, 6, activation="relu")


def bad_call(rng):
    """A random call that must raise."""
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float64])
    shape = [rng.randint(1, 3), 6, *(rng.randint(1, 4) for _ in range(rng.randint(0, 3)))]
    shape[0] += 1
    good = {
        "input": torch.randn(shape, dtype=torch.float64).to(dtype),
        "weight": torch.randn(6, dtype=torch.float64).to(dtype),
        "bias": torch.randn(6, dtype=torch.float64).to(dtype),
        "num_groups": 3,
        "silu": rng.random() < 0.5,
    }
    wrong = [
        lambda: torch.randn(7),
        lambda: torch.randn(6, 1),
        lambda: torch.randn(()),
        lambda: torch.randn(0),
        lambda: torch.ones(6, dtype=rng.choice([torch.int64, torch.bool, torch.complex64])),
        lambda: torch.randn(6).to(torch.float64 if dtype is not torch.float64 else torch.float32),
    ]
    kind = rng.choice(["groups", "parameter", "input", "backward", "activation", "type"])
    backward = rng.random() < 0.5
    statistics = torch.float64 if dtype is torch.float64 else torch.float32
    extra = {
        "grad": torch.randn(shape, dtype=torch.float64).to(dtype),
        "mean": torch.zeros(shape[0], 3, dtype=statistics),
        "rstd": torch.ones(shape[0], 3, dtype=statistics),
    }
    if kind == "groups":
        good["num_groups"] = rng.choice([0, -1, -3, 4, 5, 7, 12, 2**31, 2**62, -(2**63), 2**63 - 1])
    elif kind == "parameter":
        good[rng.choice(["weight", "bias"])] = rng.choice(wrong)()
    elif kind == "input":
        good["input"] = rng.choice(
            [
                lambda: torch.randn(()),
                lambda: torch.randn(6),
                lambda: torch.ones(shape, dtype=torch.int64),
                lambda: torch.ones(shape, dtype=torch.complex64),
                lambda: torch.randn(2, 7, 3, dtype=torch.float64).to(dtype),
                lambda: torch.empty(2, 0, 3, dtype=dtype),
            ]
        )()
    elif kind == "backward":
        backward = True
        name = rng.choice(["grad", "mean", "rstd"])
        extra[name] = rng.choice(
            [
                lambda: torch.randn(3, 3, 3),
                lambda: torch.randn(()),
                lambda: extra[name].to(torch.float16),
                lambda: extra[name][..., :0],
                lambda: extra[name].to(torch.int32),
            ]
        )()
    if kind == "activation":
        return "activation", lambda: group_norm(good["input"], 3, activation=rng.choice(["relu", "", "SiLU", 1, True]))
    if kind == "type":
        name, value = rng.choice([("num_groups", "3"), ("weight", 1.0), ("input", None), ("num_groups", 1.5)])
        good[name] = value
    description = f"{kind} {'backward' if backward else 'forward'} {dtype} {shape}"
    if backward:
        return description, lambda: torch.ops.pynn.group_norm_bwd(
            extra["grad"], good["input"], good["weight"], good["bias"], extra["mean"], extra["rstd"],
            good["num_groups"], good["silu"],
        )  # fmt: skip
    return description, lambda: torch.ops.pynn.group_norm_fwd(
        good["input"], good["weight"], good["bias"], good["num_groups"], 1e-5, good["silu"]
    )


def test_bad_input_raises():
    assert_rejects("test_group_norm", 500)


def test_large_results_have_memory_of_their_own(cpu_kernels):
    """What is kept of results that are gone serves later ones, never one that is held or that something still reads."""
    x = torch.randn(2, 64, 64, 64)
    held = group_norm(x, 4)
    expected, view = held.clone(), group_norm(x, 4)[1, 3]
    passing = [group_norm(scale * x, 8) for scale in (2, 3)]
    assert len({t.data_ptr() for t in (held, *passing)}) == 3
    del passing
    for _ in range(3):
        group_norm(-x, 4)
    assert torch.equal(held, expected)
    assert torch.equal(view, expected[1, 3])
