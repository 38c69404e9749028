"""The diffusion ops in torch operations. Used for second derivatives, where a fused kernel would not pay."""

from __future__ import annotations

import torch

from .. import backends


def accumulate_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def noise_of(x, noise, key):
    return noise if noise is not None else backends.op("normal", x)(x, key)


def _columns(table, t, x):
    """The table's columns at t, each shaped to broadcast over x, in x's compute dtype."""
    rows = table[t.reshape(-1)].to(accumulate_dtype(x))
    return [column.reshape(-1, *[1] * (x.dim() - 1)) for column in rows.unbind(1)]


def reverse_step(x, output, variance, t, table, low, high, z):
    p, q, c, d, sigma, log_min, log_max = _columns(table, t, x)
    x0 = p * x + q * output
    if low is not None:
        x0 = x0.clamp(low, high)
    if variance is not None:
        sigma = sigma * torch.exp(0.5 * (log_min + (variance + 1) / 2 * (log_max - log_min)))
    return (c * x0 + d * x + sigma * z).to(x.dtype)


def diffusion_loss(output, x0, t, table, z):
    from_x0, from_noise, weight = _columns(table, t, output)
    error = output - (from_x0 * x0 + from_noise * z)
    return (weight * error * error).reshape(output.shape[0], -1).mean(1).to(accumulate_dtype(output))
