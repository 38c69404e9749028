"""LSTM, GRU and RNN as loops of differentiable torch operations: what double backward differentiates."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._function import compute_dtype

Step = Callable[..., tuple[Tensor, ...]]


def _scan(step: Step, products: Tensor, state: tuple[Tensor, ...], lengths: Tensor | None, reverse: bool):
    """(outputs (T, B, S), last states): the first state is the output, rows stand still where they are not alive."""
    steps = products.shape[0]
    outputs: list[Tensor] = [products] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        new = step(products[t], *state)
        if lengths is None:
            outputs[t], state = new[0], new
        else:
            alive = (t < lengths)[:, None]
            state = tuple(torch.where(alive, n, s) for n, s in zip(new, state, strict=True))
            outputs[t] = torch.where(alive, new[0], torch.zeros_like(new[0]))
    return torch.stack(outputs), *state


def _products(input: Tensor, weight_ih: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight_ih is not None:
        return F.linear(input, weight_ih, bias)
    return input if bias is None else input + bias


def _widened(formula):
    """The formula in the compute dtype, its results in input's dtype and c_n in cx's."""

    def run(input, hx, *tensors, **options):
        wide: list = [None if t is None else t.to(compute_dtype(input)) for t in (input, hx, *tensors)]
        states = 1 if formula.__name__ != "lstm" else 2
        flat = [t.reshape(t.shape[-2:]) for t in wide[1 : 1 + states]]  # (1, B, S) or (B, S)
        output, h_n, *c_n = formula(wide[0], *flat, *wide[1 + states :], **options)
        last = [h_n.to(input.dtype).reshape(hx.shape), *(c.to(tensors[0].dtype).view_as(tensors[0]) for c in c_n)]
        return output.to(input.dtype), *last

    return run


@_widened
def lstm(input, hx, cx, weight_ih, weight_hh, bias, weight_hr, *, lengths, reverse):
    """(output, h_n, c_n); bias is the sum of both biases."""

    def step(x, h, c):
        i, f, g, o = (x + F.linear(h, weight_hh)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if weight_hr is None else F.linear(h, weight_hr)), c

    return _scan(step, _products(input, weight_ih, bias), (hx, cx), lengths, reverse)


@_widened
def gru(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, *, lengths, reverse):
    """(output, h_n)."""

    def step(x, h):
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), F.linear(h, weight_hh, bias_hh).chunk(3, -1)
        z = (xz + hz).sigmoid()
        n = (xn + (xr + hr).sigmoid() * hn).tanh()
        return ((1 - z) * n + z * h,)

    return _scan(step, _products(input, weight_ih, bias_ih), (hx,), lengths, reverse)


@_widened
def rnn(input, hx, weight_ih, weight_hh, bias, *, lengths, relu, reverse):
    """(output, h_n); bias is the sum of both biases."""

    def step(x, h):
        z = x + F.linear(h, weight_hh)
        return (z.relu() if relu else z.tanh(),)

    return _scan(step, _products(input, weight_ih, bias), (hx,), lengths, reverse)
