"""Diffusion ops against the formulas of the papers in float64."""

import random

import pytest
import torch
from adversary import Canary, constant, layouts
from bad_input import assert_rejects
from generated import generated
from hypothesis import strategies as st
from policy import DTYPES, assert_bitwise, assert_elementwise, assert_nonfinite, assert_relative, integers, threads
from torch.autograd import gradcheck, gradgradcheck
from transforms import assert_all, assert_compiles

import pynn
from pynn.diffusion import PREDICTION_TYPES, VARIANCE_TYPES, Schedule

KERNEL = "forward_jump_fwd"
SEED = 0x123456789ABCDEF
T = 20
SCHEDULES = {
    "linear": Schedule.linear(T),
    "cosine": Schedule.cosine(T),
    "sigmoid": Schedule.sigmoid(T),
    "scaled_linear": Schedule.scaled_linear(T),
}


def loss_dtype(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


def level(schedule, t, x):
    """alphas_cumprod at t (1 at t = -1), shaped like x's batch, float64."""
    a = torch.cat((torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod))
    return a[t.cpu() + 1].reshape(-1, *[1] * (x.dim() - 1)).to(x.device)


def jump_reference(x, t, schedule, s, z):
    ratio = level(schedule, t, x) / level(schedule, torch.full_like(t, -1) if s is None else s, x)
    return ratio.sqrt() * x + (1 - ratio).sqrt() * z


def reverse_reference(x, t, output, schedule, prediction_type, variance_type, z, variance=None, clip=None):
    """Equations 6, 7 and 15 of DDPM and 15 of improved DDPM, written from the papers. Returns (x_{t-1}, x_0)."""
    a, before = level(schedule, t, x), level(schedule, t - 1, x)
    beta = schedule.betas[t.cpu()].view_as(a).to(x.device)
    posterior = beta * (1 - before) / (1 - a)
    if prediction_type == "mean":
        mean = x0 = output
    else:
        if prediction_type == "epsilon":
            x0 = (x - (1 - a).sqrt() * output) / a.sqrt()
        elif prediction_type == "sample":
            x0 = output
        elif prediction_type == "v":
            x0 = a.sqrt() * x - (1 - a).sqrt() * output
        else:
            x0 = (x + (1 - a) * output) / a.sqrt()
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        mean = before.sqrt() * beta / (1 - a) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - a) * x
    if variance_type == "fixed_small":
        sigma = posterior.sqrt()
    elif variance_type == "fixed_large":
        sigma = beta.sqrt()
    else:
        first = (schedule.betas[1] * (1 - schedule.alphas_cumprod[0]) / (1 - schedule.alphas_cumprod[1])).to(x.device)
        low = torch.where(t.view_as(a) == 0, first, posterior).log()
        fraction = (variance + 1) / 2
        sigma = (0.5 * (fraction * beta.log() + (1 - fraction) * low)).exp()
    return mean + torch.where(t.view_as(a) == 0, 0.0, 1.0) * sigma * z, x0


def residuals(output, x0, t, schedule, prediction_type, z):
    """What the loss squares, and the sum of the magnitudes it is the difference of."""
    a = level(schedule, t, output)
    c0, c1 = {
        "epsilon": (0.0, 1.0),
        "sample": (1.0, 0.0),
        "v": (-(1 - a).sqrt(), a.sqrt()),
        "score": (0.0, -1 / (1 - a).sqrt()),
    }[prediction_type]
    return output - (c0 * x0 + c1 * z), output.abs() + (c0 * x0).abs() + (c1 * z).abs()


def weighted_mean(values, t, weights=None):
    mean = values.reshape(values.shape[0], -1).mean(1)
    return mean if weights is None else mean * weights[t.cpu()].to(mean.device)


def loss_reference(output, x0, t, schedule, prediction_type, z, weights=None):
    return weighted_mean(residuals(output, x0, t, schedule, prediction_type, z)[0] ** 2, t, weights)


def assert_bounded(got, truth, magnitude, terms, what):
    """P3. In float64 the reference rounds as much as the kernel does, so only agreement can be asked for."""
    if got.dtype is torch.float64:
        assert ((got - truth).abs() <= 1e-10 * magnitude + 1e-300).all(), what
    else:
        beyond = truth.abs() > torch.finfo(got.dtype).max  # rounds to infinity
        assert (got.isinf() | ~beyond | (got.abs() == torch.finfo(got.dtype).max)).all(), what
        got, truth = got.masked_fill(beyond, 0), truth.masked_fill(beyond, 0)
        assert_elementwise(got, truth, magnitude, terms, what)


