"""Diffusion steps in Triton: one pass over memory, noise made in registers. See csrc/include/diffusion.h.

A program owns a tile of a few rows, or of a part of one row. It gathers the coefficients of its rows by timestep, casts
them once, and applies the arithmetic of csrc/include/diffusion_math.h step by step. A timestep outside the table gives
NaN: its value is not known to the host.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from .launch import Rows
from .philox import exp_ieee
from .tile import load, noise_of, store, tile_of

# Sizes are neither compiled in nor asked for divisibility: PACK says what is known of the row length.
_kernel = triton.jit(do_not_specialize=["timesteps", "low", "high", "batch", "units", "inner", "tiles"])


@triton.jit
def _timestep(t, rows, batch, SHARED_T: tl.constexpr):
    """Timestep of each row (ROWS, 1), or the one of all rows as a scalar; -2 beyond the batch, which no table has."""
    if SHARED_T:
        return tl.load(t)
    else:
        return tl.load(t + rows, mask=rows < batch, other=-2)


@triton.jit
def _jump_scales(t, s, table, rows, batch, timesteps, SHARED_T: tl.constexpr, COMPUTE: tl.constexpr):
    """sqrt(signal_t / signal_s) and sqrt(1 - signal_t / signal_s), computed in float64."""
    to = _timestep(t, rows, batch, SHARED_T)
    ok = (to >= 0) & (to < timesteps)
    if s is None:
        source = to * 0
    else:
        before = _timestep(s, rows, batch, SHARED_T)
        ok = ok & (before >= -1) & (before < to)
        source = 2 * (before + 1)
    target = 2 * (to + 1)
    to_signal = tl.load(table + target, mask=ok, other=float("nan"))
    to_noise = tl.load(table + target + 1, mask=ok, other=float("nan"))
    from_signal = tl.load(table + source, mask=ok, other=float("nan"))
    from_noise = tl.load(table + source + 1, mask=ok, other=float("nan"))
    ratio = to_signal / from_signal
    # The difference is taken where it cancels least.
    added = tl.where(to_noise < from_signal, (to_noise - from_noise) / from_signal, 1.0 - ratio)
    return tl.sqrt(ratio).to(COMPUTE), tl.sqrt(added).to(COMPUTE)


@_kernel
def normal_kernel(
    y, key, batch, units, tiles,
    KEY_PER_ROW: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SHIFTED: tl.constexpr,
    INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    rows, begin, columns, mask = tile_of(batch, units, tiles, PACK, ROWS, COLS, SHIFTED, INDEX)
    z = noise_of(None, key, rows, begin, columns, mask, batch, tiles, KEY_PER_ROW, PACK, ROWS, COLS, INDEX, COMPUTE)
    store(y, begin, columns, mask, z)


@_kernel
def forward_jump_fwd_kernel(
    y, noise_out, x, t, s, table, timesteps, noise, key, batch, units, tiles,
    SHARED_T: tl.constexpr, KEY_PER_ROW: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFTED: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """y = signal x + sigma z."""
    rows, begin, columns, mask = tile_of(batch, units, tiles, PACK, ROWS, COLS, SHIFTED, INDEX)
    b_x = load(x, begin, columns, mask, COMPUTE)
    signal, sigma = _jump_scales(t, s, table, rows, batch, timesteps, SHARED_T, COMPUTE)
    z = noise_of(noise, key, rows, begin, columns, mask, batch, tiles, KEY_PER_ROW, PACK, ROWS, COLS, INDEX, COMPUTE)
    store(y, begin, columns, mask, signal * b_x + sigma * z)
    if noise_out is not None:
        store(noise_out, begin, columns, mask, z)


@_kernel
def forward_jump_bwd_kernel(
    dx, dy, t, s, table, timesteps, batch, units, tiles,
    OF_NOISE: tl.constexpr, SHARED_T: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFTED: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx = signal dy, the gradient of x, or sigma dy, that of the noise."""
    rows, begin, columns, mask = tile_of(batch, units, tiles, PACK, ROWS, COLS, SHIFTED, INDEX)
    b_dy = load(dy, begin, columns, mask, COMPUTE)
    signal, sigma = _jump_scales(t, s, table, rows, batch, timesteps, SHARED_T, COMPUTE)
    store(dx, begin, columns, mask, (sigma if OF_NOISE else signal) * b_dy)


