"""LSTM, GRU and the plain RNN, whole sequences of one layer and direction, and single steps.

    lstm   c[t] = f * c[t-1] + i * g,   h[t] = o * tanh(c[t])        i, f, o = sigmoid(.), g = tanh(.)
    gru    h[t] = (1 - z) * n + z * h[t-1],   n = tanh(x_n + r * h_n)     r, z = sigmoid(.)
    rnn    h[t] = tanh(.) or relu(.)

where (.) = weight_ih x[t] + bias_ih + weight_hh h[t-1] + bias_hh. Rows of the weights are torch's: i f g o; r z n.
Shapes: T steps, B batch, I input size, H hidden size, S width of the state: H, or the rows of weight_hr. Tensors are
time-major. A row of the batch is alive at the steps t < lengths[b]: afterwards its state stands still and its output
is 0; in the reverse direction it starts at step lengths[b] - 1. lengths is a tensor on the input's device and is
never brought to the host; values outside 0..T count as the nearer end.

16-bit input: h is rounded to it at every step, c and all sums are float32. c of dtype float32 goes in and comes out
whole, so that a sequence computed in parts equals the sequence bit for bit. Saved for backward: the operands, output,
the gates and, for lstm, c. On the CPU large gradients and gates lie in memory that the process keeps for later ones
when they are gone, 64 MiB at most; such a gradient is a tensor like any other, but resize_() cannot make it larger.
There the steps of large cells in a loop, of float32 and float64, make the gradients of weights that are parameters
together, 256 rows at a time, once the last step of a backward pass is done: autograd adds no matrices.
The papers: Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8),
1997; Sak et al., https://arxiv.org/abs/1402.1128 (projections); Cho et al., https://arxiv.org/abs/1406.1078 (GRU).
"""

from __future__ import annotations

from torch import Tensor

from ._recurrent_call import apply_gru, apply_lstm, apply_rnn
from ._recurrent_steps import gru_step, lstm_step, rnn_step


def _states(name: str, hx, input: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
    """(h, c) of lstm, zeros where none are given."""
    if hx is not None:
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            raise TypeError(f"{name}: expected hx to be a pair of tensors (h, c), got {type(hx).__name__}")
        return tuple(hx)
    batch, hidden, state = input.shape[-2], weight_hh.shape[0] // 4, weight_hh.shape[-1]
    return input.new_zeros((batch, state)), input.new_zeros((batch, hidden))


def _relu(name: str, nonlinearity: str) -> bool:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"{name}: expected nonlinearity to be 'tanh' or 'relu', got {nonlinearity!r}")
    return nonlinearity == "relu"


def _start(hx: Tensor | None, input: Tensor, weight_hh: Tensor) -> Tensor:
    return input.new_zeros((input.shape[-2], weight_hh.shape[-1])) if hx is None else hx


def _check_rank(name: str, argument: str, tensor: Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        raise RuntimeError(f"{name}: expected {argument} to have {rank} dimensions, got {tensor.dim()}")


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One LSTM layer in one direction over whole sequences.

    Args:
        input: (T, B, I) float64, float32, float16 or bfloat16, T > 0; (T, B, 4H) without weight_ih.
        hx: (h, c) before the first step: (B, S) in input's dtype and (B, H) in it or, for 16-bit input, float32;
            both may have a leading dimension of 1, as torch.nn's have. Zeros when None.
        weight_ih: (4H, I), or None: input is already weight_ih x.
        weight_hh: (4H, S). bias_ih, bias_hh: (4H). weight_hr: (S, H), projects h to width S.
        lengths: (B) int64 on the input's device: steps of each row, in any order. All steps when None.
        reverse: run from the last step to the first.
    Returns:
        output (T, B, S) in input's dtype, and (h, c) after the last step of each row, in shape and dtype of hx.
    Raises:
        RuntimeError: shapes, dtypes or devices do not fit. TypeError: hx is not a pair.
    """
    _check_rank("lstm", "input", input, 3)
    h, c = _states("lstm", hx, input, weight_hh)
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    output, h, c, *_ = apply_lstm(input, h, c, weights, lengths, bool(reverse))
    return output, (h, c)


def gru(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One GRU layer in one direction over whole sequences.

    Args:
        input: (T, B, I) float64, float32, float16 or bfloat16, T > 0; (T, B, 3H) without weight_ih.
        hx: (B, H) or (1, B, H), the state before the first step; zeros when None.
        weight_ih: (3H, I) or None. weight_hh: (3H, H). bias_ih, bias_hh: (3H); the hidden share of n has its own.
        lengths, reverse: as in `lstm`.
    Returns:
        output (T, B, H) and the state after the last step of each row, in the shape of hx.
    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    _check_rank("gru", "input", input, 3)
    hx = _start(hx, input, weight_hh)
    results = apply_gru(input, hx, (weight_ih, weight_hh, bias_ih, bias_hh), lengths, bool(reverse))
    return results[0], results[1]


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One plain RNN layer in one direction over whole sequences.

    Args:
        input: (T, B, I) float64, float32, float16 or bfloat16, T > 0; (T, B, H) without weight_ih.
        hx: (B, H) or (1, B, H), the state before the first step; zeros when None.
        weight_ih: (H, I) or None. weight_hh: (H, H). bias_ih, bias_hh: (H).
        nonlinearity: "tanh" or "relu".
        lengths, reverse: as in `lstm`.
    Returns:
        output (T, B, H) and the state after the last step of each row, in the shape of hx.
    Raises:
        RuntimeError: shapes, dtypes or devices do not fit. ValueError: unknown nonlinearity.
    """
    _check_rank("rnn", "input", input, 3)
    relu = _relu("rnn", nonlinearity)
    hx = _start(hx, input, weight_hh)
    return apply_rnn(input, hx, (weight_ih, weight_hh, bias_ih, bias_hh), lengths, relu, bool(reverse))


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: (h, c), each (B, H), from input (B, I) and hx = (h, c); see `lstm`."""
    _check_rank("lstm_cell", "input", input, 2)
    h, c = _states("lstm_cell", hx, input, weight_hh)
    return lstm_step(input.unsqueeze(0), h, c, (weight_ih, weight_hh, bias_ih, bias_hh))


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU: h (B, H) from input (B, I) and hx (B, H); see `gru`."""
    _check_rank("gru_cell", "input", input, 2)
    hx = _start(hx, input, weight_hh)
    return gru_step(input.unsqueeze(0), hx, (weight_ih, weight_hh, bias_ih, bias_hh))


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of a plain RNN: h (B, H) from input (B, I) and hx (B, H); see `rnn`."""
    _check_rank("rnn_cell", "input", input, 2)
    relu = _relu("rnn_cell", nonlinearity)
    hx = _start(hx, input, weight_hh)
    return rnn_step(input.unsqueeze(0), hx, (weight_ih, weight_hh, bias_ih, bias_hh), relu)
