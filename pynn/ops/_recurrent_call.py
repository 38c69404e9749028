"""Applying lstm, gru and rnn from given states: what the public functions and the layers share."""

from __future__ import annotations

import torch

from .. import backends
from ._function import autocast, call, recorded
from ._recurrent_functions import GRU, LSTM, RNN


def _autocast(input, hx, weights):
    if not (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type)):
        return input, hx, weights
    input, hx, *weights = autocast(input, hx, *weights)
    return input, hx, weights


def apply_lstm(input, hx, cx, weights, lengths, reverse):
    """lstm with weights (ih, hh, bias_ih, bias_hh, hr) from a given state; returns (output, h_n, c_n, ...)."""
    input, hx, weights = _autocast(input, hx, weights)
    return _run(LSTM, "lstm", input, hx, cx, *weights, lengths, reverse)


def apply_gru(input, hx, weights, lengths, reverse):
    """gru with weights (ih, hh, bias_ih, bias_hh) from a given state; returns (output, h_n, ...)."""
    input, hx, weights = _autocast(input, hx, weights)
    return _run(GRU, "gru", input, hx, *weights, lengths, reverse)


def apply_rnn(input, hx, weights, lengths, relu, reverse):
    """rnn with weights (ih, hh, bias_ih, bias_hh) from a given state; returns (output, h_n)."""
    input, hx, weights = _autocast(input, hx, weights)
    return _run(RNN, "rnn", input, hx, *weights, lengths, relu, reverse)


def _run(function, name: str, *inputs):
    """Applies LSTM, GRU or RNN in the cheapest form that is right here.

    Args:
        inputs: operands and options but `save`, which is decided here.
    """
    if recorded(inputs):
        return call(function, *inputs) if name == "rnn" else call(function, *inputs, True)
    op = backends.op(f"{name}_fwd", inputs[0])
    return op(*inputs) if name == "rnn" else op(*inputs, False)
