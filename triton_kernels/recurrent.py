"""LSTM, GRU and RNN of one direction over whole sequences, in Triton. See csrc/include/recurrent.h.

What concerns all steps at once is a matrix product of the library's: weight_ih x before the steps; the gradients of
input and weights after them. The kernels do what happens step by step, see recurrent_launch.py.
"""

from __future__ import annotations

import torch

from .products import compute_dtype, product
from .recurrent_launch import GRU, LSTM, RELU, TANH, Sequence, gates_of


def lstm_fwd(
    input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reverse, save
):  # fmt: skip
    """lstm_fwd(Tensor input, Tensor hx, Tensor cx, Tensor? weight_ih, Tensor weight_hh, Tensor? bias_ih,
    Tensor? bias_hh, Tensor? weight_hr, Tensor? lengths, bool reverse, bool save)
    -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"""
    return _forward(
        LSTM, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reverse, save
    )  # fmt: skip


def gru_fwd(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, save):
    """gru_fwd(Tensor input, Tensor hx, Tensor? weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh,
    Tensor? lengths, bool reverse, bool save) -> (Tensor output, Tensor h_n, Tensor gates)"""
    output, h_n, _, gates, _ = _forward(
        GRU, input, hx, None, weight_ih, weight_hh, bias_ih, bias_hh, None, lengths, reverse, save
    )  # fmt: skip
    return output, h_n, gates


def rnn_fwd(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, relu, reverse):
    """rnn_fwd(Tensor input, Tensor hx, Tensor? weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh,
    Tensor? lengths, bool relu, bool reverse) -> (Tensor output, Tensor h_n)"""
    return _forward(
        RELU if relu else TANH, input, hx, None, weight_ih, weight_hh, bias_ih, bias_hh, None, lengths, reverse, False
    )[:2]  # fmt: skip


def _sequence(cell, input, weight_hh, weight_hr, reverse) -> Sequence:
    return Sequence(
        cell, input, input.shape[0], input.shape[1], weight_hh.shape[0] // gates_of(cell), weight_hh.shape[1],
        weight_hr is not None, reverse,
    )  # fmt: skip


