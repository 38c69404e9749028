"""The LSTM layer with layer normalisation inside the cell, and its kin."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.layer_norm_lstm import layer_norm_lstm
from .recurrent import _Sequence


class LayerNormLSTM(_Sequence):
    """LSTM layers whose cell is pynn.ops.layer_norm_lstm: layer normalisation, and any of its other options.

    torch.nn has no such layer. haste's LayerNormLSTM has the same normalisation (without its gains' names), and the
    LayerNormLSTMCell of PyTorch's fastrnns normalises the carried c as well. Parameters of layer k are
    torch.nn.LSTM's, `weight_ih_l{k}`, `weight_hh_l{k}`, `bias_ih_l{k}`, `bias_hh_l{k}`, and `norm_ih_l{k}`,
    `norm_hh_l{k}`, `norm_cell_l{k}`, `norm_cell_bias_l{k}`, `peephole_l{k}` where they exist; `_reverse` follows.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in
            torch.nn.LSTM; without bias there is no norm_cell_bias either.
        layer_norm: whether the shares of input and state and the cell's output are normalised.
        peephole: whether the gates see c. coupled: f = 1 - i; the weights have 3 * hidden_size rows, i g o.
        zoneout_hidden, zoneout_cell: rates at which h and c keep their old values.
        recurrent_dropout: rate of the mask on h, one for all steps of a sequence; `dropout` is between layers.
        forget_bias: added to the initial bias of f (Gers et al. 2000; Jozefowicz et al. 2015 use 1).
        eps: added to the variances.
    Raises:
        ValueError, TypeError: torch.nn's errors, a rate outside 0 <= rate < 1, forget_bias without a bias of f.
    """

    _pair, _name = True, "LayerNormLSTM"

    def __init__(
        self, *args, layer_norm: bool = True, peephole: bool = False, coupled: bool = False,
        zoneout_hidden: float = 0.0, zoneout_cell: float = 0.0, recurrent_dropout: float = 0.0,
        forget_bias: float = 0.0, eps: float = 1e-5, **kwargs,
    ) -> None:  # fmt: skip
        # RNNBase makes as many rows of weights as a mode has gates, and a GRU has three.
        super().__init__("GRU" if coupled else "LSTM", *args, **kwargs)
        if self.proj_size:
            raise ValueError("LayerNormLSTM: expected no proj_size, there is no projection")
        rates = {"zoneout_hidden": zoneout_hidden, "zoneout_cell": zoneout_cell, "recurrent_dropout": recurrent_dropout}
        for name, rate in rates.items():
            if not 0 <= rate < 1:
                raise ValueError(f"LayerNormLSTM: expected {name} from 0 to less than 1, got {rate}")
        self.zoneout_hidden, self.zoneout_cell, self.recurrent_dropout = rates.values()
        if forget_bias and (coupled or not self.bias):
            raise ValueError("LayerNormLSTM: expected forget_bias with a bias of the forget gate, got one without")
        self.layer_norm, self.peephole, self.coupled = layer_norm, peephole, coupled
        self.forget_bias, self.eps = forget_bias, eps
        hidden = self.hidden_size
        width = (3 if coupled else 4) * hidden
        like: Any = self._parameters["weight_ih_l0"]
        extra = {}
        if layer_norm:
            extra = {"norm_ih": width, "norm_hh": width, "norm_cell": hidden}
            if self.bias:
                extra["norm_cell_bias"] = hidden
        if peephole:
            extra["peephole"] = width - hidden
        self._extra = tuple(extra)
        for names in self._all_weights:
            for name, size in extra.items():
                self.register_parameter(name + _suffix(names), torch.nn.Parameter(like.detach().new_empty(size)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch.nn.LSTM's initialisation, gains of 1, shifts of 0, and forget_bias added to one bias of f."""
        super().reset_parameters()  # from RNNBase's constructor too, before there is anything else
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("norm_cell_bias"):
                    parameter.zero_()
                elif name.startswith("norm_"):
                    parameter.fill_(1)
                elif name.startswith("bias_ih") and self.__dict__.get("forget_bias"):
                    parameter[self.hidden_size : 2 * self.hidden_size] += self.forget_bias

    def _weights(self, names):
        """(weight_ih, weight_hh, bias, norms and peephole ...), None where there is none."""
        weight_ih, weight_hh, bias_ih, bias_hh, _ = super()._weights(names)
        extra = {name: getattr(self, name + _suffix(names)) for name in self._extra}
        bias = None if bias_ih is None else bias_ih + bias_hh
        return weight_ih, weight_hh, bias, extra

    def _run(self, input, states: Any, weights: Any, lengths, reverse) -> Any:
        weight_ih, weight_hh, bias, extra = weights
        output, (h, c) = layer_norm_lstm(
            input, states, weight_ih, weight_hh, bias, **extra, coupled=self.coupled, eps=self.eps,
            zoneout_hidden=self.zoneout_hidden, zoneout_cell=self.zoneout_cell,
            recurrent_dropout=self.recurrent_dropout, training=self.training, lengths=lengths, reverse=reverse,
        )  # fmt: skip
        return output, h, c

    def extra_repr(self) -> str:
        options = ("layer_norm", "peephole", "coupled", "zoneout_hidden", "zoneout_cell", "recurrent_dropout")
        defaults = (True, False, False, 0, 0, 0)
        changed = [f"{n}={getattr(self, n)}" for n, d in zip(options, defaults, strict=True) if getattr(self, n) != d]
        return ", ".join((super().extra_repr(), *changed))


def _suffix(names) -> str:
    """Of the parameters of a layer and direction, from its weights' names."""
    return names[0].removeprefix("weight_ih")
