"""layer_norm_lstm: an LSTM with layer normalisation inside the cell, and what else is done to the cell.

    p = norm(W x[t]; norm_ih) + norm(R (m * h[t-1]); norm_hh) + bias          norm(v; gain, shift): over all gates
    i = sigmoid(p_i + w_i * c[t-1]),   f = sigmoid(p_f + w_f * c[t-1]),   g = tanh(p_g),   new = f * c[t-1] + i * g
    o = sigmoid(p_o + w_o * new),      out = o * tanh(norm(new; norm_cell, norm_cell_bias))
    c[t] = z_c * c[t-1] + (1 - z_c) * new,   h[t] = z_h * h[t-1] + (1 - z_h) * out

Each part may be left out:
    norm        layer normalisation as in Ba, Kiros and Hinton, https://arxiv.org/abs/1607.06450 (equations 20 to 22):
                the shares of input and state apart, c itself carried on unnormalised. Without it norm(v) = v.
    w           peepholes: Gers and Schmidhuber, "Recurrent nets that time and count", IJCNN 2000.
    coupled     f = 1 - i, and no rows for f: Greff et al., https://arxiv.org/abs/1503.04069.
    z           zoneout: random 0 or 1 in training, the rates themselves in evaluation; out and w_o see `new`, as in
                Krueger et al., https://arxiv.org/abs/1606.01305.
    m           dropout of the state with one mask for all steps of a sequence, in training, survivors scaled:
                Gal and Ghahramani, https://arxiv.org/abs/1512.05287.
Masks come from Philox words of a key (csrc/include/layer_norm_lstm.h has the counters), the same on every backend, and
are made again in backward instead of being kept. Shapes, lengths, reverse and 16-bit states are those of `lstm`. Per
step there is one product of the library's and one fused pass. Saved for backward: the operands, output, both
products, c and the statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ._function import autocast, call, recorded
from ._layer_norm_lstm_functions import LayerNormLSTM
from .random import make_key
from .recurrent import _check_rank


def _states(hx, input: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """(h, c), zeros where none are given."""
    if hx is None:
        return input.new_zeros((input.shape[1], hidden)), input.new_zeros((input.shape[1], hidden))
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise TypeError(f"layer_norm_lstm: expected hx to be a pair of tensors (h, c), got {type(hx).__name__}")
    return hx[0], hx[1]


def layer_norm_lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    *,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    norm_cell: Tensor | None = None,
    norm_cell_bias: Tensor | None = None,
    peephole: Tensor | None = None,
    coupled: bool = False,
    zoneout_hidden: float = 0.0,
    zoneout_cell: float = 0.0,
    recurrent_dropout: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
    lengths: Tensor | None = None,
    reverse: bool = False,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer in one direction over whole sequences. G gates: 4, rows i f g o; or 3 with coupled, rows i g o.

    Args:
        input: (T, B, I) float64, float32, float16 or bfloat16, T > 0.
        hx: (h, c) before the first step: (B, H) or (1, B, H) in input's dtype; c may be float32 for 16-bit input.
            Zeros when None.
        weight_ih: (GH, I). weight_hh: (GH, H). bias: (GH).
        norm_ih, norm_hh: (GH), gains of the norms of both shares. norm_cell: (H), gain of that of c. All three or none.
        norm_cell_bias: (H), shift of the norm of c. eps: added to the variances.
        peephole: ((G - 1) H), rows i f o, or i o with coupled.
        zoneout_hidden, zoneout_cell, recurrent_dropout: rates from 0 to less than 1; the last acts in training alone.
        lengths, reverse: as in `lstm`.
        generator, seed: of the masks, see `pynn.ops.random.make_key`; seed is an int or an int64 tensor (2,).
    Returns:
        output (T, B, H) in input's dtype, and (h, c) after the last step of each row, in shape and dtype of hx.
    Raises:
        RuntimeError: shapes, dtypes, devices or rates do not fit. TypeError: hx is not a pair.
    """
    _check_rank("layer_norm_lstm", "input", input, 3)
    h, c = _states(hx, input, weight_hh.shape[-1])
    if lengths is not None and lengths.shape == input.shape[1:2]:
        # The product for the gradient of weight_ih takes all rows, and 0 times a NaN of the padding is NaN.
        alive = torch.arange(input.shape[0], device=input.device)[:, None] < lengths
        input = input.masked_fill(~alive[..., None], 0)
    dropout = recurrent_dropout if training else 0.0
    key = None
    if dropout > 0 or (training and (zoneout_hidden > 0 or zoneout_cell > 0)):
        key = make_key(input.device, generator=generator, seed=seed)
    weights = (weight_ih, weight_hh, bias, norm_ih, norm_hh, norm_cell, norm_cell_bias, peephole)
    input, h, *weights = autocast(input, h, *weights)  # type: ignore[assignment]
    options = (bool(coupled), eps, zoneout_hidden, zoneout_cell, dropout, bool(training), bool(reverse))
    inputs = (input, h, c, *weights, lengths, key, *options)
    if recorded(inputs):
        output, h, c, *_ = call(LayerNormLSTM, *inputs, True)
    else:
        output, h, c, *_ = backends.op("layer_norm_lstm_fwd", input)(*inputs, False)
    return output, (h, c)
