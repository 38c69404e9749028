"""Recurrent layers with torch.nn's constructors, parameters, initialisation and errors, and native sequence lengths."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..ops._recurrent_call import apply_gru, apply_lstm, apply_rnn
from ..ops._recurrent_steps import gru_step, lstm_step, rnn_step


class _Sequence(torch.nn.RNNBase):
    """What LSTM, GRU and RNN share: layers, directions, layouts, packed sequences. States travel as tuples.

    The layers are torch.nn.RNNBase, but not torch.nn.LSTM, GRU and RNN: torch.compile refuses whatever is one of those.
    """

    # Whether hx is a pair (h, c), the number of weights of a layer without projection, the name in messages.
    _pair = False
    _name = ""

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read the parameters where they are."""

    def forward(self, input, hx=None, *, lengths=None):
        """The layers over a batch of sequences.

        Args:
            input: (T, B, input_size), (B, T, input_size) with batch_first, (T, input_size), or a PackedSequence.
            hx: states before the first step, (layers * directions, B, size), without B for unbatched input; a pair
                (h, c) for LSTM. Zeros when None.
            lengths: (B) integers, steps of each row in any order; outputs after them are 0 and the last states are
                those of each row's own last step. All steps when None; not together with a PackedSequence.
        Returns:
            The outputs in the layout of input, and the states after the last step in the layout of hx.
        Raises:
            RuntimeError, ValueError: as torch.nn, and for malformed states and lengths.
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hx, lengths)
        rank = input.dim()
        if rank != 3:
            if rank != 2:
                raise ValueError(f"{self._name}: Expected input to be 2D or 3D, got {rank}D instead")
            return self._unbatched(input, hx, lengths)
        if self.batch_first:
            input = input.transpose(0, 1)
        states = None if hx is None else self._states(hx, 3)
        if lengths is not None:
            lengths = self._lengths(lengths, input)
        output, states = self._layers(input, states, lengths)
        if self.batch_first:
            output = output.transpose(0, 1)
        return output, states if self._pair else states[0]

    def _unbatched(self, input, hx, lengths):
        states = None if hx is None else tuple(s.unsqueeze(1) for s in self._states(hx, 2))
        input = input.unsqueeze(1)
        if lengths is not None:
            lengths = self._lengths(lengths, input)
        output, states = self._layers(input, states, lengths)
        states = tuple(s.squeeze(1) for s in states)
        return output.squeeze(1), states if self._pair else states[0]

    def _packed(self, packed, hx, lengths):
        if lengths is not None:
            raise ValueError(f"{self._name}: expected no lengths together with a PackedSequence")
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        padded, host_lengths = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, batch_sizes.numel())
        states = None
        if hx is not None:
            states = self._states(hx, 3)
            self._check_states(states, padded)  # before rows are chosen
            if sorted_indices is not None:
                states = tuple(s.index_select(1, sorted_indices) for s in states)
        rows = host_lengths.to(data.device) if int(host_lengths[-1]) < padded.shape[0] else None
        output, states = self._layers(padded, states, rows)
        data, batch_sizes = torch._VF._pack_padded_sequence(output, host_lengths, False)
        if unsorted_indices is not None:
            states = tuple(s.index_select(1, unsorted_indices) for s in states)
        output = PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices)
        return output, states if self._pair else states[0]

    def _states(self, hx, rank):
        """hx as a tuple of tensors with `rank` dimensions."""
        if not self._pair:
            if not isinstance(hx, Tensor):
                raise TypeError(f"{self._name}: expected hx to be a tensor, got {type(hx).__name__}")
            if hx.dim() != rank:
                kind = "batched 3-D" if rank == 3 else "unbatched 2-D"
                raise RuntimeError(f"For {kind} input, hx should also be {rank}-D but got {hx.dim()}-D tensor")
            return (hx,)
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            raise TypeError(f"{self._name}: expected hx to be a pair of tensors (h, c), got {type(hx).__name__}")
        h, c = hx
        if h.dim() != rank or c.dim() != rank:
            kind = "batched 3-D" if rank == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {rank}-D but got ({h.dim()}-D, {c.dim()}-D) tensors"
            )
        return h, c

    def _lengths(self, lengths, input):
        if not isinstance(lengths, Tensor):
            lengths = torch.as_tensor(lengths)
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise RuntimeError(f"{self._name}: expected lengths to be integers, got {lengths.dtype}")
        if lengths.numel() != input.shape[1] or lengths.dim() > 1:
            raise RuntimeError(f"{self._name}: expected lengths of shape [{input.shape[1]}], got {list(lengths.shape)}")
        return lengths.to(input.device, torch.int64).reshape(-1)

    def _check_states(self, states, input):
        """Torch's messages; input is time-major."""
        rows, batch = self.num_layers * (2 if self.bidirectional else 1), input.shape[1]
        for i, state in enumerate(states):
            size = self.proj_size if i == 0 and self.proj_size else self.hidden_size
            if state.shape != (rows, batch, size):
                what = f"hidden[{i}]" if self._pair else "hidden"
                raise RuntimeError(f"Expected {what} size {(rows, batch, size)}, got {list(state.shape)}")

    def _check_input(self, input, weight):
        if input.dtype is not weight.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
            )
        if input.shape[2] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[2]}"
            )

    def _zeros(self, input, *leading):
        """Initial states of one layer and direction, (*leading, B, size), in the dtype that a layer computes in."""
        dtype = input.dtype
        if torch.is_autocast_enabled(input.device.type) and dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(input.device.type)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self._pair else 1]
        # One tensor each: torch.compile takes no tensor twice.
        return [input.new_zeros((*leading, input.shape[1], size), dtype=dtype) for size in sizes]

    def _weights(self, names):
        """(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr), None where there is none."""
        parameters = self._parameters
        try:
            weights = [parameters[name] for name in names]
        except KeyError:  # a parametrized weight is an attribute
            weights = [getattr(self, name) for name in names]
        if self.bias:
            return weights if len(weights) == 5 else (*weights, None)
        return (*weights[:2], None, None, weights[2] if len(weights) == 3 else None)

    def _layers(self, input, states, lengths):
        """(output (T, B, directions * S), states of all layers and directions)."""
        weights = self._weights(self._all_weights[0])
        self._check_input(input, weights[0])
        if states is not None:
            self._check_states(states, input)
        directions = 2 if self.bidirectional else 1
        if self.num_layers == directions == 1:
            start = self._zeros(input, 1) if states is None else states
            output, *last = self._run(input, start, weights, lengths, False)
            return output, tuple(last)
        zeros = self._zeros(input) if states is None else ()
        last = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                start = zeros if states is None else [s[index] for s in states]
                weights = self._weights(self._all_weights[index])
                output, *end = self._run(input, start, weights, lengths, direction == 1)
                outputs.append(output)
                last.append(end)
            input = torch.cat(outputs, -1) if directions == 2 else outputs[0]
            if self.dropout > 0 and layer < self.num_layers - 1:
                input = F.dropout(input, self.dropout, self.training)
        return input, tuple([torch.stack(state) for state in zip(*last, strict=True)])

    def _run(self, input, states: Any, weights: Any, lengths, reverse) -> Any:
        """One layer in one direction: (output, last states ...)."""
        raise NotImplementedError


