"""Noise schedules: how much signal and noise a sample holds at each timestep."""

from __future__ import annotations

import functools
import math

import torch

PREDICTION_TYPES = ("epsilon", "sample", "v", "score", "mean")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")


class Schedule:
    """A variance-preserving noise schedule, kept in float64.

        x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) z,   a_t = prod_{i <= t} (1 - beta_i),   t = 0 .. T-1

    Index t is the paper's step t + 1; the clean data is index -1 with a_{-1} = 1.

    Args:
        betas: (T,) noise added by each step, each in (0, 1]; 1 only in the last place (zero terminal SNR).
        timesteps: (T,) what the model is told at each index; 0 .. T-1 by default. `respaced` sets it.
    Attributes:
        betas, alphas_cumprod, noise_power: (T,) float64; noise_power is 1 - alphas_cumprod without cancellation.
        timesteps: (T,) int64.
    Raises:
        ValueError: betas of another shape or outside their range.
    """

    def __init__(self, betas: torch.Tensor, timesteps: torch.Tensor | None = None):
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.dim() != 1 or betas.numel() == 0:
            raise ValueError(f"Schedule: expected betas of shape (T,) with T > 0, got {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas <= 1)).all()) or bool((betas[:-1] == 1).any()):
            raise ValueError("Schedule: expected every beta in (0, 1), and at most the last one equal to 1")
        log_signal = torch.log1p(-betas).cumsum(0)  # -inf where beta is 1
        self.betas = betas
        self.alphas_cumprod = torch.exp(log_signal)
        self.noise_power = -torch.expm1(log_signal)
        self.timesteps = torch.arange(len(betas)) if timesteps is None else timesteps.to("cpu", torch.int64)

    def __len__(self) -> int:
        return self.betas.numel()

    @staticmethod
    def linear(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Betas from beta_start to beta_end, both scaled by 1000 / T (Ho et al. 2020; the scaling keeps the total)."""
        scale = 1000 / _count(timesteps)
        return Schedule(
            torch.linspace(scale * beta_start, scale * beta_end, timesteps, dtype=torch.float64).clamp(max=0.999)
        )

    @staticmethod
    def scaled_linear(timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
        """Betas linear in their square root (latent diffusion), not rescaled with T."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, _count(timesteps), dtype=torch.float64)
        return Schedule(roots**2)

    @staticmethod
    def cosine(timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """a_t = f(t + 1) / f(0), f(i) = cos^2((i / T + s) / (1 + s) pi / 2) (Nichol and Dhariwal 2021, equation 17)."""
        knots = torch.arange(_count(timesteps) + 1, dtype=torch.float64) / timesteps
        angle = (knots + s) / (1 + s) * math.pi / 2
        # 1 - cos^2(b) / cos^2(a) = sin(b - a) sin(b + a) / cos^2(a): no cancellation between neighbours.
        a, b = angle[:-1], angle[1:]
        betas = torch.sin(b - a) * torch.sin(b + a) / torch.cos(a) ** 2
        return Schedule(betas.clamp(max=max_beta))

    @staticmethod
    def sigmoid(timesteps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Schedule:
        """a_t falls along a sigmoid from start to end (Jabri et al. 2022, arXiv 2212.11972, algorithm 1)."""
        knots = torch.arange(_count(timesteps) + 1, dtype=torch.float64) / timesteps
        value = torch.sigmoid(-((knots * (end - start) + start) / tau))
        v_end = torch.sigmoid(torch.tensor(-end / tau, dtype=torch.float64))
        signal = value - v_end
        betas = (value[:-1] - value[1:]) / signal[:-1]
        return Schedule(betas.clamp(max=0.999))

    def zero_terminal_snr(self) -> Schedule:
        """The schedule shifted and scaled so that the last step holds no signal (Lin et al. 2023, algorithm 1)."""
        root = self.alphas_cumprod.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        signal = root**2
        before = torch.cat((torch.ones(1, dtype=torch.float64), signal[:-1]))
        return Schedule(1 - signal / before)

    def respaced(self, steps: int) -> Schedule:
        """A shorter schedule through every T/steps-th level, last level included, for faster sampling.

        Its `timesteps` hold the original indices, which the model still expects.
        """
        if not 0 < steps <= len(self):
            raise ValueError(f"Schedule.respaced: expected 1 <= steps <= {len(self)}, got {steps}")
        index = torch.linspace(len(self) - 1, 0, steps, dtype=torch.float64).round().to(torch.int64).flip(0)
        if steps == 1:
            index = torch.tensor([len(self) - 1])
        signal, noise = self.alphas_cumprod[index], self.noise_power[index]
        signal_before = torch.cat((torch.ones(1, dtype=torch.float64), signal[:-1]))
        noise_before = torch.cat((torch.zeros(1, dtype=torch.float64), noise[:-1]))
        short = Schedule((noise - noise_before) / signal_before, self.timesteps[index])
        short.alphas_cumprod, short.noise_power = signal, noise  # the very levels, not their rounded products
        return short

    @property
    def snr(self) -> torch.Tensor:
        """(T,) signal-to-noise ratio a_t / (1 - a_t)."""
        return self.alphas_cumprod / self.noise_power

    @property
    def posterior_variance(self) -> torch.Tensor:
        """(T,) variance of x_{t-1} given x_t and x_0: beta_t (1 - a_{t-1}) / (1 - a_t); 0 at t = 0."""
        noise_before = torch.cat((torch.zeros(1, dtype=torch.float64), self.noise_power[:-1]))
        return self.betas * noise_before / self.noise_power

    @functools.cached_property
    def forward_table(self) -> torch.Tensor:
        """(T + 1, 2) float64: a and 1 - a, clean data in row 0."""
        clean = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        return torch.cat((clean, torch.stack((self.alphas_cumprod, self.noise_power), 1)))

    def reverse_table(self, prediction_type: str = "epsilon", variance_type: str = "fixed_small") -> torch.Tensor:
        """(T, 7) float64 coefficients of `pynn.ops.reverse_step`.

        Args:
            prediction_type: what the model predicts: "epsilon" (the noise), "sample" (x_0), "v" (sqrt(a) z -
                sqrt(1-a) x_0, Salimans and Ho 2022), "score" (-z / sqrt(1-a)), "mean" (of x_{t-1}, used as it is).
            variance_type: "fixed_small" (posterior variance), "fixed_large" (beta), "learned_range" (between the two).
        Raises:
            ValueError: another name.
        """
        _expect("prediction_type", prediction_type, PREDICTION_TYPES)
        _expect("variance_type", variance_type, VARIANCE_TYPES)
        signal, noise, beta = self.alphas_cumprod, self.noise_power, self.betas
        root_signal, root_noise = signal.sqrt(), noise.sqrt()
        zero, one = torch.zeros_like(signal), torch.ones_like(signal)
        x_to_x0, output_to_x0 = {
            "epsilon": (1 / root_signal, -root_noise / root_signal),
            "sample": (zero, one),
            "v": (root_signal, -root_noise),
            "score": (1 / root_signal, noise / root_signal),
            "mean": (zero, one),
        }[prediction_type]
        signal_before = torch.cat((one[:1], signal[:-1]))
        noise_before = torch.cat((zero[:1], noise[:-1]))
        x0_to_mean = signal_before.sqrt() * beta / noise
        x_to_mean = (signal / signal_before).sqrt() * noise_before / noise
        if prediction_type == "mean":
            x0_to_mean, x_to_mean = one, zero
        posterior = self.posterior_variance
        # The posterior variance of t = 0 is 0; its logarithm is clipped to that of t = 1 (Nichol and Dhariwal 2021).
        floor = torch.cat((posterior[1:2] if len(self) > 1 else beta[:1], posterior[1:]))
        noisy = (torch.arange(len(self)) > 0).to(torch.float64)
        sigma = {"fixed_small": posterior.sqrt(), "fixed_large": beta.sqrt() * noisy, "learned_range": noisy}[
            variance_type
        ]
        columns = (x_to_x0, output_to_x0, x0_to_mean, x_to_mean, sigma, floor.log(), beta.log())
        table = torch.stack(columns, 1)
        if not bool(table.isfinite().all()):
            raise ValueError(f"Schedule: {prediction_type} prediction is undefined at zero signal; predict v or sample")
        return table

    def loss_table(self, prediction_type: str = "epsilon", weights: torch.Tensor | None = None) -> torch.Tensor:
        """(T, 3) float64 coefficients of `pynn.ops.diffusion_loss`: target = c0 x_0 + c1 z, and the loss weight.

        Args:
            prediction_type: as `reverse_table`, without "mean".
            weights: (T,) weight of each timestep, 1 by default; `min_snr_weights` makes some.
        """
        _expect("prediction_type", prediction_type, PREDICTION_TYPES[:-1])
        root_signal, root_noise = self.alphas_cumprod.sqrt(), self.noise_power.sqrt()
        zero, one = torch.zeros_like(root_signal), torch.ones_like(root_signal)
        target = {
            "epsilon": (zero, one),
            "sample": (one, zero),
            "v": (-root_noise, root_signal),
            "score": (zero, -1 / root_noise),
        }
        weight = one if weights is None else torch.as_tensor(weights, dtype=torch.float64, device="cpu")
        if weight.shape != one.shape:
            raise ValueError(
                f"Schedule.loss_table: expected weights of shape {tuple(one.shape)}, got {tuple(weight.shape)}"
            )
        return torch.stack((*target[prediction_type], weight), 1)

    def min_snr_weights(self, prediction_type: str = "epsilon", gamma: float = 5.0) -> torch.Tensor:
        """(T,) Min-SNR-gamma loss weights (Hang et al. 2023, arXiv 2303.09556)."""
        _expect("prediction_type", prediction_type, ("epsilon", "sample", "v"))
        clipped = self.snr.clamp(max=gamma)
        return {"epsilon": clipped / self.snr, "sample": clipped, "v": clipped / (self.snr + 1)}[prediction_type]


def _count(timesteps: int) -> int:
    if not isinstance(timesteps, int) or timesteps < 1:
        raise ValueError(f"Schedule: expected timesteps as a positive int, got {timesteps!r}")
    return timesteps


def _expect(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"Schedule: expected {name} in {', '.join(allowed)}, got {value!r}")
