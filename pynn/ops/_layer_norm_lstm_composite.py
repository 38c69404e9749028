"""layer_norm_lstm as a loop of differentiable torch operations: what double backward differentiates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._function import compute_dtype
from ._recurrent_composite import _scan

_LOW = 0xFFFFFFFF


def philox_words(key: Tensor, counters: Tensor) -> Tensor:
    """Philox4x32-10 as csrc/include/philox.h has it: (*counters.shape, 4) words as int64, for int64 counters."""
    k0, k1 = key[0] & _LOW, (key[0] >> 32) & _LOW
    counters = counters + key[1]
    c0, c1 = counters & _LOW, (counters >> 32) & _LOW
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the low 64 bits, whatever the sign
        c0, c1 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW
        c2, c3 = ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack((c0, c1, c2, c3), -1)


def dropped(key: Tensor, plane: int, batch: int, hidden: int, rate: float) -> Tensor:
    """Which units (batch, hidden) of a plane of random words are dropped; see csrc/include/layer_norm_lstm.h."""
    groups = -(-hidden // 4)
    counters = torch.arange(batch * groups, device=key.device).view(batch, groups) + plane * batch * groups
    return philox_words(key, counters).flatten(1)[:, :hidden] < int(rate * 2**32)


def layer_norm_lstm(
    input, hx, cx, weight_ih, weight_hh, bias, norm_ih, norm_hh, norm_cell, norm_cell_bias, peephole,
    *, lengths, key, coupled, eps, zoneout_hidden, zoneout_cell, dropout, training, reverse,
):  # fmt: skip
    """(output, h_n, c_n) of the op's operands."""
    dtype = compute_dtype(input)
    wide: list = [
        None if t is None else t.to(dtype)
        for t in (hx, cx, weight_hh, bias, norm_ih, norm_hh, norm_cell, norm_cell_bias, peephole)
    ]
    h, c, recurrent, bias, gain_ih, gain_hh, gain_cell, bias_cell, peepholes = wide
    h, c = h.reshape(h.shape[-2:]), c.reshape(c.shape[-2:])
    batch, hidden = h.shape
    gates = 3 if coupled else 4

    def norm(x, gain, shift=None):
        return x if gain is None else F.layer_norm(x, x.shape[-1:], gain, shift, eps)

    def keep(rate, plane):
        """What zoneout keeps of the old values."""
        return dropped(key, plane, batch, hidden, rate).to(dtype) if training and rate > 0 else rate

    mask: Tensor | float = 1.0
    if dropout > 0:
        mask = (~dropped(key, 0, batch, hidden, dropout)).to(dtype) / (1 - dropout)
    x = norm(F.linear(input.to(dtype), weight_ih.to(dtype)), gain_ih)
    x = x if bias is None else x + bias
    seen = [0.0] * (gates - 1) if peepholes is None else peepholes.chunk(gates - 1)
    times = iter(reversed(range(len(x))) if reverse else range(len(x)))

    def step(x, h, c):
        t = next(times)
        i, *f, g, o = (x + norm(F.linear(h * mask, recurrent), gain_hh)).chunk(gates, -1)
        i = (i + seen[0] * c).sigmoid()
        new = (1 - i if coupled else (f[0] + seen[1] * c).sigmoid()) * c + i * g.tanh()
        out = (o + seen[-1] * new).sigmoid() * norm(new, gain_cell, bias_cell).tanh()
        keep_h, keep_c = keep(zoneout_hidden, 1 + 2 * t), keep(zoneout_cell, 2 + 2 * t)
        return keep_h * h + (1 - keep_h) * out, keep_c * c + (1 - keep_c) * new

    output, h, c = _scan(step, x, (h, c), lengths, reverse)
    return output.to(input.dtype), h.to(input.dtype).reshape(hx.shape), c.to(cx.dtype).reshape(cx.shape)