class LSTM(_Sequence):
    """torch.nn.LSTM computed by pynn.ops.lstm; also takes `lengths`, and stops each row at its own.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as in
            torch.nn.LSTM; parameters have its names and order, and the weights drawn for a seed are the same.
    Raises:
        ValueError, TypeError: torch.nn's errors.
    """

    _pair, _name = True, "LSTM"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def _run(self, input, states: Any, weights: Any, lengths, reverse) -> Any:
        h, c = states
        return apply_lstm(input, h, c, weights, lengths, reverse)[:3]


class GRU(_Sequence):
    """torch.nn.GRU computed by pynn.ops.gru; also takes `lengths`, and stops each row at its own.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in
            torch.nn.GRU; parameters have its names and order, and the weights drawn for a seed are the same.
    Raises:
        ValueError, TypeError: torch.nn's errors.
    """

    _name = "GRU"

    def __init__(self, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)

    def _run(self, input, states: Any, weights: Any, lengths, reverse) -> Any:
        return apply_gru(input, states[0], weights[:4], lengths, reverse)[:2]


class RNN(_Sequence):
    """torch.nn.RNN computed by pynn.ops.rnn; also takes `lengths`, and stops each row at its own.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device, dtype: as
            in torch.nn.RNN; parameters have its names and order, and the weights drawn for a seed are the same.
    Raises:
        ValueError, TypeError: torch.nn's errors.
    """

    _name = "RNN"

    def __init__(self, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        nonlinearity = args[3] if len(args) > 3 else kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{nonlinearity.upper()}", *args[:3], *args[4:], **kwargs)
        self.nonlinearity = nonlinearity

    def _run(self, input, states: Any, weights: Any, lengths, reverse) -> Any:
        return apply_rnn(input, states[0], weights[:4], lengths, self.mode == "RNN_RELU", reverse)


class _Cell(torch.nn.RNNCellBase):
    """What the cells share: states travel as tuples of (B, hidden_size)."""

    _pair = False
    _name = ""

    def forward(self, input, hx=None):
        """The states after one step.

        Args:
            input: (B, input_size) or (input_size). hx: (B, hidden_size) or (hidden_size), a pair (h, c) for LSTMCell;
                zeros when None.
        Returns:
            The states in the shape of hx.
        Raises:
            RuntimeError, ValueError: as torch.nn, and for malformed states.
        """
        rank = input.dim()
        if rank != 2:
            if rank != 1:
                raise ValueError(f"{self._name}: Expected input to be 1D or 2D, got {rank}D instead")
            input = input.unsqueeze(0)
        batch, size = input.shape
        if size != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {size} expected {self.input_size}")
        if hx is None:
            states: Any = [input.new_zeros((batch, self.hidden_size)) for _ in range(2 if self._pair else 1)]
        else:
            states = self._states(hx, rank, batch)
        states = self._step(input.unsqueeze(0), states)
        if rank == 1:
            states = [s.squeeze(0) for s in states]
        return tuple(states) if self._pair else states[0]

    def _states(self, hx, rank, batch):
        if self._pair and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            raise TypeError(f"{self._name}: expected hx to be a pair of tensors (h, c), got {type(hx).__name__}")
        states = hx if self._pair else (hx,)
        expected = (self.hidden_size,) if rank == 1 else (batch, self.hidden_size)
        for i, state in enumerate(states):
            if state.shape != expected:
                self._reject(i, state, rank, batch)
        return states if rank == 2 else [s.unsqueeze(0) for s in states]

    def _reject(self, i, state, rank, batch):
        what = f"hx[{i}]" if self._pair else "hidden"
        if state.dim() not in (1, 2):
            raise ValueError(f"{self._name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")
        if state.dim() != rank:
            raise RuntimeError(f"{self._name}: expected {what} to be {rank}D like input, got {state.dim()}D instead")
        label = f"hidden{i}" if self._pair else "hidden0"
        if state.shape[-1] != self.hidden_size:
            raise RuntimeError(
                f"{label} has inconsistent hidden_size: got {state.shape[-1]}, expected {self.hidden_size}"
            )
        raise RuntimeError(f"Input batch size {batch} doesn't match {label} batch size {state.shape[0]}")

    def _weights(self) -> Any:
        p = self._parameters  # torch.nn.Module looks attributes up there last
        try:
            return p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]
        except KeyError:  # a parametrized weight is an attribute
            return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def _step(self, input, states: Any) -> Any:
        """The states after one step of input (1, B, input_size)."""
        raise NotImplementedError


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """torch.nn.LSTMCell computed by pynn.ops.lstm_cell.

    Args:
        input_size, hidden_size, bias, device, dtype: as in torch.nn.LSTMCell; the weights drawn for a seed are the
            same.
    """

    _pair, _name = True, "LSTMCell"

    def _step(self, input, states: Any) -> Any:
        h, c = states
        return lstm_step(input, h, c, self._weights())


class GRUCell(_Cell, torch.nn.GRUCell):
    """torch.nn.GRUCell computed by pynn.ops.gru_cell.

    Args:
        input_size, hidden_size, bias, device, dtype: as in torch.nn.GRUCell; the weights drawn for a seed are the
            same.
    """

    _name = "GRUCell"

    def _step(self, input, states: Any) -> Any:
        return (gru_step(input, states[0], self._weights()),)


class RNNCell(_Cell, torch.nn.RNNCell):
    """torch.nn.RNNCell computed by pynn.ops.rnn_cell.

    Args:
        input_size, hidden_size, bias, nonlinearity, device, dtype: as in torch.nn.RNNCell; the weights drawn for a seed
            are the same.
    """

    _name = "RNNCell"

    def _step(self, input, states: Any) -> Any:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return (rnn_step(input, states[0], self._weights(), self.nonlinearity == "relu"),)