@triton.jit
def _reverse_row(t, table, rows, batch, timesteps, SHARED_T: tl.constexpr):
    """The seven columns of each row's timestep in float64."""
    step = _timestep(t, rows, batch, SHARED_T)
    ok = (step >= 0) & (step < timesteps)
    row = table + 7 * step
    x_to_x0 = tl.load(row, mask=ok, other=float("nan"))
    output_to_x0 = tl.load(row + 1, mask=ok, other=float("nan"))
    x0_to_mean = tl.load(row + 2, mask=ok, other=float("nan"))
    x_to_mean = tl.load(row + 3, mask=ok, other=float("nan"))
    sigma = tl.load(row + 4, mask=ok, other=float("nan"))
    log_min = tl.load(row + 5, mask=ok, other=float("nan"))
    log_max = tl.load(row + 6, mask=ok, other=float("nan"))
    return x_to_x0, output_to_x0, x0_to_mean, x_to_mean, sigma, log_min, log_max


@triton.jit
def _bound(bits, COMPUTE: tl.constexpr):
    """A clip bound from the bits of a float64: a float argument would be rounded to float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)


@triton.jit
def _learned_sigma(v, sigma, log_min, log_range):
    half_log = 0.5 * (log_min + (v + 1.0) * 0.5 * log_range)
    if half_log.dtype == tl.float32:
        return sigma * exp_ieee(half_log)
    else:
        return sigma * tl.exp(half_log)


@_kernel
def reverse_step_fwd_kernel(
    y, x0_out, x, output, variance, t, table, timesteps, low, high, noise, key, batch, units, tiles,
    CLIP: tl.constexpr, SHARED_T: tl.constexpr, KEY_PER_ROW: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, SHIFTED: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """y = mean + sigma z with mean from x and the (clipped) prediction x0."""
    rows, begin, columns, mask = tile_of(batch, units, tiles, PACK, ROWS, COLS, SHIFTED, INDEX)
    b_x = load(x, begin, columns, mask, COMPUTE)
    b_output = load(output, begin, columns, mask, COMPUTE)
    x_to_x0, output_to_x0, x0_to_mean, x_to_mean, sigma, log_min, log_max = _reverse_row(
        t, table, rows, batch, timesteps, SHARED_T
    )
    # Where nothing is clipped, mean is linear in x and output: two rounded products instead of four.
    x_direct = (x0_to_mean * x_to_x0 + x_to_mean).to(COMPUTE)
    output_direct = (x0_to_mean * output_to_x0).to(COMPUTE)
    row_sigma = sigma.to(COMPUTE)
    mean = x_direct * b_x + output_direct * b_output
    if CLIP or x0_out is not None:
        x0 = x_to_x0.to(COMPUTE) * b_x + output_to_x0.to(COMPUTE) * b_output
        if CLIP:
            b_low, b_high = _bound(low, COMPUTE), _bound(high, COMPUTE)
            clipped = tl.where(x0 < b_low, b_low, tl.where(x0 > b_high, b_high, x0))
            through_clip = x0_to_mean.to(COMPUTE) * clipped + x_to_mean.to(COMPUTE) * b_x
            # An unclipped NaN differs from itself and takes this branch too; it stays NaN.
            mean = tl.where(clipped == x0, mean, through_clip)
            x0 = clipped
        if x0_out is not None:
            store(x0_out, begin, columns, mask, x0)
    z = noise_of(noise, key, rows, begin, columns, mask, batch, tiles, KEY_PER_ROW, PACK, ROWS, COLS, INDEX, COMPUTE)
    z = tl.where(row_sigma == 0.0, 0.0, z)
    if variance is None:
        store(y, begin, columns, mask, mean + row_sigma * z)
    else:
        b_v = load(variance, begin, columns, mask, COMPUTE)
        learned = _learned_sigma(b_v, row_sigma, log_min.to(COMPUTE), (log_max - log_min).to(COMPUTE))
        store(y, begin, columns, mask, mean + learned * z)


@_kernel
def reverse_step_bwd_kernel(
    dx, doutput, dvariance, dy, x, output, variance, t, table, timesteps, low, high, noise, key, batch, units, tiles,
    CLIP: tl.constexpr, SHARED_T: tl.constexpr, KEY_PER_ROW: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, SHIFTED: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The slopes of mean and of the learned sigma, times dy. Outside the clip bounds x0 is constant."""
    rows, begin, columns, mask = tile_of(batch, units, tiles, PACK, ROWS, COLS, SHIFTED, INDEX)
    b_dy = load(dy, begin, columns, mask, COMPUTE)
    x_to_x0, output_to_x0, x0_to_mean, x_to_mean, sigma, log_min, log_max = _reverse_row(
        t, table, rows, batch, timesteps, SHARED_T
    )
    x_slope = (x0_to_mean * x_to_x0 + x_to_mean).to(COMPUTE)
    output_slope = (x0_to_mean * output_to_x0).to(COMPUTE)
    if CLIP:
        b_x = load(x, begin, columns, mask, COMPUTE)
        b_output = load(output, begin, columns, mask, COMPUTE)
        x0 = x_to_x0.to(COMPUTE) * b_x + output_to_x0.to(COMPUTE) * b_output
        outside = (x0 < _bound(low, COMPUTE)) | (x0 > _bound(high, COMPUTE))
        x_slope = tl.where(outside, x_to_mean.to(COMPUTE), x_slope)
        output_slope = tl.where(outside, 0.0, output_slope)
    store(dx, begin, columns, mask, x_slope * b_dy)
    store(doutput, begin, columns, mask, output_slope * b_dy)
    if variance is not None:
        b_v = load(variance, begin, columns, mask, COMPUTE)
        z = noise_of(
            noise, key, rows, begin, columns, mask, batch, tiles, KEY_PER_ROW, PACK, ROWS, COLS, INDEX, COMPUTE
        )
        row_sigma, log_range = sigma.to(COMPUTE), (log_max - log_min).to(COMPUTE)
        z = tl.where(row_sigma == 0.0, 0.0, z)
        learned = _learned_sigma(b_v, row_sigma, log_min.to(COMPUTE), log_range)
        store(dvariance, begin, columns, mask, b_dy * z * (learned * (0.25 * log_range)))


