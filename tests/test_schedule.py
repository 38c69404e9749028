"""Schedules against high-precision arithmetic and the published values."""

import decimal
import math
from decimal import Decimal

import pytest
import torch
from policy import ulp

from pynn.diffusion import GaussianDiffusion, Schedule

SCHEDULES = {
    "linear": Schedule.linear(1000),
    "linear-200": Schedule.linear(200),
    "cosine": Schedule.cosine(1000),
    "cosine-50": Schedule.cosine(50),
    "sigmoid": Schedule.sigmoid(1000),
    "scaled_linear": Schedule.scaled_linear(1000),
}


def exact_alphas_cumprod(betas: torch.Tensor) -> list[Decimal]:
    """The products in 60 decimal digits, from the float64 betas."""
    decimal.getcontext().prec = 60
    product, products = Decimal(1), []
    for beta in betas.tolist():
        product *= 1 - Decimal(beta)
        products.append(product)
    return products


def assert_one_ulp(table: torch.Tensor, truth: list[Decimal], what: str):
    """The float32 cast of a float64 table is within 1 ulp of the true value, everywhere."""
    exact = torch.tensor([float(value) for value in truth], dtype=torch.float64)
    distance = (table.float().double() - exact).abs() / ulp(exact, torch.float32)
    assert distance.max() <= 1, f"{what}: {distance.max():.2f} ulp at index {int(distance.argmax())}"


@pytest.mark.parametrize("name", SCHEDULES)
def test_fp32_tables_are_within_one_ulp(name):
    schedule = SCHEDULES[name]
    signal = exact_alphas_cumprod(schedule.betas)
    before = [Decimal(1), *signal[:-1]]
    betas = [Decimal(beta) for beta in schedule.betas.tolist()]
    assert_one_ulp(schedule.alphas_cumprod, signal, "alphas_cumprod")
    assert_one_ulp(schedule.noise_power, [1 - a for a in signal], "1 - alphas_cumprod")
    posterior = [b * (1 - p) / (1 - a) for a, p, b in zip(signal, before, betas, strict=True)]
    assert_one_ulp(schedule.posterior_variance, posterior, "posterior_variance")
    table = schedule.reverse_table("epsilon", "fixed_small")
    columns = {
        0: [1 / a.sqrt() for a in signal],
        1: [-((1 - a) / a).sqrt() for a in signal],
        2: [p.sqrt() * b / (1 - a) for a, p, b in zip(signal, before, betas, strict=True)],
        3: [(1 - b).sqrt() * (1 - p) / (1 - a) for a, p, b in zip(signal, before, betas, strict=True)],
        4: [v.sqrt() for v in posterior],
    }
    for column, truth in columns.items():
        assert_one_ulp(table[:, column], truth, f"reverse table column {column}")
    forward = schedule.forward_table
    assert forward[0].tolist() == [1.0, 0.0]
    assert_one_ulp(forward[1:, 0], signal, "forward table")


def test_published_values():
    cosine = Schedule.cosine(1000)
    assert cosine.betas[0].item() == pytest.approx(4.1284e-5, rel=1e-4)
    assert int((cosine.betas == 0.999).sum()) == 1
    assert cosine.alphas_cumprod[-1].item() == pytest.approx(2.429e-9, rel=1e-3)
    linear = Schedule.linear(1000)
    assert linear.betas[0].item() == pytest.approx(1e-4)
    assert linear.betas[-1].item() == pytest.approx(0.02)
    assert linear.alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-3)