shapes = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)
batches = st.integers(1, 5)
names = st.sampled_from(sorted(SCHEDULES))
dtypes = st.sampled_from(DTYPES)


def timesteps(draw_seed, batch):
    generator = torch.Generator().manual_seed(draw_seed)
    t = torch.randint(T, (batch,), generator=generator)
    s = (torch.rand(batch, generator=generator) * (t + 1)).long() - 1
    return t, s


def data(shape, dtype, seed, count=1):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]
    return made if count > 1 else made[0]


@generated(batches, shapes, names, dtypes, st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_forward_jump_generated(backend, batch, rest, name, dtype, from_s, own_keys, seed):
    schedule, device = SCHEDULES[name], backend.device
    x = data((batch, *rest), dtype, seed).to(device)
    t, s = (indices.to(device) for indices in timesteps(seed, batch))
    s = s if from_s else None
    key = torch.randint(2**62, (batch, 2)).to(device) if own_keys else seed
    y, z = pynn.ops.forward_jump(x, t, schedule.forward_table.to(device), s, seed=key, return_noise=True)
    assert_bitwise(z, pynn.ops.normal(x.shape, seed=key, dtype=dtype, device=device), "returned noise")
    exact_noise = pynn.ops.normal(x.shape, seed=key, dtype=torch.float64, device=device)
    truth = jump_reference(x.double(), t, schedule, s, exact_noise)
    magnitude = jump_reference(x.double().abs(), t, schedule, s, exact_noise.abs())
    assert_bounded(y, truth, magnitude, 2, "forward_jump")


@generated(
    batches,
    shapes,
    names,
    dtypes,
    st.sampled_from(PREDICTION_TYPES),
    st.sampled_from(VARIANCE_TYPES),
    st.sampled_from([None, 0.5, 1.0]),
    st.integers(0, 2**31),
)
def test_reverse_step_generated(backend, batch, rest, name, dtype, prediction_type, variance_type, clip, seed):
    schedule, device = SCHEDULES[name], backend.device
    x, output, noise = (tensor.to(device) for tensor in data((batch, *rest), dtype, seed, 3))
    t = timesteps(seed, batch)[0].to(device)
    clip = None if prediction_type == "mean" else clip
    learned = variance_type == "learned_range"
    variance = data((batch, *rest), dtype, seed + 1).clamp(-1, 1).to(device) if learned else None
    table = schedule.reverse_table(prediction_type, variance_type).to(device)
    y, x0 = pynn.ops.reverse_step(x, t, output, table, variance=variance, clip=clip, noise=noise, return_x0=True)
    wide = None if variance is None else variance.double()
    doubles = x.double(), t, output.double()
    truth, truth_x0 = reverse_reference(*doubles, schedule, prediction_type, variance_type, noise.double(), wide, clip)
    p, q, c, d = (column.view(-1, *[1] * len(rest)) for column in table[t].unbind(1)[:4])
    through_x0 = p.abs() * x.double().abs() + q.abs() * output.double().abs()
    sigma = table[t][:, 4].view_as(p)
    magnitude = c.abs() * through_x0 + d.abs() * x.double().abs() + (sigma + 1) * noise.double().abs()
    assert_bounded(y, truth, magnitude, 8, "reverse_step")
    assert_bounded(x0, truth_x0, through_x0, 8, "x0")


@generated(batches, shapes, names, dtypes, st.sampled_from(PREDICTION_TYPES[:-1]), st.booleans(), st.integers(0, 2**31))
def test_loss_generated(backend, batch, rest, name, dtype, prediction_type, weighted, seed):
    schedule, device = SCHEDULES[name], backend.device
    output, x0 = (tensor.to(device) for tensor in data((batch, *rest), dtype, seed, 2))
    t = timesteps(seed, batch)[0].to(device)
    weights = torch.rand(T, dtype=torch.float64) if weighted else None
    table = schedule.loss_table(prediction_type, weights).to(device)
    loss = pynn.ops.diffusion_loss(output, x0, t, table, seed=seed)
    z = pynn.ops.normal(x0.shape, seed=seed, dtype=torch.float64, device=device)
    residual, magnitude = residuals(output.double(), x0.double(), t, schedule, prediction_type, z)
    assert loss.dtype is loss_dtype(dtype)
    # Rounded: residuals per term, squares and means per step of a short sum; in float64 also the reference's 1 - a.
    unit = 2e-13 if dtype is torch.float64 else torch.finfo(loss.dtype).eps
    rounding = 3 * unit * magnitude
    bound = weighted_mean(2 * residual.abs() * rounding + rounding**2 + 8 * unit * residual**2, t, weights)
    assert ((loss.double() - weighted_mean(residual**2, t, weights)).abs() <= bound + 1e-300).all(), "diffusion_loss"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES[:-1])