def _dense(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _matrix(state: torch.Tensor) -> torch.Tensor:
    """(batch, width) of a state that torch.nn shapes (1, batch, width), contiguous."""
    return state.reshape(state.shape[-2:]).contiguous()


def _forward(cell, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reverse, save):
    sequence = _sequence(cell, input, weight_hh, weight_hr, reverse)
    steps, batch, hidden = sequence.steps, sequence.batch, sequence.hidden
    save = save and sequence.saved > 0
    states = sequence.new_states()
    output = states.new_empty(0).set_(states.untyped_storage(), 0, (steps, *states.shape[1:]), states.stride())
    gates = input.new_empty((steps, batch, 4 * hidden) if save else 0)
    cells = sequence.wide(*((steps, batch, hidden) if save and cell == LSTM else (0,)))
    c_n = None if cx is None else sequence.wide(*cx.shape)
    if not batch * steps or not hidden:
        return output, hx.clone(), None if cx is None else cx.clone(), gates, cells
    if lengths is None:
        h_n = torch.empty_like(hx, memory_format=torch.contiguous_format)
    else:  # what a row leaves standing
        output.zero_()
        h_n = hx.clone(memory_format=torch.contiguous_format)
    products = input.contiguous()
    if weight_ih is not None:
        products = product(products.flatten(0, 1), weight_ih.t())
    sequence.forward(
        states, h_n, c_n, gates if save else None, cells if save and cell == LSTM else None, products,
        _dense(weight_hh), _dense(bias_ih), _dense(bias_hh), _dense(weight_hr), _matrix(hx),
        None if cx is None else _matrix(cx).to(sequence.compute), _dense(lengths),
    )  # fmt: skip
    return output, h_n, None if cx is None else c_n.to(cx.dtype), gates, cells


def lstm_bwd(
    grad_output, grad_h_n, grad_c_n, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, output,
    gates, cells, reverse, output_mask,
):  # fmt: skip
    """lstm_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor hx, Tensor cx,
    Tensor? weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, Tensor? lengths,
    Tensor output, Tensor gates, Tensor cells, bool reverse, bool[6] output_mask)
    -> (Tensor grad_input, Tensor grad_hx, Tensor grad_cx, Tensor grad_weight_ih, Tensor grad_weight_hh,
    Tensor grad_bias, Tensor grad_weight_hr)"""
    sequence = _sequence(LSTM, input, weight_hh, weight_hr, reverse)
    d, grad_h, grad_c, grad_states, hiddens = _steps_back(
        sequence, grad_output, grad_h_n, grad_c_n, hx, cx, weight_hh, weight_hr, lengths, output, gates, cells
    )
    for_input, for_ih, for_hh, for_bias, for_hr, for_states = output_mask
    return (
        _input_gradient(d, weight_ih, input) if for_input else _none(input),
        grad_h.to(hx.dtype) if for_states else _none(input),
        grad_c.to(cx.dtype) if for_states else _none(input),
        product(d.t(), _rows(input)) if for_ih and weight_ih is not None else _none(input),
        product(d.t(), _rows(_states_before(output, hx, lengths, reverse))) if for_hh else _none(input),
        _sum(d) if for_bias and (bias_ih is not None or bias_hh is not None) else _none(input),
        product(_rows(grad_states).t(), _rows(hiddens)) if for_hr and weight_hr is not None else _none(input),
    )


def gru_bwd(
    grad_output, grad_h_n, input, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, output, gates, reverse,
    output_mask,
):  # fmt: skip
    """gru_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor hx, Tensor? weight_ih, Tensor weight_hh,
    Tensor? bias_ih, Tensor? bias_hh, Tensor? lengths, Tensor output, Tensor gates, bool reverse, bool[4] output_mask)
    -> (Tensor grad_input, Tensor grad_hx, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih,
    Tensor grad_bias_hh)"""
    sequence = _sequence(GRU, input, weight_hh, None, reverse)
    d, grad_h, *_ = _steps_back(
        sequence, grad_output, grad_h_n, None, hx, None, weight_hh, None, lengths, output, gates, None
    )
    hidden = sequence.hidden
    for_input, for_ih, for_hh, for_bias = output_mask
    of_input, of_hidden = d[:, : 3 * hidden], d[:, hidden:]  # n r z of what weight_ih x gets; r z n of weight_hh h

    def gate_order(t: torch.Tensor) -> torch.Tensor:
        return torch.cat((t[hidden:], t[:hidden]))

    grad_input, grad_weight_ih = _none(input), _none(input)
    if for_input and weight_ih is None:
        grad_input = torch.ops.aten._unsafe_view(
            torch.cat((of_input[:, hidden:], of_input[:, :hidden]), 1), input.shape
        )
    elif for_input:
        n_first = torch.cat((weight_ih[2 * hidden :], weight_ih[: 2 * hidden]))
        grad_input = _input_gradient(of_input, n_first, input)
    if for_ih and weight_ih is not None:
        grad_weight_ih = gate_order(product(of_input.t(), _rows(input)))
    sums = _sum(d) if for_bias and (bias_ih is not None or bias_hh is not None) else None
    return (
        grad_input,
        grad_h.to(hx.dtype),
        grad_weight_ih,
        product(of_hidden.t(), _rows(_states_before(output, hx, lengths, reverse))) if for_hh else _none(input),
        _none(input) if sums is None else gate_order(sums[: 3 * hidden]),
        _none(input) if sums is None else sums[hidden:].clone(),
    )


def rnn_bwd(
    grad_output, grad_h_n, input, hx, weight_ih, weight_hh, bias_ih, bias_hh, lengths, output, relu, reverse,
    output_mask,
):  # fmt: skip
    """rnn_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor hx, Tensor? weight_ih, Tensor weight_hh,
    Tensor? bias_ih, Tensor? bias_hh, Tensor? lengths, Tensor output, bool relu, bool reverse, bool[4] output_mask)
    -> (Tensor grad_input, Tensor grad_hx, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias)"""
    sequence = _sequence(RELU if relu else TANH, input, weight_hh, None, reverse)
    d, grad_h, *_ = _steps_back(
        sequence, grad_output, grad_h_n, None, hx, None, weight_hh, None, lengths, output, None, None
    )
    for_input, for_ih, for_hh, for_bias = output_mask
    return (
        _input_gradient(d, weight_ih, input) if for_input else _none(input),
        grad_h.to(hx.dtype),
        product(d.t(), _rows(input)) if for_ih and weight_ih is not None else _none(input),
        product(d.t(), _rows(_states_before(output, hx, lengths, reverse))) if for_hh else _none(input),
        _sum(d) if for_bias and (bias_ih is not None or bias_hh is not None) else _none(input),
    )


def _steps_back(
    sequence: Sequence, grad_output, grad_h_n, grad_c_n, hx, cx, weight_hh, weight_hr, lengths, output, gates, cells
):
    """Gradients of the pre-activations (steps * batch, ...), of h0, of c0; for a projection, grad_states and hiddens.

    Where a row is not alive all but those of h0 and c0 are 0.
    """
    steps, batch, hidden, state = sequence.steps, sequence.batch, sequence.hidden, sequence.state

    def flowing(grad: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        if grad is None:
            return sequence.wide(*like.shape).zero_()
        return grad.to(sequence.compute, copy=True, memory_format=torch.contiguous_format)

    create = output.new_empty if lengths is None else output.new_zeros
    grad_gates = create(steps, batch, max(sequence.saved, 1) * hidden)
    grad_h = flowing(grad_h_n, hx)
    grad_c = None if cx is None else flowing(grad_c_n, cx)
    grad_states = create(steps, batch, state) if sequence.projected else None
    hiddens = create(steps, batch, hidden) if sequence.projected else None
    if grad_gates.numel():
        sequence.backward(
            grad_gates, grad_states, hiddens, grad_h, grad_c, _dense(grad_output), _dense(gates), _dense(cells),
            output.contiguous(), _matrix(hx), None if cx is None else _matrix(cx).to(sequence.compute),
            weight_hh.contiguous(), _dense(weight_hr), _dense(lengths),
        )  # fmt: skip
    return grad_gates.flatten(0, 1), grad_h, grad_c, grad_states, hiddens


def _states_before(output, hx, lengths, reverse) -> torch.Tensor:
    """(steps, batch, state): h before each step, where a row is alive."""
    hx = _matrix(hx)[None]
    if not reverse:
        return torch.cat((hx, output[:-1]))
    states = torch.cat((output[1:], hx))
    if lengths is not None:
        first = (lengths.clamp(max=output.shape[0]) - 1).clamp(min=0)[None, :, None].expand(hx.shape)
        states.scatter_(0, first, hx)
    return states


def _none(like: torch.Tensor) -> torch.Tensor:
    """What stands for a gradient that nobody wants."""
    return like.new_empty(0)


def _rows(t: torch.Tensor) -> torch.Tensor:
    """(steps, batch, ...) -> (steps * batch, ...)"""
    return t.reshape(-1, t.shape[-1])


def _input_gradient(d, weight_ih, input) -> torch.Tensor:
    return torch.ops.aten._unsafe_view(d if weight_ih is None else product(d, weight_ih), input.shape)


def _sum(d: torch.Tensor) -> torch.Tensor:
    return d.sum(0, dtype=compute_dtype(d)).to(d.dtype)
