"""Denoising diffusion steps (Ho et al. 2020, arXiv 2006.11239), each one pass over memory with its noise made inside.

Timesteps are indices 0 .. T-1, as in most code bases: index t is the paper's x_{t+1}, and the clean data is index -1.

    forward_jump    x_t = sqrt(a_t / a_s) x_s + sqrt(1 - a_t / a_s) z             a = alphas_cumprod, a_{-1} = 1
    forward_step    the jump t-1 -> t: sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z
    reverse_step    x_{t-1} = mean(x_t, model output) + sigma_t z, sigma_0 = 0
    diffusion_loss  mean((model output - target)^2) per sample, with the noise of a jump regenerated from its key

The coefficients come from float64 tables of pynn.diffusion.Schedule, gathered per sample inside the kernels: `t` is a
tensor on the data's device and nothing waits for its values. Noise is `noise=`, or made from `generator=` / `seed=`.
"""

from __future__ import annotations

import torch

from ._diffusion_functions import DiffusionLoss, ForwardJump, ReverseStep
from ._function import call
from .random import make_key


def _timesteps(t: int | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return t if isinstance(t, torch.Tensor) else torch.full((1,), t, dtype=torch.int64, device=x.device)


def _noise(x, noise, generator, seed, *, differentiable=False):
    """(noise, key) operands of a kernel, exactly one of them a tensor."""
    if noise is None:
        return None, make_key(x.device, generator=generator, seed=seed)
    if generator is not None or seed is not None:
        raise ValueError("pynn: expected one of noise=, generator= and seed=, got noise= and another")
    if noise.requires_grad and not differentiable:
        raise ValueError("pynn: noise= is a constant of this op, got a tensor that requires grad")
    return noise, None


def forward_jump(
    x: torch.Tensor,
    t: int | torch.Tensor,
    table: torch.Tensor,
    s: int | torch.Tensor | None = None,
    *,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | torch.Tensor | None = None,
    return_noise: bool = False,
):
    """Noises samples from timestep s to timestep t in one step.

        x_t = sqrt(a_t / a_s) x_s + sqrt(1 - a_t / a_s) z,   a = alphas_cumprod, a_{-1} = 1

    Args:
        x: (B, ...) samples at timestep s; float64, float32, float16 or bfloat16.
        t: timestep reached, int64 (B,) or one for all, in 0 .. T-1.
        table: float64 (T + 1, 2), `Schedule.forward_table`.
        s: timestep of x, same form as t, s < t; None or -1 is clean data.
        noise: (B, ...) like x, instead of generated noise; may require grad.
        generator, seed: where generated noise comes from, see `pynn.ops.random.make_key`; seed may be int64 (B, 2),
            one (seed, offset) key per sample.
        return_noise: also return z.
    Returns:
        x_t like x, or (x_t, z).
    Raises:
        RuntimeError: shapes, dtypes, devices or timesteps do not fit.
        ValueError: more than one source of noise.
    """
    noise, key = _noise(x, noise, generator, seed, differentiable=True)
    t = _timesteps(t, x)
    s = None if s is None else _timesteps(s, x)
    if s is not None and s.numel() == 1 != t.numel():
        s = s.expand(t.shape)
    y, z = call(ForwardJump, x, t, s, table, noise, key, return_noise)
    return (y, z) if return_noise else y


def forward_step(x: torch.Tensor, t: int | torch.Tensor, table: torch.Tensor, **noise_source):
    """Noises samples from timestep t-1 to timestep t: sqrt(1 - beta_t) x + sqrt(beta_t) z.

    Arguments, result and errors as `forward_jump` with s = t - 1.
    """
    t = _timesteps(t, x)
    return forward_jump(x, t, table, t - 1, **noise_source)


def reverse_step(
    x: torch.Tensor,
    t: int | torch.Tensor,
    output: torch.Tensor,
    table: torch.Tensor,
    *,
    variance: torch.Tensor | None = None,
    clip: float | tuple[float, float] | None = None,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | torch.Tensor | None = None,
    return_x0: bool = False,
):
    """Samples x_{t-1} given x_t and the model's output (Ho et al. 2020, equations 6, 7, 11).

        x0 = clip(p_t x + q_t output),   mean = c_t x0 + d_t x,   x_{t-1} = mean + sigma_t z,   sigma_0 = 0

    with p, q for the model's prediction type and sigma for the variance type, both chosen with the table.

    Args:
        x: (B, ...) samples at timestep t.
        t: int64 (B,) or one for all, in 0 .. T-1.
        output: (B, ...) like x, what the model predicted.
        table: float64 (T, 7), `Schedule.reverse_table(prediction_type, variance_type)`.
        variance: (B, ...) like x, the model's v in [-1, 1] for a learned_range table: the log-variance is
            interpolated between its bounds (Nichol and Dhariwal 2021, equation 15).
        clip: x0 is clipped to [-clip, clip] or to (low, high).
        noise, generator, seed: as in `forward_jump`; noise= is a constant here.
        return_x0: also return the (clipped) x0; it carries no gradient.
    Returns:
        x_{t-1} like x, or (x_{t-1}, x0). Gradients flow to x, output and variance.
    Raises:
        RuntimeError: shapes, dtypes, devices or timesteps do not fit.
        ValueError: more than one source of noise.
    """
    noise, key = _noise(x, noise, generator, seed)
    low, high = (-clip, clip) if isinstance(clip, int | float) else (clip or (None, None))
    output = output.to(x.dtype)
    variance = variance.to(x.dtype) if variance is not None else None
    y, x0 = call(ReverseStep, x, output, variance, _timesteps(t, x), table, low, high, noise, key, return_x0)
    return (y, x0) if return_x0 else y


def diffusion_loss(
    output: torch.Tensor,
    x0: torch.Tensor,
    t: int | torch.Tensor,
    table: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted squared error of a model's output, per sample; the noise is regenerated, never stored.

        loss_b = w_t mean((output_b - (g_t x0_b + h_t z_b))^2)

    where z is the noise that `forward_jump` with the same noise source added to x0.

    Args:
        output: (B, ...) model output.
        x0: (B, ...) like output, clean data.
        t: int64 (B,) or one for all.
        table: float64 (T, 3), `Schedule.loss_table(prediction_type, weights)`.
        noise, generator, seed: the noise of the jump; pass the same seed (key).
    Returns:
        (B,) losses in float32 (float64 for float64). Gradients flow to output and x0.
    Raises:
        RuntimeError: shapes, dtypes, devices or timesteps do not fit.
        ValueError: more than one source of noise.
    """
    noise, key = _noise(output, noise, generator, seed)
    return call(DiffusionLoss, output, x0.to(output.dtype), _timesteps(t, output), table, noise, key)