def test_gradients_match_the_reference(backend, dtype, prediction_type):
    schedule, shape = SCHEDULES["linear"], (6, 3, 7, 5)
    x, output, v, noise, dy = (tensor.to(backend.device) for tensor in data(shape, dtype, 0, 5))
    t = torch.tensor([0, 1, 5, 9, 18, 19], device=backend.device)
    table = schedule.reverse_table(prediction_type, "learned_range").to(backend.device)
    v = v.clamp(-1, 1)

    def ours(x, output, v):
        return pynn.ops.reverse_step(x, t, output, table, variance=v, clip=1.0, noise=noise)

    def reference(x, output, v):
        args = t, output, schedule, prediction_type, "learned_range", noise.to(x.dtype), v, 1.0
        return reverse_reference(x, *args)[0]

    leaves = [tensor.clone().requires_grad_() for tensor in (x, output, v)]
    truth = [tensor.double().requires_grad_() for tensor in (x, output, v)]
    grads = torch.autograd.grad(ours(*leaves), leaves, dy)
    expected = torch.autograd.grad(reference(*truth), truth, dy.double(), materialize_grads=True)
    for name, got, want in zip(("x", "output", "variance"), grads, expected, strict=True):
        # A value of x0 within rounding of the clip bound may fall on either side of it: leave those out.
        a = level(schedule, t, x)
        x0 = {
            "epsilon": (x.double() - (1 - a).sqrt() * output.double()) / a.sqrt(),
            "sample": output.double(),
            "v": a.sqrt() * x.double() - (1 - a).sqrt() * output.double(),
            "score": (x.double() + (1 - a) * output.double()) / a.sqrt(),
        }[prediction_type]
        away = (x0.abs() - 1).abs() > 1e-4
        assert_bounded(got * away, want * away, want.abs() * away, 16, f"gradient of {name}")

    l_out, l_x0 = output.clone().requires_grad_(), x.clone().requires_grad_()
    d_out, d_x0 = output.double().requires_grad_(), x.double().requires_grad_()
    loss = pynn.ops.diffusion_loss(l_out, l_x0, t, schedule.loss_table(prediction_type).to(backend.device), noise=noise)
    want = loss_reference(d_out, d_x0, t, schedule, prediction_type, noise.double())
    weight = torch.linspace(-1, 2, 6, device=backend.device)
    grads = torch.autograd.grad((loss * weight.to(loss.dtype)).sum(), (l_out, l_x0))
    expected = torch.autograd.grad((want * weight.double()).sum(), (d_out, d_x0), materialize_grads=True)
    for name, got, truth_grad in zip(("output", "x0"), grads, expected, strict=True):
        scale = truth_grad.abs() + truth_grad.abs().mean()
        assert_bounded(got, truth_grad, scale, 64, f"loss gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_against_torch(backend, dtype):
    """P1: not less accurate than the usual eager formulas with tables rounded once from float64."""
    schedule, device = SCHEDULES["cosine"], backend.device
    x, output, z = (tensor.to(device) for tensor in data((64, 5000), dtype, 5, 3))
    t = torch.randint(T, (64,), device=device)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    a = level(schedule, t, x)
    signal, noise = (factor.to(compute) for factor in (a.sqrt(), (1 - a).sqrt()))
    y = pynn.ops.forward_jump(x, t, schedule.forward_table.to(device), noise=z)
    truth = jump_reference(x.double(), t, schedule, None, z.double())
    assert_relative(y, truth, [(signal * x + noise * z).to(dtype)], what="forward_jump")
    table = schedule.reverse_table("v").to(device)
    p, q, c, d, sigma = (column.view(-1, 1).to(compute) for column in table[t].unbind(1)[:5])
    for clip in (None, 1.0):
        x0 = p * x + q * output
        eager = (c * (x0 if clip is None else x0.clamp(-clip, clip)) + d * x + sigma * z).to(dtype)
        y = pynn.ops.reverse_step(x, t, output, table, clip=clip, noise=z)
        args = t, output.double(), schedule, "v", "fixed_small", z.double(), None, clip
        assert_relative(y, reverse_reference(x.double(), *args)[0], [eager], what=f"reverse_step, clip {clip}")


def test_exact_integers(backend):
    """Coefficients that are powers of two and integer data: every dtype gives the exact result."""
    table = torch.tensor([[1.0, 0.0], [0.25, 0.25], [0.0625, 0.5]], dtype=torch.float64, device=backend.device)
    t = torch.tensor([0, 1, 0, 1], device=backend.device)
    signal = torch.tensor([0.5, 0.25, 0.5, 0.25]).view(4, 1)
    for dtype in DTYPES:
        x, noise = integers((4, 37), dtype, device=backend.device), integers((4, 37), dtype, device=backend.device)
        y = pynn.ops.forward_jump(x, t, table, noise=noise * 0)
        assert_bitwise(y.cpu(), (signal * x.cpu().double()).to(dtype), f"{dtype}")
        half = pynn.ops.forward_jump(x, torch.zeros_like(t), table, noise=noise)
        assert_bitwise(half, (0.5 * x.double() + 0.5 * noise.double()).to(dtype), f"{dtype} with noise")


def test_layouts_and_guards(backend):
    schedule, shape = SCHEDULES["linear"], (4, 3, 6, 5)
    x, output, noise, v, dy = (tensor.to(backend.device) for tensor in data(shape, torch.float32, 1, 5))
    t = torch.tensor([3, 0, 19, 7], device=backend.device)
    table = schedule.reverse_table("v", "learned_range").to(backend.device)
    forward = schedule.forward_table.to(backend.device)
    loss_table = schedule.loss_table("v").to(backend.device)

    def everything(x, output, noise, v, dy):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, output, v)]
        y = pynn.ops.reverse_step(leaves[0], t, leaves[1], table, variance=leaves[2], clip=1.0, noise=noise)
        jumped = pynn.ops.forward_jump(leaves[0], t, forward, noise=noise)
        loss = pynn.ops.diffusion_loss(leaves[1], leaves[0], t, loss_table, noise=noise)
        grads = torch.autograd.grad((y, jumped, loss), leaves, (dy, dy, torch.ones_like(loss)))
        return [y.detach(), jumped.detach(), loss.detach(), *grads]

    expected = everything(x, output, noise, v, dy)
    operands = [x, output, noise, v, dy]
    for i in range(5):
        for name, variant in layouts(operands[i]):
            got = everything(*operands[:i], variant, *operands[i + 1 :])
            for a, b in zip(got, expected, strict=True):
                assert_bitwise(a, b, f"operand {i}, {name}")
    flat = everything(*operands[:4], constant(shape, 0.5, torch.float32).to(backend.device))
    full = everything(*operands[:4], torch.full(shape, 0.5, device=backend.device))
    for a, b in zip(flat, full, strict=True):
        assert_bitwise(a, b, "zero-stride grad_output")
    guarded = [Canary(operand) for operand in operands]
    for a, b in zip(everything(*(canary.tensor for canary in guarded)), expected, strict=True):
        assert_bitwise(a, b, "canaries")
    for canary in guarded:
        canary.assert_untouched()


