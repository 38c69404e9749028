"""The LSTM with layer normalisation as users of torch write it: a scripted loop of torch's operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import pynn


@torch.jit.script
def _steps(
    products: Tensor, weight_hh: Tensor, norm_hh: Tensor, norm_cell: Tensor, norm_cell_bias: Tensor, eps: float
) -> Tensor:
    width, hidden = weight_hh.shape
    h = products.new_zeros((products.shape[1], hidden))
    c = h
    outputs = []
    for t in range(products.shape[0]):
        gates = products[t] + F.layer_norm(F.linear(h, weight_hh), [width], norm_hh, None, eps)
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * F.layer_norm(c, [hidden], norm_cell, norm_cell_bias, eps).tanh()
        outputs.append(h)
    return torch.stack(outputs)


class LayerNormLSTM(pynn.nn.LayerNormLSTM):
    """One layer from zero states, with pynn's parameters."""

    def forward(self, input, hx=None, *, lengths=None):
        products = F.linear(input, self.weight_ih_l0)
        products = F.layer_norm(
            products, products.shape[2:], self.norm_ih_l0, self.bias_ih_l0 + self.bias_hh_l0, self.eps
        )
        output = _steps(
            products, self.weight_hh_l0, self.norm_hh_l0, self.norm_cell_l0, self.norm_cell_bias_l0, self.eps
        )
        return output, None