def test_cosine_follows_its_knots():
    """a_t = f(t + 1) / f(0) with T + 1 knots, before the clip of the last betas."""
    schedule = Schedule.cosine(100)
    f = [math.cos((i / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(101)]
    expected = torch.tensor([f[t + 1] / f[0] for t in range(99)], dtype=torch.float64)
    torch.testing.assert_close(schedule.alphas_cumprod[:99], expected, rtol=1e-12, atol=0)


def test_zero_terminal_snr():
    schedule = Schedule.linear(1000).zero_terminal_snr()
    assert schedule.alphas_cumprod[-1].item() == 0.0
    assert schedule.noise_power[-1].item() == 1.0
    torch.testing.assert_close(schedule.alphas_cumprod[0], Schedule.linear(1000).alphas_cumprod[0], rtol=1e-12, atol=0)
    schedule.reverse_table("v")
    with pytest.raises(ValueError, match="undefined at zero signal"):
        schedule.reverse_table("epsilon")


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_respaced_keeps_the_levels(steps):
    schedule = Schedule.cosine(1000)
    short = schedule.respaced(steps)
    assert len(short) == steps
    assert short.timesteps[-1] == 999
    assert torch.equal(short.timesteps.unique(), short.timesteps)
    expected = schedule.alphas_cumprod[short.timesteps]
    torch.testing.assert_close(short.alphas_cumprod, expected, rtol=1e-10, atol=1e-18)


def test_min_snr_weights():
    schedule = Schedule.linear(1000)
    expected = torch.minimum(schedule.snr, torch.tensor(5.0)) / schedule.snr
    assert torch.equal(schedule.min_snr_weights("epsilon"), expected)
    table = schedule.loss_table("v", schedule.min_snr_weights("v"))
    torch.testing.assert_close(table[:, 0] ** 2 + table[:, 1] ** 2, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(torch.zeros(3)), "every beta"),
        (lambda: Schedule(torch.tensor([0.5, 1.5])), "every beta"),
        (lambda: Schedule(torch.tensor([1.0, 0.5])), "every beta"),
        (lambda: Schedule(torch.tensor([float("nan")])), "every beta"),
        (lambda: Schedule(torch.zeros(2, 2)), "shape"),
        (lambda: Schedule.cosine(0), "positive int"),
        (lambda: Schedule.linear(2.5), "positive int"),
        (lambda: Schedule.linear(10).respaced(11), "1 <= steps"),
        (lambda: Schedule.linear(10).reverse_table("noise"), "prediction_type"),
        (lambda: Schedule.linear(10).reverse_table("v", "large"), "variance_type"),
        (lambda: Schedule.linear(10).loss_table("mean"), "prediction_type"),
        (lambda: Schedule.linear(10).loss_table("v", torch.ones(9)), "weights"),
        (lambda: GaussianDiffusion(Schedule.linear(10), "eps"), "prediction_type"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class TestProcess:
    """GaussianDiffusion with models whose answer is known."""

    @staticmethod
    def oracle(schedule, x0, prediction_type):
        """The model that knows x_0, in each parametrisation."""

        def model(x, t):
            a = schedule.alphas_cumprod[t].view(-1, 1, 1, 1).float()
            z = (x - a.sqrt() * x0) / (1 - a).sqrt()
            return {
                "epsilon": z,
                "sample": x0.expand_as(x),
                "v": a.sqrt() * z - (1 - a).sqrt() * x0,
                "score": -z / (1 - a).sqrt(),
            }[prediction_type]

        return model

    @pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v", "score"])
    def test_oracle_is_recovered_and_has_no_loss(self, prediction_type):
        schedule = Schedule.linear(50)
        process = GaussianDiffusion(schedule, prediction_type)
        x0 = torch.rand(4, 1, 4, 4) * 2 - 1
        model = self.oracle(schedule, x0, prediction_type)
        torch.testing.assert_close(process.sample(model, x0.shape, seed=1), x0, rtol=1e-4, atol=1e-4)
        assert process.loss(model, x0, generator=torch.Generator().manual_seed(0)).item() < 1e-6

    def test_respaced_sampling_tells_the_original_timesteps(self):
        schedule = Schedule.cosine(100).respaced(5)
        told = []

        def model(x, t):
            told.append(int(t[0]))
            return torch.zeros_like(x)

        GaussianDiffusion(schedule, "v").sample(model, (2, 3), seed=0)
        assert told == schedule.timesteps.flip(0).tolist()

    def test_samples_do_not_depend_on_their_batch(self):
        process = GaussianDiffusion(Schedule.cosine(10), "v")
        model = lambda x, t: x * 0.5 + t.view(-1, 1, 1, 1)  # noqa: E731
        seeds = torch.arange(6)
        batch = process.sample(model, (6, 1, 8, 8), seed=seeds)
        assert torch.equal(process.sample(model, (3, 1, 8, 8), seed=seeds[2:5]), batch[2:5])

    def test_guidance_and_trajectory(self):
        process = GaussianDiffusion(Schedule.cosine(8), "sample", clip_sample=None)
        model = lambda x, t, level: level.view(-1, 1).expand_as(x)  # noqa: E731
        level, none = torch.full((3,), 2.0), {"level": torch.full((3,), 1.0)}
        x, path = process.sample(
            model, (3, 4), seed=0, guidance_scale=3.0, unconditional=none, trajectory_every=2, level=level
        )
        torch.testing.assert_close(x, torch.full((3, 4), 4.0))  # 1 + 3 (2 - 1)
        assert [t for t, _ in path] == [8, 6, 4, 2, 0]
        with pytest.raises(ValueError, match="unconditional"):
            process.sample(model, (3, 4), guidance_scale=2.0, level=level)

    def test_learned_range_splits_the_output(self):
        process = GaussianDiffusion(Schedule.cosine(8), "v", "learned_range")
        sample = process.sample(lambda x, t: torch.cat((x, -x), 1).clamp(-1, 1), (2, 1, 4, 4), seed=0)
        assert sample.isfinite().all()
        with pytest.raises(ValueError, match="2 channels"):
            process.sample(lambda x, t: x, (2, 1, 4, 4), seed=0)