def test_bitwise_reproducible(backend):
    schedule = SCHEDULES["cosine"]
    x, output = (tensor.to(backend.device) for tensor in data((8, 3, 50, 41), torch.float32, 2, 2))
    t = torch.arange(8, device=backend.device) * 2
    keys = torch.randint(2**62, (8, 2), device=backend.device)
    table, forward = (m.to(backend.device) for m in (schedule.reverse_table("v"), schedule.forward_table))
    loss_table = schedule.loss_table("v").to(backend.device)

    def run(rows=slice(None)):
        return (
            pynn.ops.forward_jump(x[rows], t[rows], forward, seed=keys[rows]),
            pynn.ops.reverse_step(x[rows], t[rows], output[rows], table, clip=1.0, seed=keys[rows]),
            pynn.ops.diffusion_loss(output[rows], x[rows], t[rows], loss_table, seed=keys[rows]),
        )

    expected = run()
    with threads(2):
        for a, b in zip(run(), expected, strict=True):
            assert_bitwise(a, b, "two threads")
    for a, b in zip(run(), expected, strict=True):
        assert_bitwise(a, b, "second run")
    for a, b in zip(run(slice(2, 5)), expected, strict=True):
        assert_bitwise(a, b[2:5], "batch slice")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [1, 3, 37, 64, 1000])
