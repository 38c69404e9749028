"""Schemas and shape rules of the recurrent ops. Gradients that output_mask leaves out have 0 elements: its flags are
input, weight_ih, weight_hh, biases, and of lstm weight_hr and the states; gru and rnn always give those of the states.

T steps, B batch, S width of the state (hidden or projected), H hidden, G gates. input is (T, B, I), or (T, B, G * H)
and already the product with weight_ih where that is None. States are (B, width) or (1, B, width), last states and
gradients come likewise. gates and cells are what backward needs, of 0 elements
without `save`; gates hold 4 values per hidden unit, the state c in cells is float32 for 16-bit input.
"""

from __future__ import annotations

from torch import Tensor

from ._function import check_devices, compute_dtype
from ._registry import define

_WEIGHTS = "Tensor? weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh"


def _wanted(wanted: bool, like: Tensor) -> Tensor:
    return like.new_empty(like.shape if wanted else 0)


def _bias(wanted: bool, weight_hh: Tensor) -> Tensor:
    return weight_hh.new_empty(weight_hh.shape[0] if wanted else 0)


@define(
    f"lstm_fwd(Tensor input, Tensor hx, Tensor cx, {_WEIGHTS}, Tensor? weight_hr, Tensor? lengths, bool reverse,"
    " bool save) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    triton="recurrent",
)
def _(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reverse, save):
    check_devices("lstm", input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths)
    steps, batch, _ = input.shape
    rows, state = weight_hh.shape
    return (
        input.new_empty((steps, batch, state)),
        hx.new_empty(hx.shape),
        cx.new_empty(cx.shape),
        input.new_empty((steps, batch, rows) if save else 0),
        input.new_empty((steps, batch, rows // 4) if save else 0, dtype=compute_dtype(input)),
    )


@define(
    "lstm_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor hx, Tensor cx,"
    f" {_WEIGHTS}, Tensor? weight_hr, Tensor? lengths, Tensor output, Tensor gates, Tensor cells, bool reverse,"
    " bool[6] output_mask) -> (Tensor grad_input, Tensor grad_hx, Tensor grad_cx, Tensor grad_weight_ih,"
    " Tensor grad_weight_hh, Tensor grad_bias, Tensor grad_weight_hr)",
    triton="recurrent",
)
def _(
    grad_output, grad_h_n, grad_c_n, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths,
    output, gates, cells, reverse, output_mask,
):  # fmt: skip
    check_devices(
        "lstm", input, grad_output, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, output, gates
    )
    return (
        _wanted(output_mask[0], input),
        _wanted(output_mask[5], hx),
        _wanted(output_mask[5], cx),
        _wanted(output_mask[1], weight_ih) if weight_ih is not None else input.new_empty(0),
        _wanted(output_mask[2], weight_hh),
        _bias(output_mask[3] and (bias_ih is not None or bias_hh is not None), weight_hh),
        _wanted(output_mask[4], weight_hr) if weight_hr is not None else input.new_empty(0),
    )


@define(
    f"gru_fwd(Tensor input, Tensor hx, {_WEIGHTS}, Tensor? lengths, bool reverse, bool save)"
    " -> (Tensor output, Tensor h_n, Tensor gates)",
    triton="recurrent",
)
def _(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, save):
    check_devices("gru", input, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths)
    steps, batch, _ = input.shape
    hidden = weight_hh.shape[1]
    return (
        input.new_empty((steps, batch, hidden)),
        hx.new_empty(hx.shape),
        input.new_empty((steps, batch, 4 * hidden) if save else 0),
    )


@define(
    f"gru_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor hx, {_WEIGHTS}, Tensor? lengths,"
    " Tensor output, Tensor gates, bool reverse, bool[4] output_mask) -> (Tensor grad_input, Tensor grad_hx,"
    " Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih, Tensor grad_bias_hh)",
    triton="recurrent",
)
def _(
    grad_output, grad_h_n, input, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, output, gates, reverse,
    output_mask,
):  # fmt: skip
    check_devices("gru", input, grad_output, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, output, gates)
    biases = output_mask[3] and (bias_ih is not None or bias_hh is not None)
    return (
        _wanted(output_mask[0], input),
        _wanted(True, hx),
        _wanted(output_mask[1], weight_ih) if weight_ih is not None else input.new_empty(0),
        _wanted(output_mask[2], weight_hh),
        _bias(biases, weight_hh),
        _bias(biases, weight_hh),
    )


@define(
    f"rnn_fwd(Tensor input, Tensor hx, {_WEIGHTS}, Tensor? lengths, bool relu, bool reverse)"
    " -> (Tensor output, Tensor h_n)",
    triton="recurrent",
)
def _(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, relu, reverse):
    check_devices("rnn", input, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths)
    steps, batch, _ = input.shape
    hidden = weight_hh.shape[1]
    return input.new_empty((steps, batch, hidden)), hx.new_empty(hx.shape)


@define(
    f"rnn_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor hx, {_WEIGHTS}, Tensor? lengths,"
    " Tensor output, bool relu, bool reverse, bool[4] output_mask) -> (Tensor grad_input, Tensor grad_hx,"
    " Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias)",
    triton="recurrent",
)
def _(
    grad_output, grad_h_n, input, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, output, relu, reverse,
    output_mask,
):  # fmt: skip
    check_devices("rnn", input, grad_output, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, output)
    return (
        _wanted(output_mask[0], input),
        _wanted(True, hx),
        _wanted(output_mask[1], weight_ih) if weight_ih is not None else input.new_empty(0),
        _wanted(output_mask[2], weight_hh),
        _bias(output_mask[3] and (bias_ih is not None or bias_hh is not None), weight_hh),
    )


# Of the CPU: one step, input (1, B, I), whose weight gradients wait, and those of the rows of many steps. grad_gates
# are the gradients of the pre-activations: (B, 4 * H) of lstm, i f g o, and of gru, r z n and what weight_hh has in n;
# (B, H) of rnn. cell is 0 lstm, 1 gru, 2 rnn with tanh, 3 with relu. The flags are input and states; weight_ih,
# weight_hh and biases. LSTM and RNN have one gradient of both biases, grad_bias_ih.
@define(
    "recurrent_step_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor hx, Tensor? cx,"
    " Tensor weight_ih, Tensor weight_hh, Tensor output, Tensor? gates, Tensor? cells, int cell, bool[2] output_mask)"
    " -> (Tensor grad_input, Tensor grad_hx, Tensor grad_cx, Tensor grad_gates)",
)
def _(
    grad_output, grad_h_n, grad_c_n, input, hx, cx, weight_ih, weight_hh, output, gates, cells, cell, output_mask,
):  # fmt: skip
    width = weight_hh.shape[1] * (4 if cell < 2 else 1)
    return (
        _wanted(output_mask[0], input),
        _wanted(output_mask[1], hx),
        hx.new_empty(0) if cx is None else _wanted(True, cx),
        input.new_empty((input.shape[1], width)),
    )


@define(
    "recurrent_weights_bwd(Tensor grad_gates, Tensor input, Tensor states, int cell, bool[3] output_mask)"
    " -> (Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih, Tensor grad_bias_hh)",
)
def _(grad_gates, input, states, cell, output_mask):
    rows = states.shape[1] * (4, 3, 1, 1)[cell]
    return (
        input.new_empty((rows, input.shape[1]) if output_mask[0] else 0),
        input.new_empty((rows, states.shape[1]) if output_mask[1] else 0),
        input.new_empty(rows if output_mask[2] else 0),
        input.new_empty(rows if output_mask[2] and cell == 1 else 0),
    )