@triton.jit
def _loss_row(t, table, rows, batch, timesteps, SHARED_T: tl.constexpr):
    """The scales of x0 and of the noise in the target, and the weight of the squared error, in float64."""
    step = _timestep(t, rows, batch, SHARED_T)
    ok = (step >= 0) & (step < timesteps)
    from_x0 = tl.load(table + 3 * step, mask=ok, other=float("nan"))
    from_noise = tl.load(table + 3 * step + 1, mask=ok, other=float("nan"))
    weight = tl.load(table + 3 * step + 2, mask=ok, other=float("nan"))
    return from_x0, from_noise, weight


@triton.jit
def _mean(total, weight, inner):
    return total * weight / inner.to(tl.float64)


@_kernel
def loss_tiles_kernel(
    loss, sums, output, x0, t, table, timesteps, noise, key, batch, units, tiles,
    SHARED_T: tl.constexpr, KEY_PER_ROW: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFTED: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """sums[row, tile]: the squared errors of a part of a row, four at a time in COMPUTE, then in float64.

    With sums=None a row is one tile and its loss is written at once.
    """
    rows, begin, columns, mask = tile_of(batch, units, tiles, PACK, ROWS, COLS, SHIFTED, INDEX)
    b_output = load(output, begin, columns, mask, COMPUTE)
    b_x0 = load(x0, begin, columns, mask, COMPUTE)
    from_x0, from_noise, weight = _loss_row(t, table, rows, batch, timesteps, SHARED_T)
    z = noise_of(noise, key, rows, begin, columns, mask, batch, tiles, KEY_PER_ROW, PACK, ROWS, COLS, INDEX, COMPUTE)
    error = b_output - (from_x0.to(COMPUTE) * b_x0 + from_noise.to(COMPUTE) * z)
    squares = tl.reshape(tl.where(mask, error * error, 0.0), [ROWS, COLS // 4, 4])
    total = tl.sum(tl.sum(squares, axis=2).to(tl.float64), axis=1)[:, None]
    if sums is None:
        store(loss, rows, 0, rows < batch, _mean(total, weight, units.to(tl.int64) * PACK))
    else:
        tl.store(sums + rows * tiles + tl.program_id(0) % tiles, total, mask=rows < batch)


@_kernel
def loss_rows_kernel(
    loss, sums, t, table, timesteps, batch, inner, tiles, SHARED_T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Adds the tiles of each row and takes the weighted mean."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    total = tl.zeros([ROWS, COLS], tl.float64)
    for first in range(0, tiles, COLS):
        columns = first + tl.arange(0, COLS)[None, :]
        total += tl.load(sums + rows * tiles + columns, mask=(rows < batch) & (columns < tiles), other=0.0)
    weight = _loss_row(t, table, rows, batch, timesteps, SHARED_T)[2]
    store(loss, rows, 0, rows < batch, _mean(tl.sum(total, axis=1)[:, None], weight, inner))


@_kernel
def loss_bwd_kernel(
    doutput, dx0, dloss, output, x0, t, table, timesteps, noise, key, batch, units, tiles,
    SHARED_T: tl.constexpr, KEY_PER_ROW: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFTED: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """doutput = 2 weight / inner dloss error, dx0 = -from_x0 doutput."""
    rows, begin, columns, mask = tile_of(batch, units, tiles, PACK, ROWS, COLS, SHIFTED, INDEX)
    b_output = load(output, begin, columns, mask, COMPUTE)
    b_x0 = load(x0, begin, columns, mask, COMPUTE)
    from_x0, from_noise, weight = _loss_row(t, table, rows, batch, timesteps, SHARED_T)
    b_dloss = tl.load(dloss + rows, mask=rows < batch, other=0.0).to(tl.float64)
    scale = (2.0 * weight / (units.to(tl.int64) * PACK).to(tl.float64) * b_dloss).to(COMPUTE)
    z = noise_of(noise, key, rows, begin, columns, mask, batch, tiles, KEY_PER_ROW, PACK, ROWS, COLS, INDEX, COMPUTE)
    d = scale * (b_output - (from_x0.to(COMPUTE) * b_x0 + from_noise.to(COMPUTE) * z))
    store(doutput, begin, columns, mask, d)
    if dx0 is not None:
        store(dx0, begin, columns, mask, -from_x0.to(COMPUTE) * d)


def _contiguous(*tensors):
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _like(x: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)


def _bits(value: float | None) -> int:
    return 0 if value is None else struct.unpack("<q", struct.pack("<d", value))[0]


def _draw(x, t, noise, key, *, sums_rows=False):
    """How the rows of x are tiled, and the constants that say which rows share a timestep and a key."""
    shared_t, key_per_row = t is None or t.numel() == 1, key is not None and key.dim() == 2 and x.shape[0] > 1
    rows = Rows(x, shift=key is not None and not key_per_row, flat=shared_t and not key_per_row and not sums_rows)
    return rows, {"SHARED_T": shared_t, "KEY_PER_ROW": key_per_row}


def normal(like, key):
    """normal(Tensor like, Tensor key) -> Tensor"""
    y = _like(like)
    if y.numel():
        rows, constants = _draw(y, None, None, key)
        rows.launch(normal_kernel, y, key.contiguous(), KEY_PER_ROW=constants["KEY_PER_ROW"])
    return y


def forward_jump_fwd(x, t, s, table, noise, key, noise_out):
    """forward_jump_fwd(Tensor x, Tensor t, Tensor? s, Tensor table, Tensor? noise, Tensor? key, bool noise_out)
    -> (Tensor, Tensor)"""
    x, t, s, table, noise, key = _contiguous(x, t, s, table, noise, key)
    y, z = _like(x), _like(x, noise_out)
    if x.numel():
        rows, constants = _draw(x, t, noise, key)
        args = y, z if noise_out else None, x, t, s, table, table.shape[0] - 1, noise, key
        rows.launch(forward_jump_fwd_kernel, *args, **constants)
    return y, z


def forward_jump_bwd(dy, t, s, table, of_noise):
    """forward_jump_bwd(Tensor dy, Tensor t, Tensor? s, Tensor table, bool of_noise) -> Tensor"""
    dy, t, s, table = _contiguous(dy, t, s, table)
    dx = _like(dy)
    if dy.numel():
        shared_t = t.numel() == 1
        args = dx, dy, t, s, table, table.shape[0] - 1
        Rows(dy, flat=shared_t).launch(forward_jump_bwd_kernel, *args, OF_NOISE=of_noise, SHARED_T=shared_t)
    return dx


def reverse_step_fwd(x, output, variance, t, table, low, high, noise, key, x0_out):
    """reverse_step_fwd(Tensor x, Tensor output, Tensor? variance, Tensor t, Tensor table, float? low, float? high,
    Tensor? noise, Tensor? key, bool x0_out) -> (Tensor, Tensor)"""
    x, output, variance, t, table, noise, key = _contiguous(x, output, variance, t, table, noise, key)
    y, x0 = _like(x), _like(x, x0_out)
    if x.numel():
        rows, constants = _draw(x, t, noise, key)
        outputs, bounds = (y, x0 if x0_out else None), (table.shape[0], _bits(low), _bits(high))
        args = *outputs, x, output, variance, t, table, *bounds, noise, key
        rows.launch(reverse_step_fwd_kernel, *args, CLIP=low is not None, **constants)
    return y, x0


def reverse_step_bwd(dy, x, output, variance, t, table, low, high, noise, key):
    """reverse_step_bwd(Tensor dy, Tensor x, Tensor output, Tensor? variance, Tensor t, Tensor table, float? low,
    float? high, Tensor? noise, Tensor? key) -> (Tensor, Tensor, Tensor)"""
    learned = variance is not None
    dy, x, output, variance, t, table = _contiguous(dy, x, output, variance, t, table)
    noise, key = _contiguous(noise, key) if learned else (None, None)  # only the gradient of variance needs it
    dx, doutput, dvariance = _like(x), _like(x), _like(x, learned)
    if x.numel():
        rows, constants = _draw(x, t, noise, key)
        outputs, bounds = (dx, doutput, dvariance if learned else None), (table.shape[0], _bits(low), _bits(high))
        args = *outputs, dy, x, output, variance, t, table, *bounds, noise, key
        rows.launch(reverse_step_bwd_kernel, *args, CLIP=low is not None, **constants)
    return dx, doutput, dvariance


def diffusion_loss_fwd(output, x0, t, table, noise, key):
    """diffusion_loss_fwd(Tensor output, Tensor x0, Tensor t, Tensor table, Tensor? noise, Tensor? key) -> Tensor"""
    output, x0, t, table, noise, key = _contiguous(output, x0, t, table, noise, key)
    batch = output.shape[0]
    loss = output.new_empty(batch, dtype=torch.float64 if output.dtype is torch.float64 else torch.float32)
    if not output.numel():
        return loss.fill_(float("nan"))  # the mean of nothing
    rows, constants = _draw(output, t, noise, key, sums_rows=True)
    sums = output.new_empty((batch, rows.tiles), dtype=torch.float64) if rows.tiles > 1 else None
    timestep = t, table, table.shape[0]
    rows.launch(loss_tiles_kernel, loss, sums, output, x0, *timestep, noise, key, **constants)
    if sums is not None:
        rows.launch_sums(loss_rows_kernel, loss, sums, *timestep, SHARED_T=constants["SHARED_T"])
    return loss


def diffusion_loss_bwd(dloss, output, x0, t, table, noise, key, dx0):
    """diffusion_loss_bwd(Tensor dloss, Tensor output, Tensor x0, Tensor t, Tensor table, Tensor? noise, Tensor? key,
    bool dx0) -> (Tensor, Tensor)"""
    dloss, output, x0, t, table, noise, key = _contiguous(dloss, output, x0, t, table, noise, key)
    doutput, d_x0 = _like(output), _like(output, dx0)
    if output.numel():
        rows, constants = _draw(output, t, noise, key, sums_rows=True)
        args = doutput, d_x0 if dx0 else None, dloss, output, x0, t, table, table.shape[0], noise, key
        rows.launch(loss_bwd_kernel, *args, **constants)
    return doutput, d_x0