@pytest.mark.parametrize("noise_source", ["one key", "a key per sample", "given"])
def test_same_bits_as_the_cpu(backend, dtype, inner, noise_source):
    """Every backend computes the same steps in the same order; only the order in which a loss is summed differs."""
    if backend.name == "cpu":
        pytest.skip("cpu: it is what the others are compared with")
    schedule, shape = SCHEDULES["cosine"], (7, inner)
    x, output, v, noise, dy = data(shape, dtype, inner, 5)
    t, s = timesteps(inner, 7)
    keys = {"one key": torch.tensor([SEED, 5]), "a key per sample": torch.randint(2**62, (7, 2)), "given": None}
    key, noise = keys[noise_source], noise if noise_source == "given" else None
    # exp of a float64 is the one function that math libraries round differently.
    learned = dtype is not torch.float64
    table = schedule.reverse_table("v", "learned_range" if learned else "fixed_small")
    variance, losses = v.clamp(-1, 1) if learned else None, torch.linspace(-1, 1, 7).to(loss_dtype(dtype))
    reverse = (x, output, variance, t, table, -1.0, 1.0, noise, key)
    loss = (output, x, t, schedule.loss_table("v"), noise, key)
    calls = {
        "forward_jump_fwd": (x, t, s, schedule.forward_table, noise, key, True),
        "forward_jump_bwd": (dy, t, s, schedule.forward_table, True),
        "reverse_step_fwd": (*reverse, True),
        "reverse_step_bwd": (dy, *reverse),
        "diffusion_loss_fwd": loss,
        "diffusion_loss_bwd": (losses, *loss, True),
    }
    for name, args in calls.items():
        expected = getattr(torch.ops.pynn, name)(*args)
        moved = [a.to(backend.device) if isinstance(a, torch.Tensor) else a for a in args]
        got = getattr(backend.ops, name)(*moved)
        if name == "diffusion_loss_fwd":
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-6 if learned else 1e-14, atol=0)
            continue
        pairs = zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]
        for i, (a, b) in enumerate(pairs):
            assert_bitwise(a.cpu(), b, f"{name} result {i}")


def test_timestep_outside_the_table_gives_nan(backend):
    """On a GPU the host does not read t: a wrong one must neither read outside the table nor pass for a result."""
    if backend.device == "cpu":
        pytest.skip(f"{backend.name}: timesteps of CPU tensors are checked before any kernel runs")
    schedule, x = SCHEDULES["linear"], torch.randn(4, 33, device=backend.device)
    t = torch.tensor([3, -1, T, 2**40], device=backend.device)
    forward, reverse, loss_table = schedule.forward_table, schedule.reverse_table(), schedule.loss_table()
    for got in (
        pynn.ops.forward_jump(x, t, forward.to(backend.device), seed=0),
        pynn.ops.reverse_step(x, t, x, reverse.to(backend.device), seed=0),
        pynn.ops.diffusion_loss(x, x, t, loss_table.to(backend.device), seed=0).view(4, 1),
    ):
        assert got[0].isfinite().all()
        assert got[1:].isnan().all()


def test_loss_regenerates_the_noise_of_the_jump(backend):
    schedule, x0 = SCHEDULES["cosine"], data((5, 3, 8), torch.float32, 3).to(backend.device)
    t = torch.arange(5, device=backend.device)
    _, z = pynn.ops.forward_jump(x0, t, schedule.forward_table.to(backend.device), seed=11, return_noise=True)
    loss = pynn.ops.diffusion_loss(z, x0, t, schedule.loss_table("epsilon").to(backend.device), seed=11)
    assert_bitwise(loss, torch.zeros_like(loss))


