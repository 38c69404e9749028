"""pynn.nn.LayerNormLSTM: torch.nn.LSTM's interface around the op."""

import copy
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import pynn
from pynn.nn import LayerNormLSTM
from pynn.ops import layer_norm_lstm

KERNEL = "layer_norm_lstm_fwd"


def test_without_the_options_it_is_torchs_lstm(backend):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dtype": torch.float64}
    theirs = torch.nn.LSTM(4, 5, **options)
    ours = LayerNormLSTM(4, 5, layer_norm=False, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 6, 4).double()
    states = (torch.randn(4, 3, 5).double(), torch.randn(4, 3, 5).double())
    for hx in (None, states):
        got, expected = ours(x, hx), theirs(x, hx)
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    grads = [torch.autograd.grad(m(x)[0].square().sum(), list(m.parameters())) for m in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_parameters():
    layer = LayerNormLSTM(3, 4, bidirectional=True, peephole=True, forget_bias=1.0)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    for suffix in ("_l0", "_l0_reverse"):
        assert shapes["weight_ih" + suffix] == (16, 3)
        assert shapes["weight_hh" + suffix] == (16, 4)
        assert shapes["norm_ih" + suffix] == shapes["norm_hh" + suffix] == (16,)
        assert shapes["norm_cell" + suffix] == shapes["norm_cell_bias" + suffix] == (4,)
        assert shapes["peephole" + suffix] == (12,)
    assert (layer.norm_ih_l0 == 1).all()
    assert not layer.norm_cell_bias_l0.any()
    torch.manual_seed(3)
    plain = LayerNormLSTM(3, 4)
    torch.manual_seed(3)
    biased = LayerNormLSTM(3, 4, forget_bias=1.0)
    difference = biased.bias_ih_l0 - plain.bias_ih_l0
    assert difference.round(decimals=5).tolist() == [0] * 4 + [1] * 4 + [0] * 8
    assert tuple(LayerNormLSTM(3, 4, coupled=True).weight_hh_l0.shape) == (12, 4)
    assert not any("bias" in name for name, _ in LayerNormLSTM(3, 4, bias=False).named_parameters())


@pytest.mark.parametrize("coupled", [False, True])
def test_layers_and_directions_are_calls_of_the_op(backend, coupled):
    layer = LayerNormLSTM(4, 5, 2, bidirectional=True, peephole=True, coupled=coupled, dtype=torch.float64)
    x = torch.randn(6, 3, 4).double()
    lengths = torch.tensor([2, 6, 4])
    output, (h, c) = layer(x, lengths=lengths)
    y, states = x, []
    for k in range(2):
        halves = []
        for reverse, suffix in ((False, f"_l{k}"), (True, f"_l{k}_reverse")):
            weights = {name: getattr(layer, name + suffix) for name in ("norm_ih", "norm_hh", "norm_cell")}
            weights |= {name: getattr(layer, name + suffix) for name in ("norm_cell_bias", "peephole")}
            bias = getattr(layer, "bias_ih" + suffix) + getattr(layer, "bias_hh" + suffix)
            matrices = getattr(layer, "weight_ih" + suffix), getattr(layer, "weight_hh" + suffix)
            half, last = layer_norm_lstm(
                y, None, *matrices, bias, **weights, coupled=coupled, lengths=lengths, reverse=reverse
            )
            halves.append(half)
            states.append(last)
        y = torch.cat(halves, -1)
    torch.testing.assert_close(output, y)
    torch.testing.assert_close(h, torch.stack([s[0] for s in states]))
    torch.testing.assert_close(c, torch.stack([s[1] for s in states]))


def test_packed_sequences(backend):
    layer = LayerNormLSTM(4, 5, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(6, 3, 4).double(), torch.tensor([2, 6, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, states = layer(packed)
    assert isinstance(output, PackedSequence)
    expected, expected_states = layer(x, lengths=lengths)
    torch.testing.assert_close(pad_packed_sequence(output)[0], expected)
    torch.testing.assert_close(states, expected_states)


def test_training_and_evaluation(backend):
    layer = LayerNormLSTM(4, 16, zoneout_hidden=0.3, zoneout_cell=0.2, recurrent_dropout=0.4)
    x = torch.randn(5, 2, 4)
    torch.manual_seed(1)
    first = layer(x)[0]
    torch.manual_seed(1)
    assert torch.equal(layer(x)[0], first)
    assert not torch.equal(layer(x)[0], first)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_autocast_copies_and_pickles():
    layer = LayerNormLSTM(4, 8, peephole=True)
    x = torch.randn(5, 2, 4)
    expected = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        output, (h, _) = layer(x)
    assert output.dtype is h.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    output.sum().backward()
    assert layer.norm_ih_l0.grad.dtype is torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_size": 2}, "proj_size"),
        ({"zoneout_hidden": 1.0}, "zoneout_hidden"),
        ({"zoneout_cell": -0.1}, "zoneout_cell"),
        ({"recurrent_dropout": 2}, "recurrent_dropout"),
        ({"forget_bias": 1.0, "coupled": True}, "forget_bias"),
        ({"forget_bias": 1.0, "bias": False}, "forget_bias"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LayerNormLSTM(3, 4, **options)


def test_bad_input():
    layer = LayerNormLSTM(3, 4)
    with pytest.raises(RuntimeError, match="input_size"):
        layer(torch.randn(5, 2, 7))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        layer(torch.randn(5, 2, 3), (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)))
    with pytest.raises(TypeError, match="pair"):
        layer_norm_lstm(torch.randn(5, 2, 3), torch.zeros(2, 4), layer.weight_ih_l0, layer.weight_hh_l0)
    assert "peephole" in repr(LayerNormLSTM(3, 4, peephole=True))
    assert isinstance(layer, pynn.nn.LayerNormLSTM)