def test_steps_compose_to_the_jump():
    """Mean and variance of T forward steps equal those of the jump; one step is the jump s = t - 1."""
    schedule = SCHEDULES["linear"]
    x, zeros = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    mean, variance = x, 0.0
    for t in range(T):
        mean = pynn.ops.forward_step(mean, t, schedule.forward_table, noise=zeros)
        sigma = pynn.ops.forward_step(zeros, t, schedule.forward_table, noise=x).item()
        variance = variance * (1 - schedule.betas[t].item()) + sigma**2
    jump_mean = pynn.ops.forward_jump(x, T - 1, schedule.forward_table, noise=zeros)
    jump_sigma = pynn.ops.forward_jump(zeros, T - 1, schedule.forward_table, noise=x)
    torch.testing.assert_close(mean, jump_mean, rtol=1e-12, atol=0)
    assert variance == pytest.approx(jump_sigma.item() ** 2, rel=1e-12)
    y = pynn.ops.forward_step(x, 7, schedule.forward_table, noise=x)
    assert_bitwise(y, pynn.ops.forward_jump(x, 7, schedule.forward_table, 6, noise=x))
    beta = schedule.betas[7]
    torch.testing.assert_close(y, (1 - beta).sqrt() * x + beta.sqrt() * x, rtol=1e-12, atol=0)


def test_no_noise_at_the_last_step(backend):
    schedule, x = SCHEDULES["linear"], data((4, 9), torch.float32, 4).to(backend.device)
    for variance_type in VARIANCE_TYPES:
        table = schedule.reverse_table("epsilon", variance_type).to(backend.device)
        extra = {"variance": torch.zeros_like(x)} if variance_type == "learned_range" else {}
        a, b = (pynn.ops.reverse_step(x, 0, x, table, seed=seed, **extra) for seed in (1, 2))
        assert_bitwise(a, b)


def test_nonfinite_values_stay_where_they_are(backend):
    schedule = SCHEDULES["linear"]
    x = torch.tensor([[1.0, float("nan"), float("inf"), -float("inf"), 0.0]], device=backend.device)
    zeros, table = torch.zeros_like(x), schedule.reverse_table("epsilon").to(backend.device)
    for clip in (None, 1.0):
        got = pynn.ops.reverse_step(x, 5, zeros, table, clip=clip, noise=zeros)
        t = torch.tensor([5], device=backend.device)
        args = schedule, "epsilon", "fixed_small", zeros.double(), None, clip
        assert_nonfinite(got, reverse_reference(x.double(), t, zeros.double(), *args)[0], f"clip {clip}")


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (3, 0), (2, 0, 5)])
def test_empty(backend, shape):
    schedule, x = SCHEDULES["linear"], torch.zeros(shape, device=backend.device, requires_grad=True)
    y = pynn.ops.forward_jump(x, 3, schedule.forward_table.to(backend.device), seed=0)
    r = pynn.ops.reverse_step(x, 3, x, schedule.reverse_table().to(backend.device), seed=0)
    loss = pynn.ops.diffusion_loss(x, x, 3, schedule.loss_table().to(backend.device), seed=0)
    assert y.shape == r.shape == shape
    assert loss.shape == shape[:1]
    torch.autograd.grad((y, r), x, (y, r))


def test_gradcheck(backend):
    schedule, device = SCHEDULES["cosine"], backend.device
    x, output, v = (data((3, 5), torch.float64, seed).to(device).requires_grad_() for seed in range(3))
    t = torch.tensor([0, 4, 19], device=device)
    forward = schedule.forward_table.to(device)
    table = schedule.reverse_table("v", "learned_range").to(device)
    loss_table = schedule.loss_table("v", torch.rand(T)).to(device)

    def jump(x, noise):
        return pynn.ops.forward_jump(x, t, forward, t - 1, noise=noise)

    def reverse(x, output, v):
        return pynn.ops.reverse_step(x, t, output, table, variance=v, clip=1.0, seed=3)

    def loss(output, x0):
        return pynn.ops.diffusion_loss(output, x0, t, loss_table, seed=3)

    fast = backend.name == "interpret"  # along random directions, instead of every derivative by itself
    for fn, inputs in ((jump, (x, output)), (reverse, (x, output, v)), (loss, (output, x))):
        assert gradcheck(fn, inputs, fast_mode=fast)
        assert gradgradcheck(fn, inputs, fast_mode=fast)


def test_opcheck(backend):
    schedule, device = SCHEDULES["cosine"], backend.device
    x, output = (data((3, 5), torch.float32, seed).to(device) for seed in range(2))
    t, key = torch.tensor([0, 4, 19], device=device), torch.tensor([3, 0], device=device)
    forward, table = schedule.forward_table.to(device), schedule.reverse_table("v", "learned_range").to(device)
    ops, loss_table, loss = backend.ops, schedule.loss_table().to(device), torch.ones(3, device=device)
    check = torch.library.opcheck
    check(ops.normal.default, (x, key))
    check(ops.forward_jump_fwd.default, (x, t, t - 1, forward, None, key, True))
    check(ops.forward_jump_fwd.default, (x, t, None, forward, x, None, False))
    check(ops.forward_jump_bwd.default, (x, t, None, forward, True))
    check(ops.reverse_step_fwd.default, (x, output, None, t, table, -1.0, 1.0, None, key, True))
    check(ops.reverse_step_bwd.default, (x, x, output, output, t, table, None, None, x, None))
    check(ops.diffusion_loss_fwd.default, (output, x, t, loss_table, None, key))
    check(ops.diffusion_loss_bwd.default, (loss, output, x, t, loss_table, None, key, True))


def test_transforms(backend):
    schedule, device = SCHEDULES["cosine"], backend.device
    x, output, v = (data((3, 4), torch.float64, seed).to(device) for seed in range(3))
    t, key = torch.tensor([0, 4, 19], device=device), torch.tensor([3, 0], device=device)
    forward, loss_table = schedule.forward_table.to(device), schedule.loss_table("v").to(device)
    table = schedule.reverse_table("v", "learned_range").to(device)

    def jump(x, noise):
        return pynn.ops.forward_jump(x, t, forward, noise=noise)

    def reverse(x, output, v):
        return pynn.ops.reverse_step(x, t, output, table, variance=v, clip=1.0, seed=key)

    def loss(output, x0):
        return pynn.ops.diffusion_loss(output, x0, t, loss_table, seed=key)

    assert_all(jump, x, output)
    assert_all(reverse, x, output, v)
    assert_all(loss, output, x)
    if backend.name != "interpret":  # Triton's interpreter and a compiler that uses Triton exclude each other
        assert_compiles(reverse, x.float(), output.float(), v.float(), backend="inductor")


def test_compile_outside_func_is_refused():
    """torch would drop the backward silently there (pytorch issue 193279)."""
    table = SCHEDULES["cosine"].forward_table
    grad = torch.func.grad(lambda x: pynn.ops.forward_jump(x, 3, table, noise=torch.zeros(2, 2)).sum())
    with pytest.raises(Exception, match=r"inside torch\.func"):
        torch.compile(grad, fullgraph=True, backend="eager")(torch.ones(2, 2))
    torch._dynamo.reset()


def test_low_precision_model_output_is_accepted():
    """Under autocast the model answers in bfloat16 while the samples stay float32."""
    table, x = SCHEDULES["cosine"].reverse_table(), data((2, 8), torch.float32, 0)
    output = x.bfloat16()
    y = pynn.ops.reverse_step(x, 3, output, table, seed=0)
    assert_bitwise(y, pynn.ops.reverse_step(x, 3, output.float(), table, seed=0))


def test_explain_and_backend():
    x = torch.zeros(2, 3)
    with pynn.explain() as calls:
        pynn.ops.forward_jump(x, 3, SCHEDULES["linear"].forward_table, seed=0)
    assert [call.op for call in calls] == ["forward_jump_fwd"]
    assert calls[0].kernel == f"cpu/{pynn.backends.cpu_isa}"
    assert calls[0].shape == (2, 3)
    with pynn.backend("cuda"), pytest.raises(RuntimeError, match="forced"):
        pynn.ops.normal((4,), seed=0)
    with pytest.raises(ValueError, match="expected one of"), pynn.backend("gpu"):
        pass


def test_messages():
    x, schedule = torch.zeros(2, 3), SCHEDULES["linear"]
    table = schedule.forward_table
    for call, message in [
        (lambda: pynn.ops.forward_jump(x, T, table, seed=0), r"forward_jump: expected t in \[0, 19\], got 20"),
        (lambda: pynn.ops.forward_jump(x, 3, table, 3, seed=0), "expected s < t, got s = 3, t = 3"),
        (lambda: pynn.ops.forward_jump(x.int(), 3, table, seed=0), "expected x to be float64.*got int32"),
        (lambda: pynn.ops.forward_jump(x, torch.zeros(3).long(), table, seed=0), "one timestep per sample"),
        (lambda: pynn.ops.forward_jump(x, 3, table.float(), seed=0), "expected table to be float64"),
        (lambda: pynn.ops.forward_jump(x, 3, table, noise=x[:1]), "expected noise to have the shape of x"),
        (lambda: pynn.ops.reverse_step(x, 3, x[:, :2], schedule.reverse_table(), seed=0), "output to have the shape"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(ValueError, match="expected one of noise=, generator= and seed="):
        pynn.ops.forward_jump(x, 3, table, noise=x, seed=0)
    with pytest.raises(ValueError, match="noise= is a constant"):
        pynn.ops.reverse_step(x, 3, x, schedule.reverse_table(), noise=x.clone().requires_grad_())


def bad_call(rng: random.Random):
    """A random call of one of the dispatcher ops with one operand spoiled."""
    schedule, (batch, inner) = SCHEDULES["linear"], (rng.randint(2, 4), rng.randint(1, 6))
    x, t = torch.randn(batch, inner), torch.randint(T, (batch,))
    key = torch.tensor([rng.randrange(2**60), 0])
    forward, reverse = schedule.forward_table, schedule.reverse_table("v", "learned_range")
    loss, losses = schedule.loss_table(), torch.randn(batch)
    calls = {
        "normal": [x, key],
        "forward_jump_fwd": [x, t, None, forward, None, key, True],
        "forward_jump_bwd": [x, t, None, forward, True],
        "reverse_step_fwd": [x, x, x, t, reverse, -1.0, 1.0, None, key, True],
        "reverse_step_bwd": [x, x, x, x, t, reverse, -1.0, 1.0, x, None],
        "diffusion_loss_fwd": [x, x, t, loss, None, key],
        "diffusion_loss_bwd": [losses, x, x, t, loss, x, None, True],
    }
    name = rng.choice(list(calls))
    args = calls[name]
    spoil = {
        "rank": lambda a: a.new_zeros(()) if a is not t and (a.dim() != 1 or a is key) else a.new_zeros(2, 3, 4),
        "dtype": lambda a: a.to(torch.complex64),
        "bool": lambda a: a.to(torch.bool),
        "longer": lambda a: torch.cat((a, a, a)),
        "wide": lambda a: a.unsqueeze(-1).repeat(*[1] * a.dim(), 7),
        "sparse": lambda a: torch.sparse_coo_tensor((2, 3)),
    }
    position = rng.choice([i for i, a in enumerate(args) if isinstance(a, torch.Tensor)])
    kind = rng.choice(list(spoil))
    if args[position] is t and rng.random() < 0.5:
        args[position], kind = torch.full((batch,), rng.choice([-1, T, 2**40, -(2**62)])), "value"
    elif name != "normal" and rng.random() < 0.1:
        wrong = {"forward_jump_fwd": 2, "reverse_step_fwd": 5, "diffusion_loss_fwd": 4}
        if name in wrong:
            args[wrong[name]] = {2: t, 5: 2.0, 4: x}[wrong[name]]
            kind, position = "combination", wrong[name]
            return f"{name} {kind}", lambda: getattr(torch.ops.pynn, name).default(*args)
    # x may have any rank and length in normal and in the jump: only spoil what is wrong there too.
    if args[position] is x and name in ("normal", "forward_jump_fwd", "forward_jump_bwd"):
        kind = rng.choice(["dtype", "bool", "scalar"])
        args[position] = x.new_zeros(()) if kind == "scalar" else spoil[kind](x)
    elif args[position].dtype is torch.float64 and kind == "longer":  # a longer table is a longer schedule
        args[position], kind = args[position][:, :1], "narrow"
    elif kind != "value":
        args[position] = spoil[kind](args[position])
    return f"{name} argument {position} {kind}", lambda: getattr(torch.ops.pynn, name).default(*args)


def test_bad_input():
    assert_rejects("test_diffusion", 1500)
